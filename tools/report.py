"""Another name of `mythos report`."""

from mythos_dist.commands.report import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
