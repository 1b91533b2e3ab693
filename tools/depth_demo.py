"""`make depth-demo`: does thinking longer help? Small models learn to multiply 8 permutations in at most 8 loops, and
are asked for 9 to 16 with more loops. A quarter of an hour on two cores; the same command goes on where it was stopped.

Three settings, three seeds each: targets for each loop; the final target only, of more elements as the loops become
more; and the loops of OpenMythos as shipped.
Writes summary.json (accuracy by setting, seed, hops and loops) and summary.png.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_overrides, parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments are no part of the installed package
from experiments.depth import SETTINGS, demonstrate

CONFIG = Path(__file__).parents[1] / "configs" / "depth_task.yaml"


def main() -> None:
    """Make the data, train, sweep, sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/depth-demo"), help="folder of everything (%(default)s)")
    add("--settings", default=",".join(SETTINGS), help="which of them, comma between (%(default)s)")
    add("--seeds", type=int, default=3, help="of each setting (%(default)s)")
    add("--jobs", type=int, help="runs at a time, a core each (default: as many as there are cores)")
    add_overrides(parser, "settings for every run, such as train.steps=50")
    arguments = parse_arguments(parser)
    settings, seeds = arguments.settings.split(","), range(arguments.seeds)
    demonstrate(CONFIG, arguments.out, settings, seeds, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
