"""Which switches of the loops pay? Each is changed alone, at equal FLOPs, three seeds, on the demo's text and on the
task of `make depth-demo`. The defaults of model.mode=train follow from the table in docs/loops.md that this makes.

    python tools/loop_ablation.py [--data text,task] [--only "act safe,lora shared"] [--jobs 2]

Writes OUT/ablation.json, OUT/ablation.md and OUT/ablation.png. The same command goes on where it was stopped.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_overrides, parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments are no part of the installed package
from experiments.ablation import DATA, SWITCHES, compare

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Train all, and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/loop-ablation"), help="folder of everything (%(default)s)")
    add("--data", default=",".join(DATA), help="comma between (%(default)s)")
    add("--only", default=",".join(SWITCHES), help="switches, comma between (all)")
    add("--seeds", type=int, default=3, help="of each (%(default)s)")
    add("--jobs", type=int, help="runs at a time, a core each (default: as many as there are cores)")
    add_overrides(parser, "settings for every run, such as train.steps=50")
    arguments = parse_arguments(parser)
    data, switches, seeds = arguments.data.split(","), arguments.only.split(","), range(arguments.seeds)
    compare(CONFIGS, arguments.out, data, switches, seeds, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
