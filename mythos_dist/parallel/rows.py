"""Gathering tokens into rows and summing rows per token, each the other's gradient, in an order that never changes.

`index_add` would do the sum, but on a GPU it adds in whatever order its threads run, and a resumed run would differ
from an uninterrupted one. `embedding_bag` adds a token's rows one after the other, in fp32, as it reads them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RowIndex(NamedTuple):
    """Which of M rows hold copies of which of N tokens; R of the rows are used, and a token may have none."""

    token: Tensor  # (M,) the token that each row is a copy of
    row: Tensor  # (R,) the used rows, grouped by token
    starts: Tensor  # (N,) where each token's rows start in `row`


def index_slots(token: Tensor, row: Tensor, is_used: Tensor | None = None, num_used: int | None = None) -> RowIndex:
    """The index of a table with one line per token and one column per slot.

    token (M,); row (N, s): the row of each slot; is_used (N, s) bool: which slots have one, None: all;
    num_used: how many have one, known on the host so that nothing waits for the GPU.
    """
    N, slots = row.shape
    if is_used is None:
        return RowIndex(token, row.flatten(), torch.arange(0, N * slots, slots, device=row.device))
    return RowIndex(token, row.flatten().index_select(0, nonzero_no_sync(is_used, num_used)), row_starts(is_used))


def nonzero_no_sync(mask: Tensor, count: int | None) -> Tensor:
    """Flat indices of the `count` true elements of a bool tensor, in order: (count,). `nonzero` waits for the GPU."""
    return mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:count]


def row_starts(is_used: Tensor) -> Tensor:
    """Where each token's rows start when the used slots (N, s) are listed one after the other: (N,)."""
    per_token = is_used.sum(1)
    return per_token.cumsum(0) - per_token


def take_rows(x: Tensor, index: RowIndex) -> Tensor:
    """Copy each token's vector to its rows: (N, D) -> (M, D). Rows that are not in `index.row` get no gradient."""
    return _Take.apply(x, *index)


def sum_rows(y: Tensor, index: RowIndex) -> Tensor:
    """The sum of each token's rows: (M, D) -> (N, D)."""
    return _Sum.apply(y, *index)


def sum_rows_no_grad(y: Tensor, row: Tensor, starts: Tensor) -> Tensor:
    """`sum_rows` outside autograd."""
    with torch.no_grad():
        return F.embedding_bag(row, y, starts, mode="sum")


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, row: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(row, starts)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return sum_rows_no_grad(grad.contiguous(), *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, token: Tensor, row: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return sum_rows_no_grad(y.contiguous(), row, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None
