"""`make hop-demo`: do more loops answer questions of more hops? Small models read short stories with questions of up to
4 hops in at most 4 loops, and are evaluated on questions of 5 to 8 hops with more loops. Takes some 8 minutes on two
cores; the same command resumes it.

Three seeds. Writes OUT/summary.json, OUT/summary.md and OUT/summary.png.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.hops import run_hop_study
from experiments.trials import add_study_options

CONFIG = Path(__file__).parents[1] / "configs" / "story_task.yaml"


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_options(parser, "runs/hop-demo", "study")
    arguments = parse_arguments(parser)
    run_hop_study(CONFIG, arguments.out, range(arguments.seeds), arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
