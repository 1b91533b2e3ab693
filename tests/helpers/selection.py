"""Tables of cases that share a launch: which of them were selected, and which are long."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def selected(request: pytest.FixtureRequest, name: str) -> set[Any]:
    """Values of the parameter `name` in the selected tests of the file that asks."""
    here = (item for item in request.session.items if item.path == request.path)
    return {item.callspec.params.get(name) for item in here if hasattr(item, "callspec")}


def by_ranks(short: Mapping[int, Sequence[str]], long: Mapping[int, Sequence[str]]) -> list[Any]:
    """Cases (number of ranks, its rows) for `parametrize`; those of `long` are marked so, and have no setting alone."""
    settings, others = (
        {word for rows in table.values() for row in rows for word in row.split()} for table in (short, long)
    )
    assert others <= settings, f"only in rows that are long: {others - settings}"
    return [
        *(pytest.param(ranks, rows, id=f"{ranks}") for ranks, rows in short.items()),
        *(pytest.param(ranks, rows, id=f"{ranks} more", marks=pytest.mark.long) for ranks, rows in long.items()),
    ]
