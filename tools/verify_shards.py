"""Another name of `mythos verify`."""

from mythos_dist.commands.verify_shards import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
