"""Plan a run in advance: which layouts fit, the memory each needs, the time of a step, and the cost.

  mythos plan --variant 1t --gpus 4096 --cluster configs/clusters/h100_80gb.yaml
  mythos plan configs/1t.yaml --gpus 4096 --cluster configs/clusters/h100_80gb.yaml --as-is --dry-run

The first searches for the fastest layouts. The second plans the layout of the file and runs one of its ranks, the
trainer's own code on fake tensors, to compare. Exit code 0: a layout fits; 1: none fits; 2: invalid input.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_config, add_json_option, integer, number, parse_arguments
from mythos_dist.errors import run_command
from mythos_dist.packaged import CONFIGS

MOST_GPUS = 1 << 17


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config(parser, "config file; its layout is used with --as-is only", optional=True)
    add("--variant", help="instead of a file: 1b, 3b, 10b, 50b, 100b, 500b or 1t from configs/")
    add("--gpus", type=integer(1, MOST_GPUS), required=True, help="number of GPUs")
    add("--cluster", type=Path, default=Path("h100_80gb"), help="file, or a name in configs/clusters (%(default)s)")
    add("--seq-len", type=int, help="tokens per sequence")
    add("--global-batch", type=int, help="sequences per step, over all replicas")
    add("--loops", type=int, help="mean number of loops")
    add("--backprop", type=int, help="number of last loops that have a gradient")
    add("--fixed", nargs="*", default=[], metavar="KEY=VALUE", help="tensor=16 expert=64 pipe=1 zero=1 sequence=true …")
    add("--as-is", action="store_true", help="plan the layout of the config, no search")
    add(
        "--tokens",
        type=number(0, 1e30, above=True),
        default=1e12,
        help="tokens to train on, for the cost (%(default)g)",
    )
    add(
        "--imbalance",
        type=number(1, 1e6),
        default=1.0,
        help="rows of the busiest expert rank over the mean (%(default)g)",
    )
    add("--top", type=integer(1, 1000), default=8, help="number of layouts to show (%(default)s)")
    add("--dry-run", action="store_true", help="run one rank of the best layout on fake tensors: a minute")
    add("--write", type=Path, help="write the best layout to a new config file")
    add_json_option(parser)
    return parser


def main() -> None:
    """Plan; exit codes are at the top of this file."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.ops.plan.command import run

    dry_run = None
    if arguments.dry_run:
        from mythos_dist.ops.dry_run import dry_run
    sys.exit(run(arguments, CONFIGS, dry_run))


if __name__ == "__main__":
    run_command(main)
