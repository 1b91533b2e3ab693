"""Continue texts with a trained model, or talk with one that was tuned on conversations.

mythos generate RUN_DIR --prompt "..."
mythos generate RUN_DIR --prompts FILE --json    # a prompt in each line, decoded as a batch
mythos generate RUN_DIR --chat                   # each line of input is a message; Ctrl-D ends
mythos generate RUN_DIR --chat --prompt "..."    # one message
"""

import argparse
from pathlib import Path

from mythos_dist.config.arguments import WEIGHTS_HELP, add_tokenizer_option, location, parse_arguments
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=location, help=WEIGHTS_HELP)
    add("--prompt", help="text to continue, or with --chat a message; - reads it from standard input")
    add("--prompts", type=Path, help="file with a prompt in each line; .jsonl: JSON texts, or objects with a prompt")
    add("--json", action="store_true", help="a JSON line per prompt: prompt, text, tokens, finish_reason, loops")
    add("--chat", action="store_true", help="answer messages; without --prompt, one per line of input")
    add("--system", help="with --chat: the system message")
    add("--template", help="with --chat: a Jinja file, or plain; default: the template of the training shards")
    add("--max-new-tokens", type=int, default=100, help="(%(default)s)")
    add("--n-loops", type=int, help="loops of the recurrent block; default: as in training")
    add("--temperature", type=float, default=0.8, help="0: greedy decoding (%(default)s)")
    add("--top-k", type=int, default=50, help="0: sample from all tokens (%(default)s)")
    add("--top-p", type=float, default=1.0, help="the fewest tokens with this probability together (%(default)s)")
    add("--min-p", type=float, default=0.0, help="tokens with this share of the highest probability (%(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="divides logits of tokens that occurred (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="a text that ends the output; repeat for several")
    add("--exit", choices=("latent", "kl", "halting"), help="end a token's loops early; default: run all")
    add("--exit-threshold", type=float, help="of --exit; default: 0.03 for latent, 5e-4 for kl, model.act_threshold")
    add("--cache", default="all", help="entries of the KV cache: all, last, or every:K loops share one (%(default)s)")
    add("--draft-loops", type=int, help="self-speculation: draft with fewer loops; needs --temperature 0")
    add("--draft-tokens", type=int, default=4, help="tokens per draft (%(default)s)")
    add("--batch", type=int, default=8, help="prompts decoded at a time (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add_tokenizer_option(parser)
    return parser


def main() -> None:
    """Load the run's newest checkpoint on one process and print the generated text."""
    parser = build_parser()
    arguments = parse_arguments(parser)
    if not arguments.chat and (arguments.prompt is None) == (arguments.prompts is None):
        parser.error("name a --prompt to continue or a file of --prompts, or talk with --chat")

    from mythos_dist.generate.command import run  # imports torch

    run(arguments)


if __name__ == "__main__":
    run_command(main)
