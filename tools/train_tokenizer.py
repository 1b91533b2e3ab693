"""Train a SentencePiece model with byte fallback on the texts of parquet files."""

import argparse
from pathlib import Path

from mythos_dist.errors import UserError, exit_with


def main() -> None:
    """Parse the command line and train; the same input gives the same file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, nargs="+", help="parquet files, folders or globs")
    parser.add_argument("--out", required=True, type=Path, help="the model file to write")
    parser.add_argument("--vocab-size", type=int, default=32000, help="(%(default)s)")
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which lines of a large input are used (%(default)s)")
    arguments = parser.parse_args()

    from mythos_dist.data.corpus import read_documents
    from mythos_dist.data.tokenizer import train_tokenizer

    try:
        tokenizer = train_tokenizer(
            read_documents(arguments.input),
            arguments.out,
            arguments.vocab_size,
            model_type=arguments.model_type,
            seed=arguments.seed,
        )
    except UserError as error:
        exit_with(error)
    print(f"{arguments.out}: {tokenizer.vocab_size} pieces")


if __name__ == "__main__":
    main()
