"""Another name of `mythos status`."""

from mythos_dist.commands.status import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
