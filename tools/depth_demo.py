"""`make depth-demo`: do more loops help at inference? Small models learn to multiply 8 permutations in at most 8 loops,
and are evaluated on 9 to 16 permutations with more loops. Takes 7 to 11 minutes on two cores; the same command
resumes it.

Three settings, three seeds each: a target for each loop; the final target only, with the sequence growing as the loops
do; and the loops of OpenMythos as shipped.
Writes summary.json (accuracy by setting, seed, hops and loops) and summary.png.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.depth import SETTINGS, run_depth_study
from experiments.trials import add_study_options

CONFIG = Path(__file__).parents[1] / "configs" / "depth_task.yaml"


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--settings", default=",".join(SETTINGS), help="comma-separated (%(default)s)")
    add_study_options(parser, "runs/depth-demo", "setting")
    arguments = parse_arguments(parser)
    settings, seeds = arguments.settings.split(","), range(arguments.seeds)
    run_depth_study(CONFIG, arguments.out, settings, seeds, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
