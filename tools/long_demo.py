"""`make long-demo`: can a model read further than it was trained to? A small one is trained on sequences of 256 tokens
and stretched to 1,024 by YaRN in a short second stage. Takes minutes on two cores; the same command resumes it.

Writes summary.json and summary.png: the held-out loss by position, before and after.
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_overrides, parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.long_context import run_long_study, table

CONFIG = Path(__file__).parents[1] / "configs" / "recipes" / "long_context_tiny.yaml"


def main() -> None:
    """Run the study; the exit code is 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/long-demo"), help="output folder (%(default)s)")
    add_overrides(parser, "config overrides for both stages, such as model.dim=64")
    arguments = parse_arguments(parser)
    print("\n".join(table(run_long_study(CONFIG, arguments.out, arguments.overrides))))


if __name__ == "__main__":
    run_command(main)
