"""Copying tokens to rows and summing rows to tokens, each the other's gradient, in an order that never changes.

`index_add` would do the second, but on a GPU it adds in whatever order its threads arrive, and a resumed run would
differ from an undisturbed one. `embedding_bag` adds a token's rows one after the other, in fp32, as it reads them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RowIndex(NamedTuple):
    """Where N tokens lie among M rows; R of the rows count, and a token may have none."""

    token: Tensor  # (M,) the token that a row is a copy of
    row: Tensor  # (R,) the rows that count, token after token
    starts: Tensor  # (N,) where each token's rows begin in `row`


def index_slots(token: Tensor, row: Tensor, filled: Tensor | None = None, n_filled: int | None = None) -> RowIndex:
    """RowIndex from a table with one column per slot.

    token (M,); row (N, s): the row of each slot; filled (N, s) bool: whether a slot has one, None: all do;
    n_filled: how many do, known on the host so that nothing waits for the GPU.
    """
    N, slots = row.shape
    if filled is None:
        return RowIndex(token, row.flatten(), torch.arange(0, N * slots, slots, device=row.device))
    return RowIndex(token, row.flatten().index_select(0, nonzero_no_sync(filled, n_filled)), row_starts(filled))


def nonzero_no_sync(filled: Tensor, n_filled: int | None) -> Tensor:
    """Where a table of bool is true, in its own order: (n_filled,). Unlike `nonzero` it does not wait for the GPU."""
    return filled.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:n_filled]


def row_starts(filled: Tensor) -> Tensor:
    """Where each token's rows begin when its filled slots (N, s) lie one after the other: (N,)."""
    per_token = filled.sum(1)
    return per_token.cumsum(0) - per_token


def take_rows(x: Tensor, places: RowIndex) -> Tensor:
    """Each token's vector in its rows: (N, D) -> (M, D). Rows that `row` does not name get no gradient."""
    return _Take.apply(x, *places)


def sum_rows(y: Tensor, places: RowIndex) -> Tensor:
    """The sum of each token's rows: (M, D) -> (N, D)."""
    return _Sum.apply(y, *places)


def sum_rows_no_grad(y: Tensor, row: Tensor, starts: Tensor) -> Tensor:
    """`sum_rows` that autograd does not see."""
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
