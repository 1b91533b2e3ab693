"""AdamW against Muon, schedules, and averages of the weights, at equal FLOPs with three seeds on the demo's text.

    python tools/optimizer_study.py [--jobs 2] [train.steps=800 ...]

Writes OUT/optimizers.json and OUT/optimizers.md, the tables in docs/recipes.md. The same command resumes an interrupted
study.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.optimizers import RATES, run_study
from experiments.trials import add_rates, add_study_options

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml"


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rates(parser, RATES, "learning rates to choose from")
    add_study_options(parser, "runs/optimizer-study", "optimizer and schedule")
    arguments = parse_arguments(parser)
    run_study(CONFIG, arguments.out, range(arguments.seeds), arguments.rates, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
