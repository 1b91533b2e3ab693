"""Evaluate a checkpoint with 1, 2, 4, ... loops: held-out loss and accuracy, as JSON and as a plot.

    python tools/depth_sweep.py runs/demo
    python tools/depth_sweep.py runs/s3 --data data/s3-16 --loops 4,8,16,32 --out runs/s3/sweep-16

Writes OUT.json and OUT.png. The dotted line is the mean number of loops in training; a cross marks numbers of loops
with a higher loss than fewer loops have (overthinking).
"""

import argparse
import json
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, run_command


def main() -> None:
    """Parse the command line and sweep; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run.dir (its newest checkpoint), a checkpoint or an export")
    add("--loops", default="1,2,4,8,16,32,64", help="numbers of loops (%(default)s)")
    add("--data", type=Path, help="folder of shards; its held-out split is used (default: the run's data)")
    add("--samples", type=int, default=256, help="maximum number of held-out sequences (%(default)s)")
    add("--batch", type=int, default=16, help="batch size in sequences (%(default)s)")
    add("--out", type=Path, help="write OUT.json and OUT.png (default: CHECKPOINT/depth-sweep)")
    add("--json", action="store_true", help="print JSON instead of a table")
    arguments = parse_arguments(parser)
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Sweep, and write and print the results."""
    from tqdm import tqdm

    from mythos_dist.checkpoint.restore import open_weights_at
    from mythos_dist.train.depth import draw_curves
    from mythos_dist.train.sweep import parse_loops, sweep, write_json

    loops, problems = parse_loops(arguments.loops)
    sizes = {"samples": arguments.samples, "batch": arguments.batch}
    problems += [f"--{name}={value} must be at least 1" for name, value in sizes.items() if value < 1]
    if problems:
        raise UserError(problems)
    out = arguments.out or arguments.checkpoint / "depth-sweep"
    open_weights_at(arguments.checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)  # fail before the sweep, not after
    with tqdm(desc="forward passes", unit="", disable=None) as bar:
        result = sweep(
            arguments.checkpoint,
            loops,
            data=arguments.data,
            samples=arguments.samples,
            batch=arguments.batch,
            progress=bar.update,
        )
    write_json(Path(f"{out}.json"), result.to_json())
    draw_curves(Path(f"{out}.png"), {f"step {result.step}": result.curve}, result.trained)
    if arguments.json:
        print(json.dumps(result.to_json()))
        return
    print("loops  loss    accuracy")
    for n, one in result.curve.items():
        print(f"{n:5d}  {one.loss:.4f}  {one.accuracy:.1%}")
    overthinking_from = result.to_json()["overthinking_from"]
    note = f"; overthinking with {overthinking_from} loops or more" if overthinking_from else ""
    print(f"{out}.json, {out}.png{note}")


if __name__ == "__main__":
    run_command(main)
