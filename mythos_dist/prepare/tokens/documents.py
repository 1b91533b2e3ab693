"""The documents of a span of a source, without EOS.

A document ends at each EOS token, and at the end of its row if rows are documents (files.py: ends_at_rows); an EOS at
the end of a row is one end, not two. A span has the documents that begin in it, so neighboring spans share none and
miss none; the last of them may be read far beyond the span's end.

Decisions: DATA-23.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mythos_dist.data.manifest import TokenRules
from mythos_dist.prepare.inputs import reading
from mythos_dist.prepare.spans import Span
from mythos_dist.prepare.tokens.files import check_ids, ends_at_rows, open_rows
from mythos_dist.prepare.tokens.rows import RowBlock, Rows

LONG_TOKENS = 1 << 20  # a longer document is read in pieces


class Documents(NamedTuple):
    """Complete documents, concatenated: `tokens` uint32 (n,) without EOS, `ends` int64 (k,).

    Without ends, the tokens are a piece of a long document, whose first piece has more than LONG_TOKENS; the first
    document of the next item that has ends is its last piece. `had_eos` bool (k,): whether an EOS ended the document.
    `size`: bytes that were read for this item.
    """

    tokens: np.ndarray
    ends: np.ndarray
    had_eos: np.ndarray
    size: int


class _Ends(NamedTuple):
    """Where documents end in a block, ascending, where the next ones begin, and whether an EOS is between."""

    ends: np.ndarray
    nexts: np.ndarray
    had_eos: np.ndarray


def read_token_documents(span: Span, rules: TokenRules, eos_id: int, vocab_size: int) -> Iterator[Documents]:
    """The documents that begin in a span. Raises UserError for a token id outside the vocabulary, with its position."""
    with reading(span.source):
        rows, by_rows = open_rows(span.source, rules), ends_at_rows(span.source, rules)
        reader = _SpanReader(rows, by_rows, eos_id, vocab_size, _begins_document(rows, span.first, by_rows, eos_id))
        for block in rows.blocks(span.first, span.last):
            yield from reader.add(block)
        beyond = rows.blocks(span.last, rows.num_units)
        while reader.in_document and (block := next(beyond, None)):
            yield from reader.add(block, only_first=True)
        yield from reader.end_document()


def _begins_document(rows: Rows, unit: int, by_rows: bool, eos_id: int) -> bool:
    """Whether no document continues across the beginning of a unit."""
    return (by_rows and rows.starts_row(unit)) or rows.token_before(unit) in (None, eos_id)


class _SpanReader:
    """Joins the pieces of documents in consecutive blocks."""

    def __init__(self, rows: Rows, by_rows: bool, eos_id: int, vocab_size: int, begins_document: bool):
        self._rows, self._by_rows, self._eos_id, self._vocab_size = rows, by_rows, eos_id, vocab_size
        self._skipping = not begins_document  # up to the end of a document of the span before
        self._rest = np.empty(0, np.uint32)  # the beginning of a document that continues in the next block
        self._is_long = False  # a part of that document has been returned

    @property
    def in_document(self) -> bool:
        return self._is_long or len(self._rest) > 0

    def add(self, block: RowBlock, only_first: bool = False) -> Iterator[Documents]:
        """The documents that end in a block; `only_first`: only the one that began before it."""
        tokens, ends = self._valid(block), self._ends(block)
        start, size = 0, block.tokens.nbytes
        if self._skipping and len(ends.ends):
            start, self._skipping = int(ends.nexts[0]), False
            ends = _Ends(*(one[1:] for one in ends))
        elif self._skipping:
            self._skipping = not block.ends_stream
            return
        if only_first and len(ends.ends):
            ends = _Ends(*(one[:1] for one in ends))
            tokens = tokens[: ends.nexts[0]]
        yield from self._divide(tokens[start:], _Ends(ends.ends - start, ends.nexts - start, ends.had_eos), size)
        if block.ends_stream:
            yield from self.end_document()

    def end_document(self) -> Iterator[Documents]:
        """The document that has not ended, at the end of its stream."""
        if self.in_document:
            here = np.zeros(1, np.int64)
            yield from self._divide(np.empty(0, np.uint32), _Ends(here, here, np.zeros(1, bool)), 0)

    def _divide(self, tokens: np.ndarray, ends: _Ends, size: int) -> Iterator[Documents]:
        """The documents of `tokens`, of which the first continues `_rest`."""
        after = int(ends.nexts[-1]) if len(ends.nexts) else 0
        if len(ends.ends):
            starts = np.concatenate([[0], ends.nexts[:-1]])
            lengths = ends.ends - starts
            lengths[0] += len(self._rest)
            done = tokens[:after]
            content = np.concatenate([self._rest, done[done != self._eos_id]])
            self._rest, self._is_long = np.empty(0, np.uint32), False
            yield Documents(content, np.cumsum(lengths), ends.had_eos, size)
            size = 0
        self._rest = np.concatenate([self._rest, tokens[after:]])
        if len(self._rest) > (0 if self._is_long else LONG_TOKENS):
            rest, self._rest, self._is_long = self._rest, self._rest[:0], True
            yield Documents(rest, np.empty(0, np.int64), np.empty(0, bool), size)

    def _ends(self, block: RowBlock) -> _Ends:
        eos = np.flatnonzero(block.tokens == self._eos_id)
        rows = block.ends if self._by_rows else block.ends[:0]
        if len(rows):
            is_empty = rows == np.concatenate([[0], rows[:-1]])
            # A row that ends with EOS has been ended by it.
            rows = rows[is_empty | (block.tokens[rows - 1] != self._eos_id)] if len(block.tokens) else rows
        ends = np.concatenate([rows, eos])
        order = np.argsort(ends, kind="stable")  # a row's end precedes an EOS that the next row begins with
        had_eos = np.concatenate([np.zeros(len(rows), bool), np.ones(len(eos), bool)])[order]
        return _Ends(ends[order], ends[order] + had_eos, had_eos)

    def _valid(self, block: RowBlock) -> np.ndarray:
        """The tokens of a block as uint32. Raises UserError for an id outside the vocabulary."""
        check_ids(block, self._vocab_size, self._rows.source)
        return block.tokens.astype(np.uint32)
