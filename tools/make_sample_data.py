"""Another name of `mythos sample-data`."""

from mythos_dist.commands.make_sample_data import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
