"""Another name of `mythos plan`."""

from mythos_dist.commands.plan import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
