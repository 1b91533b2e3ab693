"""Convert the token files of other trainers to MDS shards with a manifest, ready for `data.path`.

Sources: Megatron's .bin and .idx (a prefix, or a folder of them), nanotron's nanosets (.ds, or a folder of them), data
sets that Hugging Face's `datasets` saved with save_to_disk, folders of MDS that MosaicML's MDSWriter wrote. Those of a
URL (s3://, gs://, hf://, https:// …) are copied to --scratch first, and removed when the import is complete.

A document ends at each EOS token and, but for MDS, at each document or row of the source (--documents). The same
command resumes an interrupted import. The shards are the same bytes at any number of workers.
"""

import argparse
import os
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments, path_text
from mythos_dist.errors import run_command
from mythos_dist.prepare.command import add_conversion_options, run_conversion

OPTIONS = "heldout compression workers quiet scratch".split()  # passed to convert() unchanged


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", type=path_text, metavar="SOURCE", help="prefixes, files or folders, or URLs of them")
    add("--tokenizer", required=True, type=Path, help="that the tokens are of: a SentencePiece model or tokenizer.json")
    add("--seq-len", type=int, default=4096, help="tokens per window; one more is stored, for the labels (%(default)s)")
    add("--format", default="auto", help="auto, megatron, nanoset, datasets or mds (%(default)s)")
    add("--documents", default="auto", help="what ends one: stored (rows and EOS), eos (EOS only), auto (%(default)s)")
    add("--column", help="of token ids (default: input_ids or tokens)")
    add("--bytes-dtype", default="int64", help="of an MDS column of bytes: int64, int32, uint32, uint16 (%(default)s)")
    add_conversion_options(parser, heldout_of="documents")
    return parser


def main() -> None:
    """Import; the exit code is 0, 2 for a user error, or 130 after Ctrl-C."""
    arguments = parse_arguments(build_parser())
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # DATA-15
    from mythos_dist.data.manifest import Filters, ShardManifest, TokenRules
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.prepare.convert import convert
    from mythos_dist.prepare.spans import Columns

    def run() -> ShardManifest:
        rules = TokenRules(arguments.format, arguments.documents, arguments.column, arguments.bytes_dtype)
        return convert(
            *(arguments.sources, Tokenizer.load(arguments.tokenizer, arguments.eos), arguments.seq_len, arguments.out),
            filters=Filters(min_tokens=arguments.min_tokens, limit_tokens=arguments.limit_tokens),
            columns=Columns(tokens=rules),
            **{name: getattr(arguments, name) for name in OPTIONS},
        )

    run_conversion(run, arguments)


if __name__ == "__main__":
    run_command(main)
