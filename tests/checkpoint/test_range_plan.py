"""A plan of byte ranges covers what is needed, exactly, with few more bytes, and puts it where it belongs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.checkpoint import range_plan
from mythos_dist.checkpoint.pieces import Piece, overlaps
from mythos_dist.checkpoint.range_plan import Copy, merge_ranges, plan_file


@st.composite
def pieces(draw, shape: tuple[int, ...]) -> Piece:
    """Any range of any shard."""
    box = [sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))) for n in shape]
    shard = tuple(high - low + 1 for low, high in box)
    first, last = sorted(draw(st.tuples(*[st.integers(0, math.prod(shard))] * 2)))
    return Piece(shard, tuple(low for low, _ in box), first, last)


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    return shape, draw(st.lists(st.tuples(pieces(shape), pieces(shape)), min_size=1, max_size=3))


def execute(plan, content: bytes) -> int:
    """Read the plan's parts from a file; returns the bytes read."""
    read = 0
    for begin, end in plan.parts():
        block = content[begin:end]
        assert len(block) == end - begin
        read += len(block)
        for low, target in plan.targets_in(begin, end):
            target[:] = block[low - begin : low - begin + len(target)]
    return read


@given(cases(), st.sampled_from([4, 64, 1 << 20]), st.sampled_from([1, 3, 1000]))
def test_every_element_arrives_in_its_place_once(case, part_bytes, many):
    """Pieces of a few tensors that lie in a file one after the other, against copies of single elements."""
    shape, pairs = case
    full = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    content, begins, copies, expected, outs = b"\0" * 24, [], [], [], []
    for i, (source, target) in enumerate(pairs):
        begins.append(len(content))
        flat = full[tuple(slice(low, low + n) for low, n in zip(source.start, source.shape, strict=True))].reshape(-1)
        content += (flat[source.first : source.last] + 1000 * i).tobytes()
        out = np.full(target.last - target.first, -1, np.float32)
        outs.append(out)
        want = out.copy()
        held = {tuple(index): value for index, value in indexed(source, flat)}
        for at, (index, _) in enumerate(indexed(target, None)):
            if tuple(index) in held:
                want[at] = held[tuple(index)] + 1000 * i
        expected.append(want)
        copies.append([Copy(str(i), a, out, b) for a, b in overlaps(source, target, shape)])
    flat_copies = [copy for of_tensor in copies for copy in of_tensor]
    flat_begins = [begin for begin, of_tensor in zip(begins, copies, strict=True) for _ in of_tensor]
    if not flat_copies:
        return
    before = range_plan.PART_BYTES, range_plan.MANY_REQUESTS
    range_plan.PART_BYTES, range_plan.MANY_REQUESTS = part_bytes, many
    try:
        plan = plan_file("file", flat_copies, flat_begins)
        merge_ranges([plan])
        read = execute(plan, content)
    finally:
        range_plan.PART_BYTES, range_plan.MANY_REQUESTS = before
    for out, want in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, want)
    assert plan.needed == 4 * sum(int((want >= 0).sum()) for want in expected) <= read <= len(content)
    if many == 1000:
        assert read <= 1.05 * plan.needed


def indexed(piece: Piece, flat):
    """The index in the full tensor of each element of a piece, and its value."""
    for at in range(piece.first, piece.last):
        index = np.unravel_index(at, piece.shape) if piece.shape else ()
        full = tuple(int(i) + low for i, low in zip(index, piece.start, strict=True))
        yield full, None if flat is None else flat[at]


@pytest.mark.parametrize("width", [2, 200])
def test_many_small_gaps_are_joined_rather_than_requested_one_by_one(width):
    """Half of each of 3000 rows: two of three gaps are joined, since a request per row would be slower."""
    rows = 3000
    shape, half = (rows, width), (rows, width // 2)
    source, target = Piece.full(shape), Piece(half, (0, 0), 0, math.prod(half))
    out = np.empty(target.last, np.float32)
    ((a, b),) = overlaps(source, target, shape)
    plan = plan_file("file", [Copy("t", a, out, b)], [0])
    merge_ranges([plan])
    assert len(plan.blocks) <= 1000
    assert execute(plan, np.arange(math.prod(shape), dtype=np.float32).tobytes()) < 2 * plan.needed
    np.testing.assert_array_equal(out.reshape(half), np.arange(math.prod(shape)).reshape(shape)[:, : width // 2])
