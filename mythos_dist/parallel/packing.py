"""Packing: the tensors that one pipeline stage sends to the next travel as one flat tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

Like = Sequence[tuple[torch.Size, torch.dtype]]  # shapes and dtypes of some tensors


def pack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The bits of all tensors in one flat tensor of `dtype`, which must not be wider than any of theirs.

    Nothing is rounded; gradients are packed the same way on their way back. One tensor, because DeepSpeed calls
    backward once for each tensor that a stage sends.
    """
    return _Pack.apply(dtype, *tensors)


def unpack(flat: Tensor, like: Like) -> list[Tensor]:
    """The tensors that were packed, given their shapes and dtypes."""
    return list(_Unpack.apply(flat, tuple(like)))


def _widest_first(dtypes: Sequence[torch.dtype]) -> list[int]:
    """The order of packing: it aligns each tensor to its own item size."""
    return sorted(range(len(dtypes)), key=lambda i: -dtypes[i].itemsize)


def _to_bits(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    order = _widest_first([tensor.dtype for tensor in tensors])
    return torch.cat([tensors[i].contiguous().flatten().view(dtype) for i in order])


def _from_bits(flat: Tensor, like: Like) -> tuple[Tensor, ...]:
    order = _widest_first([dtype for _, dtype in like])
    sizes = [like[i][0].numel() * like[i][1].itemsize // flat.element_size() for i in order]
    bits = dict(zip(order, flat.split(sizes), strict=True))
    return tuple(bits[i].view(dtype).view(shape) for i, (shape, dtype) in enumerate(like))


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return _to_bits(tensors, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return None, *_from_bits(grad.contiguous(), ctx.like)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat: Tensor, like: tuple[tuple[torch.Size, torch.dtype], ...]) -> tuple[Tensor, ...]:
        ctx.dtype = flat.dtype
        return tuple(tensor.clone() for tensor in _from_bits(flat, like))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        return _to_bits(grads, ctx.dtype), None
