"""Text -> MDS shards with a manifest, ready for `data.path`.

Input: parquet, JSON lines or plain text (also .gz, .zst, .bz2, .xz): files, folders, patterns and URLs.
Stopped at any moment, it goes on when the same command is given again, to the same bytes at any number of workers.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments, path_text
from mythos_dist.errors import run_command

OPTIONS = "heldout compression skip_bad max_unpack_ratio workers quiet".split()  # handed on as they are


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, nargs="+", type=path_text, help="files, folders, patterns, URLs")
    add("--tokenizer", required=True, type=Path, help="a SentencePiece model, or a Hugging Face tokenizer.json")
    add("--seq-len", required=True, type=int, help="tokens in a window; one more is stored, for the labels")
    add("--out", required=True, type=Path, help="folder of the shards")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s); 0: only this one")
    add("--heldout", type=float, default=0.02, help="share of text that training never sees; 0: none (%(default)s)")
    add("--dedup", action="store_true", help="keep the first of documents with the same text (reads everything twice)")
    add("--min-score", type=float, help="leave out documents whose column `score` is lower")
    add("--min-tokens", type=int, help="leave out documents with fewer tokens")
    add("--limit-tokens", type=int, help="stop with the document that reaches this many tokens")
    add("--compression", help="of the shards: zstd, or zstd:1 (fast) to zstd:22 (small); default: none")
    add("--text-column", default="text", help="column or JSON key of the text (%(default)s)")
    add("--sample-by", choices=("document", "line"), default="document", help="plain text: a document per file or line")
    add("--eos", help="the token that ends documents, where the tokenizer's files do not say")
    add("--skip-bad", action="store_true", help="leave out what cannot be read, and list it in the manifest")
    add("--max-unpack-ratio", type=float, default=100.0, help="refuse inputs that unpack to more (%(default)g times)")
    add("--json", action="store_true", help="print the manifest, seconds and rates as JSON on standard output")
    add("--quiet", action="store_true", help="say nothing but errors")
    return parse_arguments(parser)


def main() -> None:
    """Convert; the exit code is 0, 2 for a mistake in what was given, or 130 if a person stopped it."""
    arguments = parse()
    # Arrow's own allocator keeps what it has freed; a worker's memory would follow the largest document it ever saw.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    from mythos_dist.data.manifest import Filters
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.prepare.convert import convert
    from mythos_dist.prepare.spans import Columns

    begin = time.monotonic()
    try:
        manifest = convert(
            arguments.input,
            Tokenizer.load(arguments.tokenizer, arguments.eos),
            arguments.seq_len,
            arguments.out,
            filters=Filters(arguments.min_score, arguments.min_tokens, arguments.limit_tokens, arguments.dedup),
            columns=Columns(arguments.text_column, sample_by=arguments.sample_by),
            **{name: getattr(arguments, name) for name in OPTIONS},
        )
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    seconds = time.monotonic() - begin
    if arguments.json:
        print(json.dumps({**manifest.to_json(), "seconds": seconds, "tokens_per_second": manifest.tokens / seconds}))
    elif not arguments.quiet:
        print(manifest.summary())


if __name__ == "__main__":
    run_command(main)
