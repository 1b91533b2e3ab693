"""Another name of `mythos average`."""

from mythos_dist.commands.average_checkpoints import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
