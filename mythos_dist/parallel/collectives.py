"""Collectives over one axis that autograd differentiates. Over an axis of size 1 each of them is the identity.

Each is named after its forward pass; its docstring gives the backward pass. Megatron-LM (Shoeybi et al. 2019;
Korthikanti et al. 2022 for the sequence-parallel pair) calls them f, g, and g with a bar.
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


def _all_to_all(rows: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=axis.group)
    return out


def _local_chunk(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _all_reduce(grad, ctx.axis), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, dim, partial):
        ctx.axis, ctx.dim, ctx.partial = axis, dim, partial
        return _all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        back = _reduce_scatter if ctx.partial else _local_chunk
        return back(grad, ctx.axis, ctx.dim), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, dim):
        ctx.axis, ctx.dim = axis, dim
        return _reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _all_gather(grad, ctx.axis, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, axis, send, receive):
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return _all_to_all(rows, axis, send, receive)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _all_to_all(grad, ctx.axis, ctx.receive, ctx.send), None, None, None


def _run(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


# torch.compile must not trace these: the gradient of a traced collective was wrong. `torch.compiler.disable` would
# import torch._dynamo here (900 modules, 1.2 s), which tools do not need; this form imports it at the first call.
_apply: Any = torch._disable_dynamo(_run)


def copy(x: Tensor, axis: Axis) -> Tensor:
    """x, equal on every rank, before work that is divided over the axis; backward all-reduces the partial gradients."""
    return x if axis.size == 1 else _apply(_Copy, x, axis)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' partial results, on every rank; backward passes the gradient through unchanged."""
    return x if axis.size == 1 else _apply(_AllReduce, x, axis)


def all_gather(x: Tensor, axis: Axis, dim: int, *, partial: bool = True) -> Tensor:
    """The ranks' tensors concatenated along `dim`.

    partial: the ranks use the result for different work, so their gradients are partial sums and backward is a
    reduce-scatter. Otherwise every rank has the same gradient, and backward takes this rank's chunk of it.
    """
    return x if axis.size == 1 else _apply(_AllGather, x, axis, dim, partial)


def all_gather_many(tensors: list[Tensor], axis: Axis, dim: int, *, partial: bool = True) -> list[Tensor]:
    """`all_gather` of several tensors in one message."""
    if axis.size == 1:
        return tensors
    flat = all_gather(torch.cat([x.flatten() for x in tensors]), axis, 0, partial=partial).view(axis.size, -1)
    gathered = []
    for x, columns in zip(tensors, flat.split([x.numel() for x in tensors], dim=1), strict=True):
        gathered.append(torch.cat([row.view_as(x) for row in columns.unbind(0)], dim))
    return gathered


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's chunk along `dim` of the sum over the ranks; backward is an all-gather."""
    return x if axis.size == 1 else _apply(_ReduceScatter, x, axis, dim)


def all_to_all(rows: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
    """Rows sorted by destination, `send[r]` of them to rank r -> the received rows, `receive[r]` from rank r.

    Backward is the opposite all-to-all.
    """
    return rows if axis.size == 1 else _apply(_AllToAll, rows, axis, send, receive)


def sum_over_sequence(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum over the ranks that have other tokens of the same sequences; backward as `all_reduce`."""
    return all_reduce(all_reduce(x, mesh.tensor) if mesh.sequence else x, mesh.context)


def gather_rows(x: Tensor, axis: Axis) -> Tensor:
    """(n, D) -> (ranks * n, D), outside autograd."""
    return _all_gather(x, axis, 0)


def sum_and_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums (ranks * n, D) -> this rank's rows (n, D) of their sum, outside autograd."""
    return _reduce_scatter(x, axis, 0)


def enter_tensor_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    """Before work that is divided over the tensor axis: (B, S or S / tensor, ...) -> (B, S, ...) on every rank."""
    return all_gather(x, mesh.tensor, 1) if mesh.sequence else copy(x, mesh.tensor)


def leave_tensor_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    """After it: partial sums (B, S, ...) -> their sum, (B, S / tensor, ...) with sequence parallelism."""
    return reduce_scatter(x, mesh.tensor, 1) if mesh.sequence else all_reduce(x, mesh.tensor)
