"""Does thinking longer help? Held-out loss and accuracy of a checkpoint with 1, 2, 4, ... loops, and a picture.

    python tools/depth_sweep.py runs/demo
    python tools/depth_sweep.py runs/s3 --data data/s3-16 --loops 4,8,16,32 --out runs/s3/sweep-16

writes OUT.json and OUT.png. The dotted line is the mean of training; a cross marks loops that do harm (overthinking).
"""

import argparse
import json
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, run_command


def main() -> None:
    """Sweep; the exit code is 0, or 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run.dir (its newest checkpoint) or the folder of one checkpoint")
    add("--loops", default="1,2,4,8,16,32,64", help="numbers of loops (%(default)s)")
    add("--data", type=Path, help="shards of which held-out windows are read (default: those of the run)")
    add("--samples", type=int, default=256, help="held-out sequences, at most (%(default)s)")
    add("--batch", type=int, default=16, help="sequences at a time (%(default)s)")
    add("--out", type=Path, help="where OUT.json and OUT.png go (default: depth-sweep in the folder of CHECKPOINT)")
    add("--json", action="store_true", help="print JSON, not a table")
    arguments = parse_arguments(parser)
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    from tqdm import tqdm

    from mythos_dist.checkpoint.restore import open_checkpoint
    from mythos_dist.train.depth import draw_curves
    from mythos_dist.train.sweep import parse_loops, sweep, write_json

    loops, problems = parse_loops(arguments.loops)
    sizes = {"samples": arguments.samples, "batch": arguments.batch}
    problems += [f"--{name}={value} must be at least 1" for name, value in sizes.items() if value < 1]
    if problems:
        raise UserError(problems)
    out = arguments.out or arguments.checkpoint / "depth-sweep"
    open_checkpoint(arguments.checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)  # before hours of work
    with tqdm(desc="passes", unit="", disable=None) as bar:
        found = sweep(
            arguments.checkpoint,
            loops,
            data=arguments.data,
            samples=arguments.samples,
            batch=arguments.batch,
            progress=bar.update,
        )
    write_json(Path(f"{out}.json"), found.to_json())
    draw_curves(Path(f"{out}.png"), {f"step {found.step}": found.curve}, found.trained)
    if arguments.json:
        print(json.dumps(found.to_json()))
        return
    print("loops  loss    accuracy")
    for n, one in found.curve.items():
        print(f"{n:5d}  {one.loss:.4f}  {one.accuracy:.1%}")
    worse = found.to_json()["overthinking_from"]
    print(f"{out}.json, {out}.png" + (f"; overthinking from {worse} loops on" if worse else ""))


if __name__ == "__main__":
    run_command(main)
