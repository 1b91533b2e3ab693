"""What a run meets on a cluster: launchers, nodes that are not there, signals, hangs, restarts."""
