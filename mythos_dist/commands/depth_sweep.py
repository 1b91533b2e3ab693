"""Evaluate a checkpoint with 1, 2, 4, ... loops: held-out loss and accuracy, as JSON and as a plot.

    mythos depth-sweep runs/demo
    mythos depth-sweep runs/s3 --data data/s3-16 --loops 4,8,16,32 --out runs/s3/sweep-16
    mythos depth-sweep runs/first --text story.txt --loops 1,2,4,8 --exit kl --exit-threshold 5e-4

Writes OUT.json and OUT.png. The dotted line is the mean number of loops in training; a cross marks numbers of loops
with a higher loss than fewer loops have (overthinking). With --text also OUT.html: the text colored by the loop after
which each token could stop, what every loop would predict next, and the agreement of each loop with the deepest.
"""

import argparse
from pathlib import Path

from mythos_dist.config.arguments import (
    WEIGHTS_HELP,
    add_json_option,
    add_tokenizer_option,
    location,
    number,
    parse_arguments,
)
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=location, help=WEIGHTS_HELP)
    add("--loops", default="1,2,4,8,16,32,64", help="numbers of loops (%(default)s)")
    add("--data", type=Path, help="folder of shards; its held-out split is used (default: the run's data)")
    add("--samples", type=int, default=256, help="maximum number of held-out sequences (%(default)s)")
    add("--batch", type=int, default=16, help="batch size in sequences (%(default)s)")
    add("--text", type=Path, help="file of a text (- for standard input): write OUT.html, with the most of --loops")
    exits = "after which a token stops: small change of its hidden state, of its prediction, or enough halting weight"
    add("--exit", choices=["latent", "kl", "halting"], default="latent", help=f"{exits} (%(default)s)")
    add("--exit-threshold", type=number(0, 1e9), help="(default: latent 0.03, kl 5e-4, halting model.act_threshold)")
    add_tokenizer_option(parser, "--text")
    add("--out", type=Path, help="write OUT.json and OUT.png (default: CHECKPOINT/depth-sweep; not for URLs)")
    add_json_option(parser, "print JSON instead of a table")
    return parser


def main() -> None:
    """Sweep; the exit code is 0, or 2 for a user error."""
    arguments = parse_arguments(build_parser())

    from mythos_dist.evaluate.depth_command import run  # imports torch

    run(arguments)


if __name__ == "__main__":
    run_command(main)
