"""Types of command-line arguments that the checkpoint tools share."""

from argparse import ArgumentTypeError
from pathlib import Path


def positive_int(text: str) -> int:
    """An integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return int(text)


def nonempty_path(text: str) -> Path:
    """A path. An empty one is refused: it comes from an unset shell variable, and would mean the current folder."""
    if not text.strip():
        raise ArgumentTypeError("is empty; name a folder")
    return Path(text)
