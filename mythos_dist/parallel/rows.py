"""Copying tokens to rows and summing rows to tokens, each the other's gradient, in an order that never changes.

`index_add` would do the second, but on a GPU it adds in whatever order its threads arrive, and a resumed run would
differ from an undisturbed one. `embedding_bag` adds a token's rows one after the other, in fp32, as it reads them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Places(NamedTuple):
    """Where N tokens lie among M rows; R of the rows count, and a token may have none."""

    token: Tensor  # (M,) the token that a row is a copy of
    row: Tensor  # (R,) the rows that count, token after token
    starts: Tensor  # (N,) where each token's rows begin in `row`


def place_slots(token: Tensor, row: Tensor, filled: Tensor | None = None, n_filled: int | None = None) -> Places:
    """Places from a table with one column per slot.

    token (M,); row (N, s): the row of each slot; filled (N, s) bool: whether a slot has one, None: all do;
    n_filled: how many do, known on the host so that nothing waits for the GPU.
    """
    N, slots = row.shape
    if filled is None:
        return Places(token, row.flatten(), torch.arange(0, N * slots, slots, device=row.device))
    return Places(token, row.flatten().index_select(0, list_filled(filled, n_filled)), starts_of(filled))


def list_filled(filled: Tensor, n_filled: int | None) -> Tensor:
    """Where a table of bool is true, in its own order: (n_filled,). Unlike `nonzero` it does not wait for the GPU."""
    return filled.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:n_filled]


def starts_of(filled: Tensor) -> Tensor:
    """Where each token's rows begin when its filled slots (N, s) lie one after the other: (N,)."""
    per_token = filled.sum(1)
    return per_token.cumsum(0) - per_token


def take_rows(x: Tensor, places: Places) -> Tensor:
    """Each token's vector in its rows: (N, D) -> (M, D). Rows that `row` does not name get no gradient."""
    return _Take.apply(x, *places)


def sum_rows(y: Tensor, places: Places) -> Tensor:
    """The sum of each token's rows: (M, D) -> (N, D)."""
    return _Sum.apply(y, *places)


def add_rows(y: Tensor, row: Tensor, starts: Tensor) -> Tensor:
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
        return add_rows(grad.contiguous(), *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, token: Tensor, row: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return add_rows(y.contiguous(), row, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None
