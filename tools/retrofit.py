"""Another name of `mythos retrofit`."""

from mythos_dist.commands.retrofit import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
