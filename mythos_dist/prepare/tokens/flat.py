"""Rows of one array of tokens on disk: a unit is a token, so that even a file of a single row has many spans."""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import numpy as np

from mythos_dist.prepare.inputs import Source
from mythos_dist.prepare.spans import TEXT_CHUNK_BYTES, Chunks
from mythos_dist.prepare.tokens.rows import BLOCK_TOKENS, RowBlock

FIRST_BLOCK_TOKENS = 1 << 14


class FlatRows(ABC):
    """Rows that are consecutive in one file. Arrays are mapped, not read."""

    def __init__(self, source: Source, tokens: np.ndarray, num_rows: int):
        self.source, self._tokens, self._num_rows = source, tokens, num_rows
        self.num_units = len(tokens)

    @abstractmethod
    def row_ends(self, low: int, high: int) -> np.ndarray:
        """int64: where rows `low` to `high - 1` end, in tokens."""

    def chunks(self) -> Chunks:
        step = TEXT_CHUNK_BYTES // self._tokens.itemsize
        edges = np.append(np.arange(0, self.num_units, step), self.num_units)
        return Chunks(self.source, edges, np.diff(edges) * self._tokens.itemsize)

    def blocks(self, first: int, last: int) -> Iterator[RowBlock]:
        # The first blocks are small: of what follows a span, only the rest of one document is needed.
        start, size = first, FIRST_BLOCK_TOKENS
        while start < last:
            stop = min(start + size, last)
            low = self._rows_until(start) if start else 0  # as in `blocks_of`
            ends = self.row_ends(low, self._rows_until(stop)) - start
            offset = start - (int(self.row_ends(low - 1, low)[0]) if low else 0)
            yield RowBlock(self._tokens[start:stop], ends, low, offset)
            start, size = stop, min(2 * size, BLOCK_TOKENS)

    def starts_row(self, unit: int) -> bool:
        return unit == 0 or bisect_left(range(self._num_rows), unit, key=self._end) < self._rows_until(unit)

    def token_before(self, unit: int) -> int | None:
        return int(self._tokens[unit - 1]) if unit else None

    def _end(self, row: int) -> int:
        return int(self.row_ends(row, row + 1)[0])

    def _rows_until(self, position: int) -> int:
        """How many rows end at `position` or before."""
        return bisect_right(range(self._num_rows), position, key=self._end)


def map_array(path: str, dtype: str, count: int, offset: int = 0) -> np.ndarray:
    """`count` values of a file from byte `offset` on, read-only and little-endian, without reading them."""
    if not count:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", offset, (count,))
