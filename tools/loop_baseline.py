"""`make loop-baseline`: do loops pay? A looped model against plain transformers of the same block at equal depth, equal
parameters and equal FLOPs, with three seeds on the demo's text and on the task of `make depth-demo`. Takes some
20 minutes on two cores; the same command resumes it.

    python tools/loop_baseline.py [--data text,task] [--jobs 2] [train.steps=800 ...]

Writes OUT/summary.json, OUT/summary.md (the tables in docs/loops.md) and OUT/summary.png.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_overrides, parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.baseline import DATA, RATES, run_baseline

CONFIGS = Path(__file__).parents[1] / "configs"


def rates(text: str) -> list[float]:
    """The learning rates of the option."""
    return [float(rate) for rate in text.split(",")]


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/loop-baseline"), help="output folder (%(default)s)")
    add("--data", default=",".join(DATA), help="comma-separated (%(default)s)")
    add("--seeds", type=int, default=3, help="seeds per row (%(default)s)")
    default = ",".join(f"{rate:g}" for rate in RATES)
    add("--rates", type=rates, default=default, help=f"learning rates to choose from, on the first seed ({default})")
    add("--jobs", type=int, help="runs in parallel, one core each (default: number of cores)")
    add_overrides(parser, "config overrides for every run, such as train.steps=50")
    arguments = parse_arguments(parser)
    data, seeds = arguments.data.split(","), range(arguments.seeds)
    run_baseline(CONFIGS, arguments.out, data, seeds, arguments.rates, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
