"""The one tensor that goes from each pipeline stage to the next."""

from collections.abc import Sequence

import torch
from torch import Tensor

Like = Sequence[tuple[torch.Size, torch.dtype]]  # shapes and dtypes of some tensors


def pack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Tensors of any dtypes as the bits of one flat tensor of `dtype`, none of them narrower than that; their gradients
    come back the same way.

    DeepSpeed runs backward once per tensor that stages exchange, so there is one. Nothing is rounded.
    """
    return _Pack.apply(dtype, *tensors)


def unpack(flat: Tensor, like: Like) -> list[Tensor]:
    """The tensors that `pack` was given, by their shapes and dtypes."""
    return list(_Unpack.apply(flat, tuple(like)))


def _wide_first(dtypes: Sequence[torch.dtype]) -> list[int]:
    """The order in which tensors are packed: then each begins at a multiple of its own item size."""
    return sorted(range(len(dtypes)), key=lambda i: -dtypes[i].itemsize)


def _to_bits(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    order = _wide_first([tensor.dtype for tensor in tensors])
    return torch.cat([tensors[i].contiguous().flatten().view(dtype) for i in order])


def _from_bits(flat: Tensor, like: Like) -> tuple[Tensor, ...]:
    order = _wide_first([dtype for _, dtype in like])
    sizes = [like[i][0].numel() * like[i][1].itemsize // flat.element_size() for i in order]
    parts = dict(zip(order, flat.split(sizes), strict=True))
    return tuple(parts[i].view(dtype).view(shape) for i, (shape, dtype) in enumerate(like))


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
        return tuple(part.clone() for part in _from_bits(flat, like))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        return _to_bits(grads, ctx.dtype), None
