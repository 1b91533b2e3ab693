"""Which cases of a test `make check`, `make test` and `make test-all` run, and which are selected.

Decisions: PROJECT-3.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import settings


def selected(request: pytest.FixtureRequest, name: str, function: str = "") -> set[Any]:
    """Values of the parameter `name` in the selected tests of the requesting file, or of one function of it."""
    items = (item for item in request.session.items if item.path == request.path)
    items = (item for item in items if not function or item.originalname == function)
    return {item.callspec.params.get(name) for item in items if hasattr(item, "callspec")}


def by_ranks(short: Mapping[int, Sequence[str]], long: Mapping[int, Sequence[str]]) -> list[Any]:
    """Cases (number of ranks, rows) for `parametrize`; those of `long` get the mark `long`.

    Every setting in a long row must also be in a short one.
    """
    short_settings, long_settings = _settings(short), _settings(long)
    assert long_settings <= short_settings, f"only in long rows: {long_settings - short_settings}"
    return [
        *(pytest.param(ranks, rows, id=f"{ranks}") for ranks, rows in short.items()),
        *(pytest.param(ranks, rows, id=f"{ranks} more", marks=pytest.mark.long) for ranks, rows in long.items()),
    ]


def _settings(table: Mapping[int, Sequence[str]]) -> set[str]:
    return {setting for rows in table.values() for row in rows for setting in row.split()}


def first_is_quick(values: Iterable[Any]) -> list[Any]:
    """Values for `parametrize`: `make check` runs the first of them only."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.launch) for value in others)]


def examples(count: int) -> int:
    """`max_examples` of a test that needs `count` instead of Hypothesis's 100; `make check` draws a quarter."""
    return -(-count * settings.default.max_examples // 100)
