"""Gathering tokens into rows, and summing rows per token."""

import pytest
import torch
from helpers.selection import first_is_quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_dist.parallel.rows import RowIndex, index_slots, sum_rows, take_rows


@st.composite
def placements(draw) -> tuple[RowIndex, int]:
    """An index of 1 to 6 tokens, and the number of rows in use; a token may have no row, or up to one per slot.

    Rows and slots are in any order, and rows that no slot refers to may follow those in use.
    """
    N, slots = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    filled = [draw(st.integers(0, slots)) for _ in range(N)]
    token = draw(st.permutations([n for n in range(N) for _ in range(filled[n])]))
    unnamed = draw(st.integers(0, 2))
    M = len(token) + unnamed
    row = torch.full((N, slots), M)
    free = {n: draw(st.permutations(range(slots))) for n in range(N)}
    for m, n in enumerate(token):
        row[n, free[n].pop()] = m
    tokens = torch.tensor([*token, *[0] * unnamed], dtype=torch.int64)
    if all(count == slots for count in filled) and draw(st.booleans()):
        return index_slots(tokens, row), len(token)
    return index_slots(tokens, row, row < M, len(token)), len(token)


def spread(N: int, slots: int) -> RowIndex:
    """Each token in `slots` rows: `slots` copies of all tokens, as if each were sent to `slots` ranks."""
    return index_slots(torch.arange(N).repeat(slots), torch.arange(N * slots).view(slots, N).T)


@given(placements(), st.integers(1, 5), st.integers(0, 2**31))
def test_taking_rows_is_index_select(case, width, seed):
    """Forward exactly; backward against index_add in float64, without the rows that no slot refers to."""
    index, real = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(index.starts.shape[0], width, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(len(index.token), width, generator=generator, dtype=torch.float64)
    rows = take_rows(x, index)
    assert torch.equal(rows, x.index_select(0, index.token))
    (gradient,) = torch.autograd.grad(rows, x, direction)
    expected = torch.zeros_like(gradient).index_add(0, index.token[:real], direction[:real])
    torch.testing.assert_close(gradient, expected)


@given(placements(), st.integers(1, 5), st.integers(0, 2**31))
def test_summing_rows_is_index_add(case, width, seed):
    """Forward against index_add in float64; backward copies a token's gradient to its rows."""
    index, real = case
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(len(index.token), width, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(index.starts.shape[0], width, generator=generator, dtype=torch.float64)
    sums = sum_rows(y, index)
    zeros = torch.zeros(index.starts.shape[0], width, dtype=torch.float64)
    torch.testing.assert_close(sums, zeros.index_add(0, index.token[:real], y[:real]))
    (gradient,) = torch.autograd.grad(sums, y, direction)
    assert torch.equal(gradient[:real], direction.index_select(0, index.token[:real]))


@pytest.mark.parametrize("unused_slots", [True, False])
def test_empty_rows(unused_slots):
    """A rank that sends or receives nothing: empty rows, zero sums, zero gradients.

    Without unused slots there are no rows only if there are no tokens.
    """
    N = 3 if unused_slots else 0
    none = torch.zeros(0, dtype=torch.int64)
    table = torch.zeros(N, 2, dtype=torch.int64)
    index = (
        index_slots(none, table, torch.zeros(N, 2, dtype=torch.bool), 0) if unused_slots else index_slots(none, table)
    )
    x = torch.randn(N, 4, requires_grad=True)
    y = torch.randn(0, 4, requires_grad=True)
    rows, sums = take_rows(x, index), sum_rows(y, index)
    assert rows.shape == (0, 4)
    assert torch.equal(sums, torch.zeros(N, 4))
    (rows.sum() + sums.sum()).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, torch.zeros(N, 4))
    assert y.grad.shape == (0, 4)


def test_a_row_that_is_not_finite_affects_only_its_token():
    """Unused slots are not added at all: adding zero times a row would give NaN."""
    index = RowIndex(torch.tensor([1, 1]), row=torch.tensor([0, 1]), starts=torch.tensor([0, 0]))
    sums = sum_rows(torch.tensor([[float("inf")], [float("nan")]]), index)
    assert sums[0].item() == 0.0
    assert sums[1].isnan()


class Ops(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def forward_and_backward(x: Tensor, direction: Tensor, index: RowIndex) -> list[Tensor]:
    """Sums and gradients through both functions."""
    x = x.clone().requires_grad_()
    sums = sum_rows(take_rows(x, index), index)
    return [sums.detach(), *torch.autograd.grad(sums, x, direction)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", first_is_quick([torch.float32, torch.bfloat16]))
def test_sums_are_bitwise_reproducible(dtype, threads):
    """Twenty times, with one thread and with two. On a GPU atomic additions are in arbitrary order, so no operation may
    scatter and add or be nondeterministic by PyTorch's documentation."""
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(700, 64, generator=generator).to(dtype) for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Ops() as ops:
            first = forward_and_backward(x, direction, spread(700, 5))
        assert not {name for name in ops.names if "add" in name and name != "add"}
        assert not ops.names & {"index_put", "scatter_reduce", "embedding_dense_backward", "index_select_backward"}
        for _ in range(20):
            again = forward_and_backward(x, direction, spread(700, 5))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_order_of_a_sum_is_the_order_of_the_slots():
    """Wherever the rows are: 1e8 + 1 - 1e8 in fp32 depends on the order, and equal slots give equal sums."""
    values = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    sums = set()
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [2, 3, 1, 0]):
        where = torch.tensor(order)  # the row of each slot
        rows = torch.empty(4, 1).index_copy(0, where, values)
        sums.add(sum_rows(rows, index_slots(torch.zeros(4, dtype=torch.int64), where.view(1, 4))).item())
    assert len(sums) == 1
