"""Write shards of a task that needs depth: prefix products in S3 (chance 17 %), S4 (4 %) or S5 (1 %).

    python tools/make_depth_task.py --out data/s3 --targets per_loop
    python tools/make_depth_task.py --out data/s3-16 --hops 16 --sequences 64 --heldout 2000

Train on the first (train.seq_len=9, model.vocab_size=8 or more), then evaluate more hops with more loops on the second:
mythos depth-sweep RUN_DIR --data data/s3-16.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, run_command
from mythos_dist.units import count

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.depth_task import Targets, make_depth_task


def main() -> None:
    """Write the shards; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the new folder")
    add("--group", choices=("S3", "S4", "S5"), default="S3", help="symmetric group (%(default)s)")
    add("--hops", type=int, default=8, help="elements per sequence; the shards' seq_len is one more (%(default)s)")
    add("--sequences", type=int, default=100_000, help="training sequences (%(default)s)")
    add("--heldout", type=int, default=1_000, help="held-out sequences; 0: none (%(default)s)")
    add(
        "--targets",
        choices=get_args(Targets),
        default="final",
        help="final: the product of all elements; reached: after loop t, that of the first t elements; per_loop: after "
        "loop t, that of the last t elements (%(default)s)",
    )
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    arguments = parse_arguments(parser)

    problems = []
    for name, minimum in (("hops", 1), ("sequences", 1), ("heldout", 0), ("seed", 0)):
        value = getattr(arguments, name)
        if value < minimum:
            problems.append(f"--{name}={value} must be at least {minimum}")
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
        f"{arguments.out}: {count(train, 'window')} for training, {heldout:,} held out, seq_len {manifest.seq_len}, "
        f"{count(manifest.targets, 'row')} of targets"
    )


if __name__ == "__main__":
    run_command(main)
