"""Read the documents of a span of an input file, a few megabytes at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from mythos_dist.errors import UserError
from mythos_dist.prepare.batches import (
    BATCH_BYTES,
    Batch,
    LongDocument,
    batches_of_arrow,
    batches_of_bytes,
    batches_of_list,
    pieces_of,
)
from mythos_dist.prepare.conversations import parse_conversation
from mythos_dist.prepare.encoding import BOM
from mythos_dist.prepare.inputs import Source, read_source, reading, too_large
from mythos_dist.prepare.lines import LONG_BYTES, MAX_LINE_BYTES, LineText, lines_before, parse_json_line, read_lines
from mythos_dist.prepare.parquet import open_parquet, parse_scores, plain_texts
from mythos_dist.prepare.spans import Columns, Span

OnBad = Callable[[str, str], None]  # (where, reason): raises, or records that something was skipped


def read_span(span: Span, columns: Columns, on_bad: OnBad) -> Iterator[Batch | LongDocument]:
    """The documents of a span in order. What cannot be read is passed to `on_bad`; if that returns, it is skipped.

    Raises the file system's own error if the file cannot be opened.
    """
    if span.source.kind == "parquet":
        yield from _read_parquet(span, columns, on_bad)
    elif span.source.kind == "text" and columns.sample_by == "document":
        yield from _read_text(span, on_bad)
    else:
        yield from _read_lines(span, columns, on_bad)


def unreadable(source: Source, where: str, reason: str, advice: str) -> UserError:
    """The error for what `read_span` passes to `on_bad`; names file:line, or the file and the position in it."""
    line = where.removeprefix("line ")
    if line.isdigit():
        return UserError(f"cannot be read ({reason}); {advice}", f"{source.path}:{line}")
    return UserError(f"{where} cannot be read ({reason}); {advice}", source.path)


def _read_parquet(span: Span, columns: Columns, on_bad: OnBad) -> Iterator[Batch | LongDocument]:
    names = [columns.text]
    if columns.score:
        names.append(columns.score)
    size, limit = 0, span.source.unpack_limit
    with open_parquet(span.source, columns.text, range(span.first, span.last)) as parquet:
        for group in range(span.first, span.last):
            footer = parquet.metadata.row_group(group)
            rows = max(1, int(BATCH_BYTES * footer.num_rows / max(1, footer.total_byte_size)))
            row = 0
            try:
                for batch in parquet.iter_batches(
                    min(rows, 1 << 14), row_groups=[group], columns=names, use_threads=False
                ):
                    column, scores = _with_scores(batch, columns, f"row group {group}", row, on_bad)
                    row += batch.num_rows
                    del batch
                    for first, texts in plain_texts(column, BATCH_BYTES):
                        size += texts.nbytes
                        if size > limit:
                            raise OSError(too_large(span.source, limit))
                        yield from batches_of_arrow(
                            texts, None if scores is None else scores[first : first + len(texts)]
                        )
            except (pa.ArrowException, OSError) as error:
                on_bad(f"row group {group}", _one_line(error))


def _with_scores(
    batch: pa.RecordBatch, columns: Columns, where: str, first_row: int, on_bad: OnBad
) -> tuple[Any, np.ndarray | None]:
    """The texts and scores of a batch, without the rows whose score is not a number."""
    texts = batch.column(columns.text)
    if not columns.score:
        return texts, None
    scores, invalid = parse_scores(batch.column(columns.score))
    for i, reason in invalid.items():
        on_bad(f"{where}, row {first_row + i}", f"column {columns.score!r}: {reason}")
    if not invalid:
        return texts, scores
    valid = np.delete(np.arange(len(scores)), list(invalid))
    return texts.take(pa.array(valid)), scores[valid]


def _read_text(span: Span, on_bad: OnBad) -> Iterator[Batch | LongDocument]:
    """A complete file as one document."""
    # It is read to its end before any of it is used, so damage is found without a second pass.
    source, beginning, size = replace(span.source, only_intact=False), bytearray(), 0
    try:
        for piece in _text_without_mark(source):
            size += len(piece)
            if size <= LONG_BYTES:
                beginning += piece
            elif source.compression is None:
                break
            # A compressed file is read to its end: none of it is used if it cannot be unpacked completely.
    except (pa.ArrowException, OSError) as error:
        return on_bad("file", _one_line(error))
    if size > LONG_BYTES:
        yield LongDocument(lambda: _read_again(source), float("nan"))
    else:
        yield from batches_of_bytes(np.frombuffer(beginning, np.uint8), np.array([size]), None)


def _read_again(source: Source) -> Iterator[bytes]:
    with reading(source):
        yield from _text_without_mark(source)


def _text_without_mark(source: Source) -> Iterator[bytes]:
    """The text of a file without its byte order mark."""
    pieces = read_source(source)
    beginning = b""
    while len(beginning) < len(BOM):
        piece = next(pieces, b"")
        if not piece:
            break
        beginning += piece
    yield beginning.removeprefix(BOM)
    yield from pieces


def _read_lines(span: Span, columns: Columns, on_bad: OnBad) -> Iterator[Batch | LongDocument]:
    """A document for each line that begins in the span."""
    texts: list[bytes | bytearray] = []
    scores: list[float] = []
    size = 0
    for text, score in _texts_of_lines(span, columns, on_bad):
        if callable(text) or len(text) > LONG_BYTES:
            yield from batches_of_list(texts, scores)
            texts, scores, size = [], [], 0
            yield LongDocument(text if callable(text) else partial(pieces_of, memoryview(text)), score)
            continue
        texts.append(text)
        scores.append(score)
        size += len(text)
        if size >= BATCH_BYTES:
            yield from batches_of_list(texts, scores)
            texts, scores, size = [], [], 0
    yield from batches_of_list(texts, scores)


def _texts_of_lines(span: Span, columns: Columns, on_bad: OnBad) -> Iterator[LineText]:
    source = span.source
    first_byte = number = 0  # where the span's first line begins; lines read

    def where(number: int) -> str:
        if source.remote and first_byte:
            return f"line {number} after byte {first_byte}"  # to count earlier lines, they would be transferred again
        return f"line {lines_before(source, first_byte) + number}"

    try:
        for number, (position, line) in enumerate(read_lines(source, span.first, span.last), 1):
            if number == 1:
                first_byte = position
            if line is None:
                on_bad(where(number), f"longer than {MAX_LINE_BYTES:,} bytes")
                continue
            if source.kind == "text":
                yield LineText(line, float("nan"))
                continue
            try:
                if columns.chat:
                    text = parse_conversation(line, columns.chat, columns.score)
                else:
                    text = parse_json_line(line, columns.text, columns.score)
            except ValueError as error:
                on_bad(where(number), str(error))
                continue
            if text is not None:
                yield text
    except (pa.ArrowException, OSError) as error:
        on_bad(f"what follows {where(number)}" if number else "file", _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
