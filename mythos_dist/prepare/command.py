"""What `mythos shards` and `mythos import tokens` have in common: options, Ctrl-C and the report."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_dist.config.arguments import path_text

if TYPE_CHECKING:  # --help imports no pyarrow
    from mythos_dist.data.manifest import ShardManifest


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both tools that read text."""
    add = parser.add_argument
    add("--input", required=True, nargs="+", type=path_text, help="files, folders, patterns, URLs")
    add("--text-column", default="text", help="column or JSON key of the text (%(default)s)")
    add("--max-unpack-ratio", type=float, default=100.0, help="highest compression ratio of an input (%(default)g)")


def add_conversion_options(parser: argparse.ArgumentParser, heldout_of: str) -> None:
    """Add the options of both tools that write shards. heldout_of: what a share of is held out."""
    add = parser.add_argument
    add("--out", required=True, type=path_text, help="output folder, or s3://bucket/folder")
    add("--scratch", type=Path, help="folder for what is on its way to or from a store (default: in TMPDIR)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="worker processes; 0: none (%(default)s)")
    add("--heldout", type=float, default=0.02, help=f"held-out share of the {heldout_of}; 0: none (%(default)s)")
    add("--min-tokens", type=int, help="leave out documents with fewer tokens")
    add("--limit-tokens", type=int, help="stop after the document that reaches this many tokens")
    add("--compression", help="compress the shards: zstd, or zstd:1 (fast) to zstd:22 (small); default: none")
    add("--eos", help="the token that ends documents, if the tokenizer's files do not define it")
    add("--json", action="store_true", help="print the manifest, seconds and rates as JSON on standard output")
    add("--quiet", action="store_true", help="print errors only")


def run_conversion(convert: Callable[[], "ShardManifest"], arguments: argparse.Namespace) -> None:
    """Convert and print the manifest's summary, or JSON. After Ctrl-C the exit code is 130."""
    begin = time.monotonic()
    try:
        manifest = convert()
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    seconds = time.monotonic() - begin
    if arguments.json:
        print(json.dumps({**manifest.to_json(), "seconds": seconds, "tokens_per_second": manifest.tokens / seconds}))
    elif not arguments.quiet:
        print(manifest.summary())
