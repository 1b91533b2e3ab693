"""Rows of token ids of a source, read in order and in blocks of bounded size.

A source is a sequence of rows: the documents of an indexed file, the rows of a table, the samples of a shard. Spans of
a source are ranges of units, which each format chooses such that a unit is found without reading those before it: a
token of a flat file, a record batch, a shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mythos_dist.prepare.inputs import Source
from mythos_dist.prepare.spans import Chunks

BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows, concatenated.

    `tokens` (n,): of any integer dtype. `ends` int64 (k,): where rows end, ascending; what follows the last end
    continues in the next block, which then has at least one token of it. `row`: the index of the first row in its
    source; `offset`: how many of its tokens earlier blocks had. `ends_stream`: the next row continues no document of
    this one, although no EOS may show it.
    """

    tokens: np.ndarray
    ends: np.ndarray
    row: int
    offset: int = 0
    ends_stream: bool = False

    def position(self, index: int) -> str:
        """Where the token `tokens[index]` is, for messages; rows and tokens count from 0."""
        row = int(np.searchsorted(self.ends, index, "right"))
        start = int(self.ends[row - 1]) if row else -self.offset
        return f"row {self.row + row:,}, token {index - start:,}"


class Rows(Protocol):
    """An open source of one format."""

    source: Source
    num_units: int

    def check(self) -> None:
        """Check what a damaged, incomplete or foreign file gets wrong. Raises UserError with all problems."""
        ...

    def files(self) -> list[str]:
        """The paths of all files, in order."""
        ...

    def chunks(self) -> Chunks:
        """Ranges of units that can be converted independently, and their sizes in bytes of tokens."""
        ...

    def blocks(self, first: int, last: int) -> Iterator[RowBlock]:
        """The rows of units `first` to `last - 1`, in blocks of about BLOCK_TOKENS."""
        ...

    def starts_row(self, unit: int) -> bool:
        """Whether a row starts with this unit."""
        ...

    def token_before(self, unit: int) -> int | None:
        """The last token of its stream before a unit; None if there is none."""
        ...


def blocks_of(tokens: np.ndarray, ends: np.ndarray, row: int, ends_stream: bool = False) -> Iterator[RowBlock]:
    """Divide complete rows, `tokens` (n,) that end at `ends` (k,), into blocks; `row`: the index of the first."""
    for start in range(0, max(1, len(tokens)), BLOCK_TOKENS):
        stop = min(start + BLOCK_TOKENS, len(tokens))
        # Rows that end at `start` were in the block before: only the first block may begin with an empty row.
        low = int(np.searchsorted(ends, start, "right")) if start else 0
        high = int(np.searchsorted(ends, stop, "right"))
        offset = start - (int(ends[low - 1]) if low else 0)
        last = stop == len(tokens)
        yield RowBlock(tokens[start:stop], ends[low:high] - start, row + low, offset, ends_stream and last)
