"""Another name of `mythos depth-sweep`."""

from mythos_dist.commands.depth_sweep import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
