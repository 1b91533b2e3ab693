"""Read the lines of a file, and the text in a line of JSON, without a second copy of a very long line.

A span of a file has the lines that begin in it, so neighboring spans share no line and miss none. Python's json uses
two or four bytes per character of a string; in a long line, string literals therefore stay bytes and are unescaped in
pieces.
"""

import codecs
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mythos_dist.prepare.encoding import BOM
from mythos_dist.prepare.inputs import READ_BYTES, Source, read_source

LONG_BYTES = 1 << 20  # a longer document or line is processed in pieces
MAX_LINE_BYTES = 2 << 30  # a line is held in memory
NOT_JSON_LINES = "JSON lines have one record per line; convert an array with: jq -c '.[]' FILE"

CHAT = "conversations are converted with --format chat"
BLANK = object()  # the value of a line without one

# A lone surrogate becomes a byte that is not UTF-8 and is later repaired like any other.
codecs.register_error("mythos_dist.invalid", lambda error: (b"\xff" * (error.end - error.start), error.end))  # type: ignore


class LineText(NamedTuple):
    """A document (bytes, or a function that reads a long one in pieces from its start) and its score or NaN."""

    content: "bytes | bytearray | Callable[[], Iterator[bytes]]"
    score: float


def read_lines(source: Source, first: int, last: int) -> Iterator[tuple[int, bytes | bytearray | None]]:
    """(position, line without its end) of the lines that begin in bytes `first` to `last` of the unpacked file.

    The line is None if it has more than MAX_LINE_BYTES. A compressed file is read from its start to its end: `first`
    is 0 and `last` has no effect. Raises what `read_source` raises.
    """
    begin = max(0, first - 1)  # the byte before the span shows whether a line ends there
    position, foreign = begin, first > 0  # foreign: this line belongs to the previous span
    line = bytearray()  # the beginning of a line that continues in the next piece
    dropped = 0  # bytes of a line that is too long
    for piece in read_source(source, begin):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            full: bytes | bytearray = end
            if line:
                line += end
                full, line = line, bytearray()
            size = dropped + len(full) + 1
            if not foreign:
                yield position, None if dropped else _without_marks(full, position)
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
    """`line` without the \\r before its end and the byte order mark at the beginning of the file."""
    if position == 0 and line.startswith(BOM):
        line = line[len(BOM) :]
    return line.removesuffix(b"\r") if not is_last and line.endswith(b"\r") else line


_counted: tuple[Any, int, int] = (None, 0, 0)  # file, bytes counted from its start, line ends in them


def lines_before(source: Source, position: int) -> int:
    """The number of lines of a local, uncompressed file before the one at `position`. Counting resumes where the last
    call ended, so that a large file with many bad lines is read only once more."""
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


def parse_json_line(line: bytes | bytearray, text_key: str, score_key: str | None) -> LineText | None:
    """The text of a JSON line; None if the line is blank. Raises ValueError with the problem."""
    line = _without_mark(line)
    literals: list[tuple[int, int]] = []  # positions of the long strings of a long line
    record = load_json(line if len(line) <= LONG_BYTES else _without_long_strings(line, literals))
    if record is BLANK:
        return None
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        hint = f"; {NOT_JSON_LINES}" if isinstance(record, list) else ""
        if isinstance(record, dict) and ("messages" in record or {"prompt", "completion"} <= record.keys()):
            hint = f"; {CHAT}"
        raise ValueError(f"no key {text_key!r}; there is: {keys:.200}{hint}")
    text, number = record[text_key], parse_score_of(record, score_key)
    if literals and isinstance(text, dict) and "\0" in text:
        start, end = literals[text["\0"]]
        content = lambda: _unescaped(memoryview(line)[start:end])  # noqa: E731
        for _ in content():  # find an invalid escape now
            pass
        return LineText(content, number)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"key {text_key!r} holds {type(text).__name__}, not text")
    return LineText((text or "").encode("utf-8", "mythos_dist.invalid"), number)


def load_json(line: bytes | bytearray) -> Any:
    """The value in a JSON line; BLANK if the line is blank. Raises ValueError with the problem."""
    line = _without_mark(line)
    if not line or line.isspace():
        return BLANK
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        hint = f"; {NOT_JSON_LINES}" if line.strip() in (b"[", b"{") else ""
        raise ValueError(f"not JSON ({error}){hint}") from None


def _without_mark(line: bytes | bytearray) -> bytes | bytearray:
    """`line` without a byte order mark, in the middle of a file that was concatenated from several."""
    return line[len(BOM) :] if line.startswith(BOM) else line


def parse_score_of(record: dict[str, Any], key: str | None) -> float:
    """The score of a record; NaN without `key`. Raises ValueError if it is not a number."""
    try:
        return parse_score(record.get(key)) if key else float("nan")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"key {key!r}: {error}") from None


def parse_score(score: Any) -> float:
    """A score as a number: true is 1, "4.5" is 4.5, null and "" are NaN. Raises ValueError for anything else."""
    if score is None or (isinstance(score, str) and not score.strip()):
        return float("nan")
    if isinstance(score, str) and "_" not in score:
        with contextlib.suppress(ValueError):
            return float(score)
    elif isinstance(score, (bool, int, float)):
        return float(score)
    raise ValueError(f"{score!r:.40} is not a number")


def _without_long_strings(line: bytes | bytearray, literals: list[tuple[int, int]]) -> bytes:
    """`line` with {"\\0": index} in place of each long string; appends the positions inside their quotes to
    `literals`."""
    kept, done = [], 0
    for start, end in _strings(line):
        if end - start > LONG_BYTES // 4:
            kept += [line[done : start - 1], b'{"\\u0000": %d}' % len(literals)]
            literals.append((start, end))
            done = end + 1
    return b"".join([*kept, line[done:]])


def _strings(line: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Start and end of each JSON string, inside its quotes. (A regular expression would keep a state per escape.)"""
    start = line.find(b'"') + 1
    while start:
        end = line.find(b'"', start)
        while end >= 0 and _is_escaped(line, end):
            end = line.find(b'"', end + 1)
        if end < 0:
            return
        yield start, end
        start = line.find(b'"', end + 1) + 1


def _is_escaped(line: bytes | bytearray, position: int) -> bool:
    first = position
    while line[first - 1] == ord("\\"):
        first -= 1
    return (position - first) % 2 == 1


def _unescaped(literal: memoryview) -> Iterator[bytes]:
    """The text of a JSON string, in pieces that end at spaces: no escape, and no pair of escapes, contains one."""
    start = 0
    while start < len(literal):
        end = start + LONG_BYTES
        while end < len(literal) and (space := bytes(literal[end : end + LONG_BYTES]).find(b" ")) != 0:
            end += space if space > 0 else LONG_BYTES
        text = json.loads(f'"{str(literal[start:end], "utf-8", "surrogateescape")}"')
        yield text.encode("utf-8", "mythos_dist.invalid")
        start = end
