"""Ablation of the loop settings: each is changed alone, at equal FLOPs, with three seeds, on the demo's text and on the
task of `make depth-demo`. The defaults of model.mode=train follow from its table in docs/loops.md.

    python tools/loop_ablation.py [--data text,task] [--only "act safe,lora shared"] [--jobs 2]

Writes OUT/ablation.json, OUT/ablation.md and OUT/ablation.png. The same command resumes an interrupted ablation.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.ablation import DATA, SWITCHES, run_ablation
from experiments.trials import add_study_options

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Run the ablation; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default=",".join(DATA), help="comma-separated (%(default)s)")
    add("--only", default=",".join(SWITCHES), help="settings to compare, comma-separated (default: all)")
    add_study_options(parser, "runs/loop-ablation", "setting")
    arguments = parse_arguments(parser)
    data, switches, seeds = arguments.data.split(","), arguments.only.split(","), range(arguments.seeds)
    run_ablation(CONFIGS, arguments.out, data, switches, seeds, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
