"""Another name of `mythos submit`."""

from mythos_dist.commands.submit import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
