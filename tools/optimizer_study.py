"""AdamW against Muon, schedules, and averages of the weights, at equal FLOPs with three seeds on the demo's text.

    python tools/optimizer_study.py [--jobs 2] [train.steps=800 ...]

Writes OUT/optimizers.json and OUT/optimizers.md, the tables in docs/recipes.md. The same command resumes an interrupted
study.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_overrides, parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.optimizers import RATES, run_study

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml"


def rates(text: str) -> list[float]:
    """The learning rates of the option."""
    return [float(rate) for rate in text.split(",")]


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/optimizer-study"), help="output folder (%(default)s)")
    add("--seeds", type=int, default=3, help="seeds per optimizer and schedule (%(default)s)")
    default = ",".join(f"{rate:g}" for rate in RATES)
    add("--rates", type=rates, default=default, help=f"learning rates to choose from ({default})")
    add("--jobs", type=int, help="runs in parallel, one core each (default: number of cores)")
    add_overrides(parser, "config overrides for every run, such as train.steps=50")
    arguments = parse_arguments(parser)
    run_study(CONFIG, arguments.out, range(arguments.seeds), arguments.rates, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
