"""Running the trainer: cluster, checks before and during a run, planning. Nothing of the core imports it."""
