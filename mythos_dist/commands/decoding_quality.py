"""What a smaller KV cache and early exits cost: held-out loss of a checkpoint, decoded token by token.

    mythos decoding-quality runs/first --cache all,every:4,last --exits latent:0.03,kl:5e-4 --drafts 2:4

Every cache is measured without exits and with each of them, at one number of loops. `--drafts` continues sequences with
self-speculation: how many drafted tokens are accepted, and loops per token. Prints tables; `--out` writes JSON. Runs on
one process.
"""

import argparse
from pathlib import Path

from mythos_dist.config.arguments import WEIGHTS_HELP, integer, location, parse_arguments
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=location, help=WEIGHTS_HELP)
    add("--cache", default="all,every:2,every:4,last", help="modes of the cache, separated by commas (%(default)s)")
    add("--exits", default="latent:0.03,latent:0.1", help="CRITERION:THRESHOLD, separated by commas (%(default)s)")
    add("--drafts", default="", help="LOOPS:TOKENS of self-speculation, separated by commas, such as 1:4,2:4")
    add("--loops", type=integer(1, 512), help="loops of the recurrent block (default: the mean of training)")
    add("--data", type=Path, help="folder of shards (default: the run's)")
    add("--samples", type=integer(1, 4096), default=32, help="held-out sequences, decoded as one batch (%(default)s)")
    add("--tokens", type=integer(1, 1 << 20), default=256, help="of each sequence, from its beginning (%(default)s)")
    add("--out", type=Path, help="write the results as JSON")
    return parser


def main() -> None:
    """Measure; the exit code is 0, or 2 for a user error."""
    arguments = parse_arguments(build_parser())

    from mythos_dist.evaluate.decoding_command import run  # imports torch

    run(arguments)


if __name__ == "__main__":
    run_command(main)
