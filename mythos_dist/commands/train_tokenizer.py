"""Train a SentencePiece model with byte fallback. The same input, options and seed give the same file.

Input: everything that mythos shards reads. Of a large corpus, a random sample of --sample-mb is read.
bpe encodes faster (each distinct word is encoded once); unigram is the default of SentencePiece.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, run_command
from mythos_dist.prepare.command import add_text_options
from mythos_dist.units import count


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_text_options(parser)
    add("--out", required=True, type=Path, help="model file to write")
    add("--vocab-size", type=int, default=32000, help="number of pieces (%(default)s)")
    add("--model-type", choices=("unigram", "bpe"), default="unigram", help="(%(default)s)")
    add("--seed", type=int, default=0, help="seed of the sample of a large input (%(default)s)")
    add("--sample-mb", type=int, default=1024, help="maximum MB of text to read (%(default)s)")
    add("--json", action="store_true", help="print path, vocab_size, sha256, model_type and more as JSON")
    add("--quiet", action="store_true", help="print errors only")
    return parser


def main() -> None:
    """Train; the exit code is 0, or 2 for a user error."""
    arguments = parse_arguments(build_parser())
    begin = time.monotonic()
    result = train_from(arguments)
    if arguments.json:
        print(json.dumps(result))
    elif not arguments.quiet:
        print(f"{arguments.out}: {result['vocab_size']} pieces in {time.monotonic() - begin:.0f} s")


def train_from(arguments: argparse.Namespace) -> dict[str, str | int]:
    """Read, sample and train; returns the values for --json."""
    from mythos_dist.prepare.corpus import sample_documents
    from mythos_dist.prepare.spans import Columns
    from mythos_dist.prepare.tokenizer_training import sample_lines, train_on_lines

    numbers = {"sample-mb": arguments.sample_mb, "vocab-size": arguments.vocab_size}
    problems = [f"--{name}={number} must be at least 1" for name, number in numbers.items() if number < 1]
    if arguments.out.is_dir():
        problems.append(f"--out={arguments.out} is a folder; name a file, such as tokenizer.model in it")
    if problems:
        raise UserError(problems)
    documents = sample_documents(
        arguments.input,
        arguments.sample_mb * 1_000_000,
        arguments.seed,
        progress=not arguments.quiet,
        columns=Columns(arguments.text_column),
        max_unpack_ratio=arguments.max_unpack_ratio,
    )
    lines = sample_lines(documents, arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # fail before training, not after
    text_bytes = sum(len(line.encode()) for line in lines)
    kind, size = arguments.model_type, arguments.vocab_size
    if not arguments.quiet:
        what, text = count(size, "piece"), count(len(lines), "line")
        print(f"training {kind} of {what} on {text}, {text_bytes / 1e6:.1f} MB", file=sys.stderr)
    tokenizer = train_on_lines(lines, arguments.out, size, kind)
    made = {"path": str(arguments.out), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    return {**made, "model_type": kind, "lines": len(lines), "text_bytes": text_bytes}


if __name__ == "__main__":
    run_command(main)
