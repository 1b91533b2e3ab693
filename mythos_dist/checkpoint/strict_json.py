"""JSON from a file that anybody may have written: bounded in size and depth, and no name twice."""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

MAX_PROBLEMS = 8  # shown of a file


def read_text(file: Path, limit: int) -> str:
    """A regular file's text. OSError; ValueError if it is of another kind, longer than `limit` bytes, or not UTF-8."""
    with open(file, "rb", opener=without_waiting) as stream:
        about = os.fstat(stream.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is not a regular file")
        if about.st_size > limit:
            raise ValueError(f"it has {about.st_size} bytes, and at most {limit} are read")
        return stream.read(limit + 1).decode("utf-8")


def without_waiting(path: str, flags: int) -> int:
    """An opener: a named pipe is opened without waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def parse(text: str | bytes) -> Any:
    """The value. ValueError if it is not JSON, holds a name twice, or is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_no_name_twice)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {shorten(twice)} is in an object twice")
    return found


def depth_problem(value: Any, limit: int) -> str:
    """What is wrong with a value that is nested deeper than `limit`; empty: nothing."""
    level = [value]
    for _ in range(limit):
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return ""
    return f"is nested more than {limit} levels deep"


def _members(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def validate(adapter: TypeAdapter[Any], raw: Any) -> Any:
    """`raw` as the adapter's type. ValueError that names every problem, up to MAX_PROBLEMS."""
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        lines = [f"{_place(one['loc'])}={shorten(one['input'])}: {_plain(one['msg'])}" for one in found[:MAX_PROBLEMS]]
        raise ValueError(joined(lines, len(found))) from None


def joined(lines: Sequence[str], count: int) -> str:
    """Problems on one line; `count` of them, if not all are given."""
    more = f"; and {count - len(lines)} more" if count > len(lines) else ""
    return "; ".join(lines) + more


def shorten(value: Any) -> str:
    """A value for a message: at most 60 characters, none that a terminal would obey."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(location: Sequence[Any]) -> str:
    return ".".join(shorten(part)[1:-1] if isinstance(part, str) else str(part) for part in location) or "it"


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:].removesuffix(".")
