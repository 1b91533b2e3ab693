"""`make loop-stability`: which loops train at which learning rate, by switch (residual scale, normed states, penalty on
the last loop's change, injection) and number of loops, on the demo's text.

    python tools/loop_stability.py [--only "default,residual 1/N"] [--loops 4,64] [--rates 2e-3,8e-3] [--seeds 2]

Writes OUT/stability.json, OUT/stability.md (the table in docs/loops.md) and OUT/stability.png. The same command resumes
an interrupted study; another selection adds to it.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.stability import LOOPS, RATES, SWITCHES, run_stability
from experiments.trials import add_rates, add_study_options

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml"


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ";".join(SWITCHES)
    add("--only", default=names, help=f"switches, separated by semicolons (default: {names})")
    add("--loops", default=",".join(map(str, LOOPS)), help="numbers of loops, comma-separated (%(default)s)")
    add_rates(parser, RATES, "learning rates")
    add_study_options(parser, "runs/loop-stability", "cell", seeds=1)
    arguments = parse_arguments(parser)

    from mythos_dist.train.sweep import parse_loops

    loops, wrong = parse_loops(arguments.loops)
    if wrong:
        raise UserError(wrong)
    switches, seeds = arguments.only.split(";"), range(arguments.seeds)
    run_stability(CONFIG, arguments.out, switches, loops, arguments.rates, seeds, arguments.jobs, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
