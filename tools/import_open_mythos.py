"""Another name of `mythos import open-mythos`."""

from mythos_dist.commands.import_open_mythos import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
