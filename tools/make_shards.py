"""Parquet (FineWeb-Edu's schema) -> MDS shards with a manifest, ready for `data.path`."""

import argparse
import json
from pathlib import Path

from mythos_dist.errors import UserError, exit_with


def main() -> None:
    """Parse the command line and convert; running it again with the same settings finds the work done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, nargs="+", help="parquet files, folders or globs")
    parser.add_argument("--tokenizer", required=True, type=Path, help="a SentencePiece model file")
    parser.add_argument("--seq-len", required=True, type=int, help="tokens in a window")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards")
    parser.add_argument("--heldout", type=float, default=0.02, help="share of documents held out (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    arguments = parser.parse_args()

    from mythos_dist.data.shards import convert
    from mythos_dist.data.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(arguments.tokenizer)
        manifest = convert(arguments.input, tokenizer, arguments.seq_len, arguments.out, heldout=arguments.heldout)
    except UserError as error:
        exit_with(error)
    if arguments.json:
        print(json.dumps(manifest))
        return
    for split, counts in manifest["splits"].items():
        print(f"{split}: {counts['documents']} documents, {counts['tokens']} tokens, {counts['windows']} windows")


if __name__ == "__main__":
    main()
