"""Another name of `mythos export`."""

from mythos_dist.commands.export_checkpoint import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
