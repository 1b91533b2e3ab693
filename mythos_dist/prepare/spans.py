"""Divide input files into chunks, and name consecutive chunks (spans) so that they can be read independently.

A chunk is a row group of a parquet file, or the lines that begin in a range of bytes of a JSON-lines or text file. A
compressed file, and a text file that is one document, is one chunk. Chunks of token files: tokens/rows.py.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mythos_dist.data.chat import ChatRenderer
from mythos_dist.data.manifest import TokenRules
from mythos_dist.errors import UserError
from mythos_dist.prepare.encoding import WrongEncoding
from mythos_dist.prepare.inputs import Source, read_source, reading
from mythos_dist.prepare.names import KIND_NAMES
from mythos_dist.prepare.parquet import open_parquet, schema_problem

TEXT_CHUNK_BYTES = 4 << 20
TYPICAL_RATIO = 4  # of text to its compressed size: for progress bars and the size of parts only


@dataclass(frozen=True)
class Columns:
    """The columns (or JSON keys) of text and, if needed, score; and whether plain text is one document per line."""

    text: str = "text"
    score: str | None = None
    sample_by: Literal["document", "line"] = "document"  # of plain text: each file or each line is a document
    chat: ChatRenderer | None = None  # JSON lines hold conversations, which this renders
    tokens: TokenRules | None = None  # the inputs are token files of other trainers


@dataclass(frozen=True)
class Span:
    """Consecutive chunks of one file: [first, last) in row groups or bytes. `size`: bytes of text (an estimate for
    compressed files)."""

    source: Source
    first: int
    last: int
    size: int


class Chunks(NamedTuple):
    """The chunks of a file: chunk i is [edges[i], edges[i + 1]) and holds sizes[i] bytes of text.

    Arrays, because a corpus may have millions of row groups.
    """

    source: Source
    edges: np.ndarray  # int64 (n + 1,): row groups, or bytes
    sizes: np.ndarray  # int64 (n,)

    def span(self, first: int, last: int) -> Span:
        """The span of chunks `first` to `last - 1`."""
        return Span(self.source, int(self.edges[first]), int(self.edges[last]), int(self.sizes[first:last].sum()))


def divide_file(source: Source, columns: Columns) -> Chunks:
    """The chunks of a file. Raises UserError if it does not have the format of its name, or lacks a column."""
    if columns.chat and source.kind != "jsonl":
        raise UserError(f"is {KIND_NAMES[source.kind]}; conversations are read from JSON lines only", source.path)
    if source.kind == "parquet":
        return _divide_parquet(source, columns)
    _check_text(source)
    if source.kind == "text" and columns.score:
        raise UserError(f"plain text has no {columns.score}; leave it out, or do not filter by score", source.path)
    if source.compression or (source.kind == "text" and columns.sample_by == "document"):
        size = source.size * (TYPICAL_RATIO if source.compression else 1)
        return Chunks(source, np.array([0, source.size]), np.array([size]))
    edges = np.append(np.arange(0, source.size, TEXT_CHUNK_BYTES), source.size)
    return Chunks(source, edges, np.diff(edges))


def _divide_parquet(source: Source, columns: Columns) -> Chunks:
    with reading(source), open_parquet(source) as parquet:
        if problem := schema_problem(parquet.schema_arrow, columns.text, columns.score):
            raise UserError(problem, source.path)
        footer = parquet.metadata
        column = [footer.schema.column(i).path for i in range(footer.num_columns)].index(columns.text)
        sizes = [footer.row_group(i).column(column).total_uncompressed_size for i in range(footer.num_row_groups)]
    return Chunks(source, np.arange(len(sizes) + 1), np.array(sizes, np.int64))


def _check_text(source: Source) -> None:
    """Raises UserError for problems that a file's size and first bytes show. (Not for a remote file: its first
    megabytes would be transferred twice.)"""
    if source.compression and not source.size:
        raise UserError(
            "is empty (0 bytes, and a compressed file has at least a header); it was not written or copied "
            "completely: fetch it again",
            source.path,
        )
    if not source.remote:
        try:
            next(read_source(source), b"")
        except WrongEncoding as error:
            raise UserError(str(error), source.path) from None
        except OSError:
            return  # reported with its line when the file is read
