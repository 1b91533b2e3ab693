"""JSON from a file that is not trusted: bounded in size and depth, without duplicate names."""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

MAX_PROBLEMS = 8  # in a message


def read_regular_file(file: Path, limit: int) -> str:
    """A regular file's text. OSError; ValueError if it is not regular, longer than `limit` bytes, or not UTF-8."""
    with open(file, "rb", opener=open_nonblocking) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size} bytes; at most {limit} are allowed")
        return stream.read(limit + 1).decode("utf-8")


def open_nonblocking(path: str, flags: int) -> int:
    """An opener for `open`, which does not wait for the writer of a named pipe."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def parse_json(text: str | bytes) -> Any:
    """The value. ValueError if it is not JSON, has duplicate names, or is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_object_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, member in pairs:
        if name in value:
            raise ValueError(f"the name {shorten(name)} is in an object twice")
        value[name] = member
    return value


def depth_problem(value: Any, limit: int) -> str:
    """What is wrong with a value that is nested deeper than `limit`; empty: nothing."""
    level = [value]
    for _ in range(limit):
        next_level: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                next_level += outer.values()
            elif isinstance(outer, list):
                next_level += outer
        if not next_level:
            return ""
        level = next_level
    return f"is nested more than {limit} levels deep"


def validate(adapter: TypeAdapter[Any], raw: Any) -> Any:
    """`raw` as the adapter's type. ValueError that names every problem, up to MAX_PROBLEMS."""
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        lines = [f"{_path(one['loc'])}={shorten(one['input'])}: {_plain(one['msg'])}" for one in errors[:MAX_PROBLEMS]]
        if len(errors) > MAX_PROBLEMS:
            lines.append(f"and {len(errors) - MAX_PROBLEMS} more")
        raise ValueError("; ".join(lines)) from None


def shorten(value: Any) -> str:
    """A value for a message: at most 60 characters, without control characters."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _path(location: Sequence[Any]) -> str:
    return ".".join(shorten(part)[1:-1] if isinstance(part, str) else str(part) for part in location) or "it"


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:].removesuffix(".")
