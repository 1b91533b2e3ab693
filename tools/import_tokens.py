"""Convert the token files of other trainers to MDS shards with a manifest, ready for `data.path`.

Sources: Megatron's .bin and .idx (a prefix, or a folder of them), nanotron's nanosets (.ds, or a folder of them), data
sets that Hugging Face's `datasets` saved with save_to_disk, folders of MDS that MosaicML's MDSWriter wrote.

A document ends at each EOS token and, but for MDS, at each document or row of the source (--documents). The same
command resumes an interrupted import. The shards are the same bytes at any number of workers.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments, path_text
from mythos_dist.errors import run_command

OPTIONS = "heldout compression workers quiet".split()  # passed to convert() unchanged


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", type=path_text, metavar="SOURCE", help="prefixes, files or folders")
    add("--tokenizer", required=True, type=Path, help="that the tokens are of: a SentencePiece model or tokenizer.json")
    add("--out", required=True, type=Path, help="output folder")
    add("--seq-len", type=int, default=4096, help="tokens per window; one more is stored, for the labels (%(default)s)")
    add("--format", default="auto", help="auto, megatron, nanoset, datasets or mds (%(default)s)")
    add("--documents", default="auto", help="what ends one: stored (rows and EOS), eos (EOS only), auto (%(default)s)")
    add("--eos", help="the token that ends documents, if the tokenizer's files do not define it")
    add("--column", help="of token ids (default: input_ids or tokens)")
    add("--bytes-dtype", default="int64", help="of an MDS column of bytes: int64, int32, uint32, uint16 (%(default)s)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="worker processes; 0: none (%(default)s)")
    add("--heldout", type=float, default=0.02, help="held-out share of the documents; 0: none (%(default)s)")
    add("--min-tokens", type=int, help="leave out documents with fewer tokens")
    add("--limit-tokens", type=int, help="stop after the document that reaches this many tokens")
    add("--compression", help="compress the shards: zstd, or zstd:1 (fast) to zstd:22 (small); default: none")
    add("--json", action="store_true", help="print the manifest, seconds and rates as JSON on standard output")
    add("--quiet", action="store_true", help="print errors only")
    return parse_arguments(parser)


def main() -> None:
    """Import; the exit code is 0, 2 for a user error, or 130 after Ctrl-C."""
    arguments = parse()
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # DATA-15
    from mythos_dist.data.manifest import Filters, TokenRules
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.prepare.convert import convert
    from mythos_dist.prepare.spans import Columns

    begin = time.monotonic()
    try:
        rules = TokenRules(arguments.format, arguments.documents, arguments.column, arguments.bytes_dtype)
        tokenizer = Tokenizer.load(arguments.tokenizer, arguments.eos)
        manifest = convert(
            *(arguments.sources, tokenizer, arguments.seq_len, arguments.out),
            filters=Filters(min_tokens=arguments.min_tokens, limit_tokens=arguments.limit_tokens),
            columns=Columns(tokens=rules),
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
