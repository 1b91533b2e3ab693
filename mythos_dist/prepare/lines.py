"""Lines of a file, and the text in a line of JSON, without a second copy of lines as large as a book.

A span of a file has the lines that begin in it, so neighbouring spans share no line and lose none. Python's json makes
strings of two or four bytes a character; in a long line, string literals therefore stay bytes, and are unescaped in
pieces.
"""

import codecs
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mythos_dist.prepare.encoding import BOM
from mythos_dist.prepare.inputs import READ_BYTES, Source, read_text

LONG_BYTES = 1 << 20  # of a document or line that is handled in pieces
MAX_LINE_BYTES = 2 << 30  # a line is held in memory
ONE_DOCUMENT = "JSON lines hold one record a line; of an array they are made by: jq -c '.[]' FILE"

# A surrogate that stands alone becomes a byte that is not UTF-8, which is later repaired like any other.
codecs.register_error("mythos_dist.invalid", lambda error: (b"\xff" * (error.end - error.start), error.end))  # type: ignore


class Text(NamedTuple):
    """A document: bytes, or, where it is long, what reads it in pieces from its start; and its score or NaN."""

    content: "bytes | bytearray | Callable[[], Iterator[bytes]]"
    score: float


def read_lines(source: Source, first: int, last: int) -> Iterator[tuple[int, bytes | bytearray | None]]:
    """(where it begins, line without its end) of the lines that begin in bytes `first` to `last` of the unpacked file.

    None: a line of more than MAX_LINE_BYTES. A packed file has to be read from its start: `first` is 0 and `last` does
    not count. Raises what `read_text` does.
    """
    begin = max(0, first - 1)  # one byte earlier: is there a line's end before the span?
    position, foreign = begin, first > 0  # what comes first belongs to the span before
    line = bytearray()  # the beginning of a line that goes on in the next piece
    dropped = 0  # bytes of a line that is not kept
    for piece in read_text(source, begin):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            whole: bytes | bytearray = end
            if line:
                line += end
                whole, line = line, bytearray()
            size = dropped + len(whole) + 1
            if not foreign:
                yield position, None if dropped else _without_marks(whole, position)
            foreign, dropped = False, 0
            position += size
            if position >= last and source.compression is None:
                return
        line += rest
        if dropped or foreign or len(line) > MAX_LINE_BYTES:
            dropped += len(line)
            line = bytearray()
    if (line or dropped) and not foreign:
        yield position, None if dropped else _without_marks(line, position, is_last=True)


def _without_marks(line: bytes | bytearray, position: int, is_last: bool = False) -> bytes | bytearray:
    """Without the \\r before its end and the byte order mark at the file's beginning."""
    if position == 0 and line.startswith(BOM):
        line = line[len(BOM) :]
    return line.removesuffix(b"\r") if not is_last and line.endswith(b"\r") else line


_counted: tuple[Any, int, int] = (None, 0, 0)  # file, bytes of it from the start, line ends in these


def lines_before(source: Source, position: int) -> int:
    """How many lines of a local, unpacked file begin before the one at `position`. Counted on from the last call, so
    that many broken lines of a large file cost one more reading of it."""
    global _counted
    if position == 0:
        return 0
    status = os.stat(source.path)
    file = (source.path, status.st_size, status.st_mtime_ns)
    _, offset, count = _counted if _counted[0] == file and _counted[1] <= position else (file, 0, 0)
    with open(source.path, "rb") as stream:
        stream.seek(offset)
        while offset < position and (piece := stream.read(min(READ_BYTES, position - offset))):
            count += piece.count(b"\n")
            offset += len(piece)
    _counted = (file, offset, count)
    return count


def text_of_json(line: bytes | bytearray, text_key: str, score_key: str | None) -> Text | None:
    """The text of a JSON line; None if it is blank. Raises ValueError that says what is wrong with the line."""
    if line.startswith(BOM):  # of files that were joined, each with its own
        line = line[len(BOM) :]
    if not line or line.isspace():
        return None
    literals: list[tuple[int, int]] = []  # of a long line, where its long strings are; the rest is small
    skeleton = line if len(line) <= LONG_BYTES else _without_long_strings(line, literals)
    try:
        record = json.loads(skeleton.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        hint = f"; {ONE_DOCUMENT}" if line.strip() in (b"[", b"{") else ""
        raise ValueError(f"not JSON ({error}){hint}") from None
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        hint = f"; {ONE_DOCUMENT}" if isinstance(record, list) else ""
        raise ValueError(f"no key {text_key!r}; there is: {keys:.200}{hint}")
    text = record[text_key]
    try:
        number = parse_score(record.get(score_key)) if score_key else float("nan")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"key {score_key!r}: {error}") from None
    if literals and isinstance(text, dict) and "\0" in text:
        start, end = literals[text["\0"]]
        content = lambda: _unescaped(memoryview(line)[start:end])  # noqa: E731
        for _ in content():  # a wrong escape is found now
            pass
        return Text(content, number)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"key {text_key!r} holds {type(text).__name__}, not text")
    return Text((text or "").encode("utf-8", "mythos_dist.invalid"), number)


def parse_score(score: Any) -> float:
    """A score as a number: true is 1, "4.5" is 4.5, and nothing is NaN. Raises ValueError for anything else."""
    if score is None or (isinstance(score, str) and not score.strip()):
        return float("nan")
    if isinstance(score, str) and "_" not in score:
        with contextlib.suppress(ValueError):
            return float(score)
    elif isinstance(score, (bool, int, float)):
        return float(score)
    raise ValueError(f"{score!r:.40} is no number")


def _without_long_strings(line: bytes | bytearray, literals: list[tuple[int, int]]) -> bytes:
    """`line` with {"\\0": number} in place of each long string; `literals` takes the places between their quotes."""
    kept, done = [], 0
    for start, end in _strings(line):
        if end - start > LONG_BYTES // 4:
            kept += [line[done : start - 1], b'{"\\u0000": %d}' % len(literals)]
            literals.append((start, end))
            done = end + 1
    return b"".join([*kept, line[done:]])


def _strings(line: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Where JSON strings begin and end, between their quotes. (A regular expression keeps a state per escape.)"""
    start = line.find(b'"') + 1
    while start:
        end = line.find(b'"', start)
        while end >= 0 and _is_escaped(line, end):
            end = line.find(b'"', end + 1)
        if end < 0:
            return
        yield start, end
        start = line.find(b'"', end + 1) + 1


def _is_escaped(line: bytes | bytearray, place: int) -> bool:
    first = place
    while line[first - 1] == ord("\\"):
        first -= 1
    return (place - first) % 2 == 1


def _unescaped(literal: memoryview) -> Iterator[bytes]:
    """The text of a JSON string, in pieces. They are cut at spaces: no escape, and no pair of them, holds one."""
    start = 0
    while start < len(literal):
        end = start + LONG_BYTES
        while end < len(literal) and (space := bytes(literal[end : end + LONG_BYTES]).find(b" ")) != 0:
            end += space if space > 0 else LONG_BYTES
        text = json.loads(f'"{str(literal[start:end], "utf-8", "surrogateescape")}"')
        yield text.encode("utf-8", "mythos_dist.invalid")
        start = end
