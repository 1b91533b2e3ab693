"""Another name of `mythos decoding-quality`."""

from mythos_dist.commands.decoding_quality import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
