"""Collectives over one axis that autograd differentiates. Over an axis of size 1 each of them is the identity.

Their names say what the forward pass does; each docstring says what the backward does. Megatron-LM (Shoeybi et al.
2019; Korthikanti et al. 2022 for the sequence-parallel pair) calls them f, g, and g with a bar.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.parallel.mesh import Axis, Mesh


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    out = x.contiguous().clone()
    dist.all_reduce(out, group=axis.group)
    return out


def _all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty(axis.size * front.shape[0], *front.shape[1:])
    dist.all_gather_into_tensor(out, front, group=axis.group)
    return out.movedim(0, dim)


def _reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty(front.shape[0] // axis.size, *front.shape[1:])
    dist.reduce_scatter_tensor(out, front, group=axis.group)
    return out.movedim(0, dim)


def _own_part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _all_reduce(grad, ctx.axis), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, dim, partial):
        ctx.axis, ctx.dim, ctx.partial = axis, dim, partial
        return _all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        back = _reduce_scatter if ctx.partial else _own_part
        return back(grad, ctx.axis, ctx.dim), None, None, None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, dim):
        ctx.axis, ctx.dim = axis, dim
        return _reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _all_gather(grad, ctx.axis, ctx.dim), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, axis, send, receive):
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return _all_to_all(rows, axis, send, receive)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _all_to_all(grad, ctx.axis, ctx.receive, ctx.send), None, None, None


def _all_to_all(rows: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=axis.group)
    return out


def _run(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


# Traced by torch.compile, a message's gradient came out wrong. `torch.compiler.disable` would import torch._dynamo here
# (900 modules, 1.2 s), which tools do not need; this form of it imports at the first call.
_apply: Any = torch._disable_dynamo(_run)


def copy(x: Tensor, axis: Axis) -> Tensor:
    """x, the same on every rank, for work that is divided over the axis; backward sums the parts of its gradient."""
    return x if axis.size == 1 else _apply(_Copy, x, axis)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's part, on every rank; backward hands the gradient on as it is."""
    return x if axis.size == 1 else _apply(_Sum, x, axis)


def all_gather(x: Tensor, axis: Axis, dim: int, *, partial: bool = True) -> Tensor:
    """Every rank's part, side by side along `dim`.

    partial: ranks differentiate different work with it, so backward sums and scatters (reduce-scatter); otherwise all
    of them get the same gradient, and backward takes this rank's part of it.
    """
    return x if axis.size == 1 else _apply(_Gather, x, axis, dim, partial)


def all_gather_many(parts: list[Tensor], axis: Axis, dim: int, *, partial: bool = True) -> list[Tensor]:
    """`gather` of several tensors with one message."""
    if axis.size == 1:
        return parts
    flat = all_gather(torch.cat([part.flatten() for part in parts]), axis, 0, partial=partial).view(axis.size, -1)
    columns = flat.split([part.numel() for part in parts], dim=1)
    return [
        torch.cat([row.view_as(part) for row in column.unbind(0)], dim)
        for part, column in zip(parts, columns, strict=True)
    ]


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum over the ranks; backward gathers."""
    return x if axis.size == 1 else _apply(_SumScatter, x, axis, dim)


def all_to_all(rows: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
    """Rows sorted by the rank they go to, `send[r]` to rank r -> those that came, `receive[r]` from rank r."""
    return rows if axis.size == 1 else _apply(_Exchange, rows, axis, send, receive)


def enter_tensor_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    """Into work that is divided over the tensor axis: (B, S or S / tensor, ...) -> (B, S, ...), whole on every rank."""
    return all_gather(x, mesh.tensor, 1) if mesh.sequence else copy(x, mesh.tensor)


def leave_tensor_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    """Out of it: every rank's partial sum (B, S, ...) -> the sum, (B, S / tensor, ...) with sequence parallelism."""
    return reduce_scatter(x, mesh.tensor, 1) if mesh.sequence else all_reduce(x, mesh.tensor)
