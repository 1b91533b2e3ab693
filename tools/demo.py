"""Another name of `mythos demo`."""

from mythos_dist.commands.demo import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
