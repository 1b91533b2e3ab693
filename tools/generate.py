"""Continue a text with a trained model, or talk with one that was tuned on conversations.

python tools/generate.py RUN_DIR --prompt "..."
python tools/generate.py RUN_DIR --chat                   # each line of input is a message; Ctrl-D ends
python tools/generate.py RUN_DIR --chat --prompt "..."    # one message
"""

import argparse
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command


def main() -> None:
    """Parse the command line, load the run's newest checkpoint on one process and print the generated text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=Path, help="a run.dir (its newest checkpoint), a checkpoint or an export")
    add("--prompt", help="text to continue, or with --chat a message; - reads it from standard input")
    add("--chat", action="store_true", help="answer messages; without --prompt, one per line of input")
    add("--system", help="with --chat: the system message")
    add("--template", help="with --chat: a Jinja file, or plain; default: the template of the training shards")
    add("--max-new-tokens", type=int, default=100, help="(%(default)s)")
    add("--n-loops", type=int, help="loops of the recurrent block; default: as in training")
    add("--temperature", type=float, default=0.8, help="0: greedy decoding (%(default)s)")
    add("--top-k", type=int, default=50, help="0: sample from all tokens (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--tokenizer", type=Path, help="tokenizer file, if the training shards are not available")
    arguments = parse_arguments(parser)

    from mythos_dist.generate.command import run  # imports torch

    run(arguments)


if __name__ == "__main__":
    run_command(main)
