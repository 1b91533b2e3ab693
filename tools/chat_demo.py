"""`make chat-demo`: does fine-tuning on conversations work? A small model learns to reverse words of four letters, and
is asked for words that were in no conversation. Takes minutes on a CPU; the same command resumes it.

Writes summary.json (shares of exact answers before and after training, held-out losses).
Afterwards: mythos generate runs/chat-demo/run --chat
"""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_overrides, parse_arguments
from mythos_dist.errors import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments/ is not in the installed package
from experiments.chat import GOAL, run_chat_study

CONFIG = Path(__file__).parents[1] / "configs" / "recipes" / "sft_tiny.yaml"


def main() -> None:
    """Run the study; the exit code is 0, 1 if the model answers too few prompts, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/chat-demo"), help="output folder (%(default)s)")
    add_overrides(parser, "config overrides, such as train.steps=300")
    arguments = parse_arguments(parser)
    summary = run_chat_study(CONFIG, arguments.out, arguments.overrides)
    print(f"{summary['after']:.1%} of {summary['prompts']} prompts are answered exactly after {summary['steps']} steps")
    if summary["after"] <= GOAL:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
