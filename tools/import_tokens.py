"""Another name of `mythos import tokens`."""

from mythos_dist.commands.import_tokens import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
