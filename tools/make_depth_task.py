"""Make shards of a task that needs depth: products of group elements, S3 (chance 17 %) or S5 (chance 1 %).

    python tools/make_depth_task.py --out data/s3 --targets per_loop
    python tools/make_depth_task.py --out data/s3-16 --hops 16 --sequences 64 --heldout 2000

Train on the first (train.seq_len=9, model.vocab_size=8 or more), then measure more hops with more loops on the second:
tools/depth_sweep.py RUN_DIR --data data/s3-16.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, run_command
from mythos_dist.units import count

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments are no part of the installed package
from experiments.depth_task import Targets, make_depth_task


def main() -> None:
    """Make the shards; the exit code is 0, or 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a new folder")
    add("--group", choices=("S3", "S4", "S5"), default="S3", help="(%(default)s)")
    add("--hops", type=int, default=8, help="elements of a sequence; the shards' seq_len is one more (%(default)s)")
    add("--sequences", type=int, default=100_000, help="for training (%(default)s)")
    add("--heldout", type=int, default=1_000, help="sequences that are held out; 0: none (%(default)s)")
    add(
        "--targets",
        choices=get_args(Targets),
        default="final",
        help="the product of all elements; the same, where as many loops can have got to; or after t loops that of the "
        "last t (%(default)s)",
    )
    add("--seed", type=int, default=0, help="(%(default)s)")
    arguments = parse_arguments(parser)

    problems = [
        f"--{name}={getattr(arguments, name)} must be at least 1"
        for name in ("hops", "sequences")
        if getattr(arguments, name) < 1
    ] + [
        f"--{name}={getattr(arguments, name)} must not be negative"
        for name in ("heldout", "seed")
        if getattr(arguments, name) < 0
    ]
    if problems:
        raise UserError(problems)
    manifest = make_depth_task(
        arguments.out,
        degree=int(arguments.group[1:]),
        hops=arguments.hops,
        sequences=arguments.sequences,
        heldout=arguments.heldout,
        targets=arguments.targets,
        seed=arguments.seed,
    )
    train, heldout = (manifest.splits[split].windows for split in ("train", "heldout"))
    print(
        f"{count(train, 'window')} for training, {heldout:,} held out, of seq_len {manifest.seq_len} with "
        f"{count(manifest.targets, 'row')} of targets, in {arguments.out}"
    )


if __name__ == "__main__":
    run_command(main)
