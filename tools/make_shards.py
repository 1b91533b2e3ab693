"""Another name of `mythos shards`."""

from mythos_dist.commands.make_shards import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
