"""Glob patterns over the components of a path: `*`, `?`, `[...]` in a name, and `**` for any number of folders.

While folders are walked, a set of *states* holds the indices of the components that may match the next name; the state
len(pattern) means that the full pattern has matched, so that everything below matches, too.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePath

START = frozenset({0})


def is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def split_pattern(path: str) -> tuple[str, list[str]]:
    """The folder before the first component that is a pattern (and not the name of an existing folder), and the
    components from there on. If no component is a pattern, the list is empty and the folder has no meaning."""
    parts = PurePath(path).parts
    base = parts[0]
    for i, part in enumerate(parts[1:], 1):
        is_last = i == len(parts) - 1
        if is_pattern(part) and (is_last or not os.path.isdir(os.path.join(base, part))):
            return base, list(parts[i:])
        base = os.path.join(base, part)
    return base, []


def advance(pattern: list[str], states: frozenset[int], name: str) -> frozenset[int]:
    """The states after a component called `name`; empty: nothing at or below it can match."""
    after = set()
    for state in _skip_any_depth(pattern, states):
        if state == len(pattern) or pattern[state] == "**":
            after.add(state)
        elif fnmatchcase(name, pattern[state]):
            after.add(state + 1)
    return _skip_any_depth(pattern, after)


def _skip_any_depth(pattern: list[str], states: Iterable[int]) -> frozenset[int]:
    """`states`, and those in which a `**` has matched no folder at all."""
    closure = set(states)
    for state in sorted(closure):
        while state < len(pattern) and pattern[state] == "**":
            state += 1
            closure.add(state)
    return frozenset(closure)


def names_hidden(pattern: list[str], name: str) -> bool:
    """Whether a component of the pattern matches the hidden `name` and has its first character literally, as in a
    shell."""
    return any(part[:1] == name[0] and fnmatchcase(name, part) for part in pattern)
