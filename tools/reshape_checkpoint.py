"""Another name of `mythos reshape`."""

from mythos_dist.commands.reshape_checkpoint import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
