"""Another name of `mythos generate`."""

from mythos_dist.commands.generate import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
