"""Documents out of input files, in spans that can be read apart, a few megabytes in memory at a time.

A span is a run of row groups of a parquet file, or the lines that begin in a range of bytes of a JSON-lines or text
file (compressed files are one span each). Text is handled as UTF-8 bytes end to end, without a Python string per
document; what is not valid UTF-8 is repaired here: invalid bytes and lone surrogates become U+FFFD.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from mythos_dist.errors import UserError
from mythos_dist.prepare.encoding import BOM, WrongEncoding
from mythos_dist.prepare.inputs import Source, read_text, reading, too_large
from mythos_dist.prepare.lines import (
    LONG_BYTES,
    MAX_LINE_BYTES,
    Text,
    lines_before,
    read_lines,
    text_of_json,
)
from mythos_dist.prepare.parquet import numbers_of, open_parquet, plain_texts, schema_problem

BATCH_BYTES = 4 << 20  # text that is handed on at a time
TEXT_SPAN_BYTES = 4 << 20  # lines are divided at this grain
PACKED_RATIO = (
    4  # text is about so many times as large as its compressed file; for progress bars and shares of work only
)


@dataclass(frozen=True)
class Columns:
    """What is read: the column (or JSON key) of the text, that of the score if it is needed, and how text is cut."""

    text: str = "text"
    score: str | None = None
    sample_by: Literal["document", "line"] = "document"  # of plain text: a file, or a line, is a document


@dataclass(frozen=True)
class Span:
    """Units `first` up to `last` of one file, and the bytes of text in them (of compressed files: an estimate)."""

    source: Source
    first: int
    last: int
    size: int


class Batch(NamedTuple):
    """Whole documents, laid end to end: `data` uint8 valid UTF-8, `ends` int64 (n,), some of them perhaps empty."""

    data: np.ndarray
    ends: np.ndarray
    scores: np.ndarray | None  # float64 (n,), NaN where there is none
    repaired: np.ndarray  # bool (n,)


class LongDocument(NamedTuple):
    """A document of more than LONG_BYTES; `pieces()` reads it from its start, as bytes of any kind."""

    pieces: Callable[[], Iterable[bytes | memoryview]]
    score: float


Bad = Callable[[str, str], None]  # (where, reason): raises, or takes note that something was left out


class Units(NamedTuple):
    """Where a file may be divided: unit i goes from edges[i] to edges[i + 1] and holds sizes[i] bytes of text.

    Arrays, because a corpus may have millions of row groups.
    """

    source: Source
    edges: np.ndarray  # int64 (n + 1,): row groups, or bytes
    sizes: np.ndarray  # int64 (n,)

    def span(self, first: int, last: int) -> Span:
        """Units `first` to `last` as a span."""
        return Span(self.source, int(self.edges[first]), int(self.edges[last]), int(self.sizes[first:last].sum()))


def units_of(source: Source, columns: Columns) -> Units:
    """The units of a file. Raises UserError if it is not what its name says, or lacks a column."""
    if source.kind == "parquet":
        with reading(source), open_parquet(source) as parquet:
            if problem := schema_problem(parquet.schema_arrow, columns.text, columns.score):
                raise UserError(problem, source.path)
            footer = parquet.metadata
            column = [footer.schema.column(i).path for i in range(footer.num_columns)].index(columns.text)
            sizes = [footer.row_group(i).column(column).total_uncompressed_size for i in range(footer.num_row_groups)]
        return Units(source, np.arange(len(sizes) + 1), np.array(sizes, np.int64))
    _check_text(source)
    if source.kind == "text" and columns.score:
        raise UserError(f"plain text has no {columns.score}; leave it out, or do not choose by score", source.path)
    if source.compression or (source.kind == "text" and columns.sample_by == "document"):
        size = source.size * (PACKED_RATIO if source.compression else 1)
        return Units(source, np.array([0, source.size]), np.array([size]))
    edges = np.append(np.arange(0, source.size, TEXT_SPAN_BYTES), source.size)
    return Units(source, edges, np.diff(edges))


def _check_text(source: Source) -> None:
    """Raises UserError for what can be known from a file's size and beginning. (A remote file is not asked for it: its
    first megabytes would be sent twice.)"""
    if source.compression and not source.size:
        what = "0 bytes, and a compressed file has at least a header"
        raise UserError(f"is empty ({what}); it was not written or copied whole: fetch it again", source.path)
    if not source.remote:
        try:
            next(read_text(source), b"")
        except WrongEncoding as error:
            raise UserError(str(error), source.path) from None
        except OSError:
            return  # found again, and named with its line, when the file is read


def read_span(span: Span, columns: Columns, bad: Bad) -> Iterator[Batch | LongDocument]:
    """The documents of a span in order. What cannot be read goes to `bad`; if that returns, reading goes on behind it.

    Raises whatever the file system raises if the file cannot be opened.
    """
    if span.source.kind == "parquet":
        yield from _read_parquet(span, columns, bad)
    elif span.source.kind == "text" and columns.sample_by == "document":
        yield from _read_text(span, bad)
    else:
        yield from _read_lines(span, columns, bad)


def unreadable(source: Source, where: str, reason: str, advice: str) -> UserError:
    """The error for what `read_span` calls bad: file:line, or the file and the place in it."""
    line = where.removeprefix("line ")
    path, what = (f"{source.path}:{line}", "") if line.isdigit() else (source.path, f"{where} ")
    return UserError(f"{what}cannot be read ({reason}); {advice}", path)


def valid_utf8(pieces: Iterable[bytes | memoryview]) -> Iterator[tuple[np.ndarray, bool]]:
    """Pieces of one document as (valid UTF-8 bytes, whether this piece was repaired); no character is cut in two."""
    repairs = 0

    def repair(error: UnicodeError) -> tuple[str, int]:
        nonlocal repairs
        repairs += 1
        return "\ufffd", error.end  # type: ignore[attr-defined]

    codecs.register_error("mythos_dist.repair", repair)
    decoder = codecs.getincrementaldecoder("utf-8")("mythos_dist.repair")
    for piece in chain(pieces, [b""]):
        before = repairs
        text = decoder.decode(bytes(piece), final=not piece)
        if text:
            yield np.frombuffer(text.encode(), np.uint8), repairs > before


def _read_parquet(span: Span, columns: Columns, bad: Bad) -> Iterator[Batch | LongDocument]:
    wanted = [columns.text, *([columns.score] if columns.score else [])]
    size, limit = 0, span.source.unpack_limit
    with open_parquet(span.source, columns.text, range(span.first, span.last)) as parquet:
        for group in range(span.first, span.last):
            footer = parquet.metadata.row_group(group)
            rows = max(1, int(BATCH_BYTES * footer.num_rows / max(1, footer.total_byte_size)))
            row = 0
            try:
                for batch in parquet.iter_batches(
                    min(rows, 1 << 14), row_groups=[group], columns=wanted, use_threads=False
                ):
                    column, scores = _with_scores(batch, columns, f"row group {group}", row, bad)
                    row += batch.num_rows
                    del batch
                    for first, texts in plain_texts(column, BATCH_BYTES):
                        size += texts.nbytes
                        if size > limit:
                            raise OSError(too_large(span.source, limit))
                        yield from _from_arrow(texts, None if scores is None else scores[first : first + len(texts)])
            except (pa.ArrowException, OSError) as error:
                bad(f"row group {group}", _one_line(error))


def _with_scores(
    batch: pa.RecordBatch, columns: Columns, where: str, row: int, bad: Bad
) -> tuple[Any, np.ndarray | None]:
    """The column of texts and the scores, without rows whose score is no number; `row` is the number of the first."""
    texts = batch.column(columns.text)
    if not columns.score:
        return texts, None
    scores, wrong = numbers_of(batch.column(columns.score))
    for i, reason in wrong.items():
        bad(f"{where}, row {row + i}", f"column {columns.score!r}: {reason}")
    right = np.delete(np.arange(len(scores)), list(wrong))
    return (texts.take(pa.array(right)), scores[right]) if wrong else (texts, scores)


def _from_arrow(texts: pa.LargeBinaryArray, scores: np.ndarray | None) -> Iterator[Batch | LongDocument]:
    _, offsets, content = texts.buffers()
    starts = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(content or b"", np.uint8)[starts[0] : starts[-1]]
    return _in_batches(data, starts[1:] - starts[0], scores)


def _read_text(span: Span, bad: Bad) -> Iterator[Batch | LongDocument]:
    """A whole file as one document."""
    source, begin, size = span.source, bytearray(), 0
    try:
        for piece in _whole_text(source):
            size += len(piece)
            if size <= LONG_BYTES:
                begin += piece
            elif source.compression is None:
                break  # otherwise to the end, to know before a word of it is used that it can be unpacked
    except (pa.ArrowException, OSError) as error:
        return bad("file", _one_line(error))
    if size > LONG_BYTES:
        yield LongDocument(lambda: _guarded(source), float("nan"))
    else:
        yield from _in_batches(np.frombuffer(begin, np.uint8), np.array([size]), None)


def _guarded(source: Source) -> Iterator[bytes]:
    with reading(source):
        yield from _whole_text(source)


def _whole_text(source: Source) -> Iterator[bytes]:
    """Without the byte order mark."""
    pieces = read_text(source)
    begin = b""
    while len(begin) < len(BOM) and (piece := next(pieces, b"")):
        begin += piece
    yield begin.removeprefix(BOM)
    yield from pieces


def _read_lines(span: Span, columns: Columns, bad: Bad) -> Iterator[Batch | LongDocument]:
    """Documents of the lines that begin in the span."""
    texts: list[bytes | bytearray] = []
    scores: list[float] = []
    size = 0
    for text, score in _texts_of_lines(span, columns, bad):
        if callable(text) or len(text) > LONG_BYTES:
            yield from _join(texts, scores)
            texts, scores, size = [], [], 0
            yield LongDocument(text if callable(text) else partial(_slices, memoryview(text)), score)
            continue
        texts.append(text)
        scores.append(score)
        size += len(text)
        if size >= BATCH_BYTES:
            yield from _join(texts, scores)
            texts, scores, size = [], [], 0
    yield from _join(texts, scores)


def _texts_of_lines(span: Span, columns: Columns, bad: Bad) -> Iterator[Text]:
    source, first, number = span.source, 0, 0  # of the span: where its first line begins; lines read

    def where(number: int) -> str:
        if source.remote and first:
            return f"line {number} after byte {first}"  # its lines are not counted: it would be read again
        return f"line {lines_before(source, first) + number}"

    try:
        for number, (position, line) in enumerate(read_lines(source, span.first, span.last), 1):
            first = first if number > 1 else position
            if line is None:
                bad(where(number), f"longer than {MAX_LINE_BYTES:,} bytes")
                continue
            if source.kind == "text":
                yield Text(line, float("nan"))
                continue
            try:
                text = text_of_json(line, columns.text, columns.score)
            except ValueError as error:
                bad(where(number), str(error))
                continue
            if text is not None:
                yield text
    except (pa.ArrowException, OSError) as error:
        bad(f"what follows {where(number)}" if number else "file", _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _join(texts: list[bytes | bytearray], scores: list[float]) -> Iterator[Batch | LongDocument]:
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return _in_batches(np.frombuffer(b"".join(texts), np.uint8), ends, np.array(scores, dtype=np.float64))


def _in_batches(data: np.ndarray, ends: np.ndarray, scores: np.ndarray | None) -> Iterator[Batch | LongDocument]:
    """Documents laid end to end, as batches of about BATCH_BYTES and long documents."""
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    first = 0
    while first < len(ends):
        if ends[first] - starts[first] > LONG_BYTES:
            text = data[starts[first] : ends[first]].data
            yield LongDocument(partial(_slices, text), float("nan") if scores is None else float(scores[first]))
            first += 1
            continue
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + BATCH_BYTES, "right")))
        long = np.flatnonzero(ends[first:last] - starts[first:last] > LONG_BYTES)
        last = first + int(long[0]) if len(long) else last
        some = data[starts[first] : ends[last - 1]]
        yield _repaired(some, ends[first:last] - starts[first], None if scores is None else scores[first:last])
        first = last


def _slices(text: memoryview) -> Iterator[memoryview]:
    return (text[i : i + LONG_BYTES] for i in range(0, len(text), LONG_BYTES))


def _repaired(data: np.ndarray, ends: np.ndarray, scores: np.ndarray | None) -> Batch:
    """A batch of valid UTF-8. Arrow checks it: each document by itself, a character may not reach into the next."""
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    try:
        pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(data)).validate(full=True)
        return Batch(data, ends, scores, np.zeros(len(ends), bool))
    except pa.ArrowInvalid:
        pass
    texts, repaired = [], []
    for start, end in zip(offsets[:-1], ends, strict=True):
        pieces = [(piece, mended) for piece, mended in valid_utf8([data[start:end].tobytes()])]
        texts.append(b"".join(piece.tobytes() for piece, _ in pieces))
        repaired.append(any(mended for _, mended in pieces))
    joined = np.frombuffer(b"".join(texts), np.uint8)
    return Batch(joined, np.cumsum([len(text) for text in texts], dtype=np.int64), scores, np.array(repaired))
