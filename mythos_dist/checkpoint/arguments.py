"""Types of command-line arguments that tools for checkpoints share."""

from argparse import ArgumentTypeError
from pathlib import Path


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def path(text: str) -> Path:
    """A path; an empty one is a variable that was not set, and would mean the current folder."""
    if not text.strip():
        raise ArgumentTypeError("is empty; name a folder")
    return Path(text)
