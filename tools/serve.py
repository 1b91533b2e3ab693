"""Another name of `mythos serve`."""

from mythos_dist.commands.serve import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
