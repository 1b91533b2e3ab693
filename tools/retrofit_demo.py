"""`make retrofit-demo`: does a pretrained model gain more from loops than from further training? A small Qwen3 that
has learned questions of up to 2 hops continues with questions of up to 4 hops, as it is or as a looped model, for equal
FLOPs, with three seeds. Takes some 25 minutes on two cores; the same command resumes it.

Writes OUT/summary.json, OUT/summary.md (the table in docs/retrofit.md) and OUT/summary.png.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.retrofit import RATES, run_retrofit_study
from experiments.trials import add_rates, add_study_options


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rates(parser, RATES, "learning rates to choose from, on the first seed")
    add_study_options(parser, "runs/retrofit-demo", "row")
    arguments = parse_arguments(parser)
    run_retrofit_study(arguments.out, range(arguments.seeds), arguments.rates, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
