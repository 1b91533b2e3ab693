"""Make shards without a download: the text of CPython's own help -> parquet -> tokenizer -> MDS shards.

Writes the shards with their manifest to OUT, and corpus.parquet, tokenizer.model and chats.jsonl to OUT-source.
"""

import argparse
import os
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("data/sample"), help="output folder of the shards (%(default)s)"
    )
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="vocabulary size of the tokenizer (%(default)s)")
    parser.add_argument("--heldout", type=float, default=0.1, help="held-out share of documents (%(default)s)")
    return parser


def main() -> None:
    """Run the three steps; running it again changes nothing."""
    arguments = parse_arguments(build_parser())

    from mythos_dist.prepare.convert import convert
    from mythos_dist.prepare.corpus import read_documents, write_sample_chats, write_sample_corpus
    from mythos_dist.prepare.tokenizer_training import train_tokenizer

    work = Path(f"{os.path.abspath(arguments.out)}-source")
    corpus = write_sample_corpus(work / "corpus.parquet")
    write_sample_chats(work / "chats.jsonl")
    tokenizer = train_tokenizer(read_documents(corpus), work / "tokenizer.model", arguments.vocab_size)
    manifest = convert(corpus, tokenizer, arguments.seq_len, arguments.out, heldout=arguments.heldout)
    print(manifest.summary())
    print(f"{arguments.out}: shards with windows of {arguments.seq_len} tokens")


if __name__ == "__main__":
    run_command(main)
