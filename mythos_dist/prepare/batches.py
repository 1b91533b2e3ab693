"""Documents as UTF-8 bytes: many short ones concatenated in a batch, or a long one in pieces.

There is no Python string per document. Invalid UTF-8 is repaired here: invalid bytes and lone surrogates become U+FFFD.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mythos_dist.prepare.lines import LONG_BYTES

BATCH_BYTES = 4 << 20  # text in a batch, approximately


class Batch(NamedTuple):
    """Complete documents, concatenated: `data` uint8, valid UTF-8; `ends` int64 (n,). Some may be empty."""

    data: np.ndarray
    ends: np.ndarray
    scores: np.ndarray | None  # float64 (n,), NaN where there is none
    repaired: np.ndarray  # bool (n,)


class LongDocument(NamedTuple):
    """A document of more than LONG_BYTES; each call of `pieces()` reads it from its start, as unchecked bytes."""

    pieces: Callable[[], Iterable[bytes | memoryview]]
    score: float


def valid_utf8(pieces: Iterable[bytes | memoryview]) -> Iterator[tuple[np.ndarray, bool]]:
    """Pieces of one document as (valid UTF-8 bytes, whether this piece was repaired), divided between characters."""
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


def batches_of_arrow(texts: pa.LargeBinaryArray, scores: np.ndarray | None) -> Iterator[Batch | LongDocument]:
    """An Arrow array of texts, without a copy."""
    _, offsets, content = texts.buffers()
    starts = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(content or b"", np.uint8)[starts[0] : starts[-1]]
    return batches_of_bytes(data, starts[1:] - starts[0], scores)


def batches_of_list(texts: list[bytes | bytearray], scores: list[float]) -> Iterator[Batch | LongDocument]:
    """A list of texts and their scores."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return batches_of_bytes(np.frombuffer(b"".join(texts), np.uint8), ends, np.array(scores, dtype=np.float64))


def batches_of_bytes(data: np.ndarray, ends: np.ndarray, scores: np.ndarray | None) -> Iterator[Batch | LongDocument]:
    """Divide concatenated documents (uint8; ends: int64 (n,)) into batches of about BATCH_BYTES and long documents."""
    starts = starts_of(ends)
    is_long = ends - starts > LONG_BYTES
    first = 0
    while first < len(ends):
        if is_long[first]:
            text = data[starts[first] : ends[first]].data
            yield LongDocument(partial(pieces_of, text), float("nan") if scores is None else float(scores[first]))
            first += 1
            continue
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + BATCH_BYTES, "right")))
        next_long = np.flatnonzero(is_long[first:last])
        if len(next_long):
            last = first + int(next_long[0])
        batch_data = data[starts[first] : ends[last - 1]]
        batch_scores = None if scores is None else scores[first:last]
        yield _repaired(batch_data, ends[first:last] - starts[first], batch_scores)
        first = last


def starts_of(ends: np.ndarray) -> np.ndarray:
    """The starts of documents laid end to end, int64 (n,), from their ends."""
    return np.concatenate([[0], ends[:-1]]).astype(np.int64)


def pieces_of(text: memoryview) -> Iterator[memoryview]:
    """`text` in pieces of LONG_BYTES."""
    return (text[i : i + LONG_BYTES] for i in range(0, len(text), LONG_BYTES))


def _repaired(data: np.ndarray, ends: np.ndarray, scores: np.ndarray | None) -> Batch:
    """A batch of valid UTF-8. Arrow checks each document by itself: a character may not continue in the next."""
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    try:
        pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(data)).validate(full=True)
        return Batch(data, ends, scores, np.zeros(len(ends), bool))
    except pa.ArrowInvalid:
        pass
    texts, repaired = [], []
    for start, end in zip(offsets[:-1], ends, strict=True):
        pieces = list(valid_utf8([data[start:end].tobytes()]))
        texts.append(b"".join(piece.tobytes() for piece, _ in pieces))
        repaired.append(any(piece_repaired for _, piece_repaired in pieces))
    joined = np.frombuffer(b"".join(texts), np.uint8)
    return Batch(joined, np.cumsum([len(text) for text in texts], dtype=np.int64), scores, np.array(repaired))
