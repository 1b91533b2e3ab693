"""Another name of `mythos import deepspeed`."""

from mythos_dist.commands.import_deepspeed import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
