"""Another name of `mythos evaluate`."""

from mythos_dist.commands.evaluate import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
