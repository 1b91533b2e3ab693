"""Evaluate a checkpoint or an export on tasks of lm-evaluation-harness, and its perplexity, over the number of loops.

    mythos evaluate runs/first --tasks my_task.yaml,perplexity_by_position --loops 1,4,8,16
    torchrun --nproc_per_node 8 -m mythos_dist evaluate runs/first --tasks hellaswag,arc_easy
    mythos evaluate --tasks list

Prints a table with standard errors, and writes OUT.json and OUT.png. Every rank holds the model and computes a share
of the requests. Results are kept on disk: the same command again computes only the requests that are missing.
"""

import argparse
from pathlib import Path

from mythos_dist.config.arguments import (
    WEIGHTS_HELP,
    add_json_option,
    add_tokenizer_option,
    integer,
    location,
    parse_arguments,
)
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=location, nargs="?", help=WEIGHTS_HELP)
    add("--tasks", required=True, help="names and YAML files, separated by commas; list: print the names")
    add("--loops", default="", help="numbers of loops, such as 1,4,8 (default: the mean of training)")
    add("--limit", type=integer(1, 10**9), help="maximum number of documents per task")
    add("--data", type=Path, help="folder of shards for the built-in tasks (default: the run's data)")
    add("--samples", type=integer(1, 10**9), default=256, help="held-out sequences of the built-in tasks (%(default)s)")
    add("--batch-tokens", type=integer(1, 10**9), default=8192, help="maximum tokens of a batch (%(default)s)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and computation (%(default)s)")
    add_tokenizer_option(parser)
    add(
        "--out",
        type=Path,
        help="write OUT.json, OUT.png and a cache beside them (default: RUN/evaluate/STEP; needed for a URL)",
    )
    add_json_option(parser, "print JSON instead of a table")
    return parser


def main() -> None:
    """Evaluate; the exit code is 0, or 2 for a user error."""
    arguments = parse_arguments(build_parser())

    from mythos_dist.evaluate.command import run  # imports torch

    run(arguments)


if __name__ == "__main__":
    run_command(main)
