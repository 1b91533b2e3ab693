"""What the rows of the parity grid that are not long have in common with all that a layout and a kind can be."""

import itertools
import math
from typing import Any

import pytest
from helpers.parity import change
from helpers.parity_kinds import KINDS, RECOMPUTED, differences, parts
from helpers.parity_rows import GRID, LONG

from mythos_dist.config.layout import works

# An axis in each of its forms. `replicas`: those that nothing but the batch distinguishes.
FORMS: dict[str, dict[str, Any]] = {
    "replicas": {},
    "tensor": dict(tensor=2),
    "sequence": dict(tensor=2, sequence=True),
    "expert": dict(expert=2),
    "context": dict(context=2),
    "pipe": dict(pipe=2),
    "zero=2": dict(zero=2),
    "zero=3": dict(zero=3),
}
ONE_OF = [{"replicas"}, {"tensor", "sequence"}, {"expert"}, {"context"}, {"pipe"}, {"zero=2", "zero=3"}]
ONLY_PIPELINES = {"bare", "two loops"}  # of stages without any block, and of as many stages as there can be
Row = tuple[int, dict[str, Any], str]


def forms(ranks: int, parallel: dict[str, Any]) -> set[str]:
    """The axes of a layout."""
    at = {axis for axis in ("expert", "context", "pipe") if parallel.get(axis, 1) > 1}
    if parallel.get("tensor", 1) > 1:
        at.add("sequence" if parallel.get("sequence") else "tensor")
    if parallel.get("zero", 1) > 1:
        at.add(f"zero={parallel['zero']}")
    if ranks > math.prod(parallel.get(axis, 1) for axis in ("tensor", "context", "pipe")):
        at.add("replicas")
    return at


def is_part_of(part: str, kind: str) -> bool:
    """Whether a run of `kind` has all settings of `part`, under whatever name."""
    if not (KINDS | RECOMPUTED)[part]:
        return part in parts(kind) or part == "mla"
    of_kind = differences(kind)
    return all(
        of_kind.get(section, {}).items() >= fields.items() for section, fields in (KINDS | RECOMPUTED)[part].items()
    )


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(FORMS, 2)))
def test_every_two_axes_are_in_a_row(one, other, config):
    """Those that the rules of layouts allow together."""
    both = change(config, parallel={**FORMS[one], **FORMS[other]}, train=dict(global_batch=8, micro_batch=1))
    exclude_each_other = any({one, other} <= axis for axis in ONE_OF)
    assert (works(both, 8) and not exclude_each_other) == any(
        {one, other} <= forms(ranks, parallel) for ranks, parallel, _ in GRID
    )


@pytest.mark.parametrize("part", [*KINDS, *RECOMPUTED])
def test_every_kind_is_in_a_row_with_each_axis(part):
    """Tensor parallelism with or without `sequence`, and either of ZeRO 2 and 3, which a kind does not distinguish."""
    at = set().union(*(forms(ranks, parallel) for ranks, parallel, kind in GRID if is_part_of(part, kind)))
    assert "pipe" in at if part in ONLY_PIPELINES else all(at & axis for axis in ONE_OF)


def test_every_degree_of_an_axis_is_in_a_row():
    """Of a long one, in a short one."""

    def degrees(rows: list[Row]) -> set[tuple[str, Any]]:
        return {degree for _, parallel, _ in rows for degree in parallel.items()}

    assert degrees(LONG) <= degrees(GRID)


def test_rows_differ():
    rows = [str(row) for row in GRID + LONG]
    assert len(rows) == len(set(rows))
