"""Copying tokens to rows and summing rows to tokens, each the other's gradient, in an order that never changes.

`index_add` would do the second, but on a GPU it adds in whatever order its threads arrive, and a resumed run would
differ from an undisturbed one.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Places(NamedTuple):
    """Where N tokens lie among M rows, at most s rows to a token."""

    token: Tensor  # (M,) the token that a row is a copy of
    row: Tensor  # (N, s) the rows that count for a token; M where a slot is empty
    holes: bool  # whether slots may be empty


def take_rows(x: Tensor, places: Places) -> Tensor:
    """Each token's vector in its rows: (N, D) -> (M, D). Rows that `row` does not name get no gradient."""
    return _Take.apply(x, *places)


def sum_rows(y: Tensor, places: Places) -> Tensor:
    """The sum of each token's rows: (M, D) -> (N, D)."""
    return _Sum.apply(y, *places)


def _sum(y: Tensor, row: Tensor, holes: bool) -> Tensor:
    if holes:
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])
    if row.shape[1] == 1:
        return y.index_select(0, row.flatten())
    return y.index_select(0, row.flatten()).view(*row.shape, y.shape[1]).sum(1)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, row: Tensor, holes: bool) -> Tensor:
        ctx.save_for_backward(row)
        ctx.holes = holes
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (row,) = ctx.saved_tensors
        return _sum(grad, row, ctx.holes), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, token: Tensor, row: Tensor, holes: bool) -> Tensor:
        ctx.save_for_backward(token)
        return _sum(y, row, holes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None
