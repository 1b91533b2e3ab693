"""`make loop-baseline`: do loops pay? A looped model against plain transformers of the same block at equal depth, equal
parameters and equal FLOPs, with three seeds on the demo's text and on the task of `make depth-demo`. Takes some
25 minutes on two cores; the same command resumes it.

    python tools/loop_baseline.py [--data text,task] [--jobs 2] [train.steps=800 ...]

Writes OUT/summary.json, OUT/summary.md (the tables in docs/loops.md) and OUT/summary.png.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.baseline import DATA, RATES, run_baseline
from experiments.trials import add_rates, add_study_options

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default=",".join(DATA), help="comma-separated (%(default)s)")
    add_rates(parser, RATES, "learning rates to choose from, on the first seed")
    add_study_options(parser, "runs/loop-baseline", "row")
    arguments = parse_arguments(parser)
    data, seeds = arguments.data.split(","), range(arguments.seeds)
    run_baseline(CONFIGS, arguments.out, data, seeds, arguments.rates, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
