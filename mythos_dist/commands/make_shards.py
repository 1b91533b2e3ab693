"""Convert text to MDS shards with a manifest, ready for `data.path`.

Input: parquet, JSON lines or plain text (also .gz, .zst, .bz2, .xz): files, folders, patterns and URLs. With
--format chat: JSON lines of conversations (`messages`, or `prompt` and `completion`), to learn what the assistant says.
The same command resumes an interrupted conversion. The shards are the same bytes at any number of workers.
"""

import argparse
import os
from pathlib import Path

from mythos_dist.config.arguments import number, parse_arguments
from mythos_dist.errors import run_command
from mythos_dist.prepare.command import add_conversion_options, add_text_options, run_conversion

OPTIONS = "heldout compression skip_bad max_unpack_ratio workers quiet scratch".split()  # passed to convert() unchanged


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_text_options(parser)
    add("--tokenizer", required=True, type=Path, help="a SentencePiece model, or a Hugging Face tokenizer.json")
    add("--seq-len", required=True, type=int, help="tokens per window; one more is stored, for the labels")
    add("--dedup", action="store_true", help="keep only the first of equal documents (reads the input twice)")
    add("--min-score", type=number(-1e300, 1e300), help="leave out documents with a lower `score` column")
    add("--format", choices=("text", "chat"), default="text", help="documents, or conversations (%(default)s)")
    add("--template", help="of conversations: a Jinja file, or plain; default: the tokenizer's own")
    add("--sample-by", choices=("document", "line"), default="document", help="what a document of plain text is")
    add("--skip-bad", action="store_true", help="skip unreadable input, and list it in the manifest")
    add_conversion_options(parser, heldout_of="text")
    return parser


def main() -> None:
    """Convert; the exit code is 0, 2 for a user error, or 130 after Ctrl-C."""
    arguments = parse_arguments(build_parser())
    # Arrow's own allocator keeps freed memory; a worker would keep the memory of its largest document.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # DATA-15
    from mythos_dist.data.chat_template import renderer_of
    from mythos_dist.data.manifest import Filters, ShardManifest
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.prepare.convert import convert
    from mythos_dist.prepare.spans import Columns

    def run() -> ShardManifest:
        tokenizer = Tokenizer.load(arguments.tokenizer, arguments.eos)
        chat = renderer_of(arguments.format, tokenizer, arguments.template)
        return convert(
            *(arguments.input, tokenizer, arguments.seq_len, arguments.out),
            filters=Filters(arguments.min_score, arguments.min_tokens, arguments.limit_tokens, arguments.dedup),
            columns=Columns(arguments.text_column, sample_by=arguments.sample_by, chat=chat),
            **{name: getattr(arguments, name) for name in OPTIONS},
        )

    run_conversion(run, arguments)


if __name__ == "__main__":
    run_command(main)
