"""Another name of `mythos import hf`."""

from mythos_dist.commands.import_hf import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
