"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (Zhang and Sennrich 2019).

On a GPU, PyTorch's fused kernel; on a CPU, where PyTorch has none, an autograd function that saves only its input, but
for inference, where launching it takes a third of the time, and a single row is normed by two operations.

Decisions: MODEL-13, DECODE-10.
"""

# N rows, D channels.

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mythos_dist.parallel.process import on_cpu

EPS = 1e-6
_ZERO = torch.zeros(())


def rms_normalize(x: Tensor, eps: float = EPS) -> Tensor:
    """RMSNorm of x (..., D) without a weight."""
    return _norm(x, None, eps)


class Norm(nn.Module):
    """RMSNorm with a weight per channel."""

    def __init__(self, dim: int, eps: float = EPS):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return _norm(x, self.weight, self.eps)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.device.type == "cpu" and not torch.is_inference_mode_enabled():
        return _RMSNorm.apply(x, weight, eps)
    if weight is not None and x.numel() == len(weight) and x.dtype == weight.dtype == torch.float32 and on_cpu(x):
        return _norm_row(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _norm_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of a single row, x (..., D) of D elements, as decoding has them: half the time of `F.rms_norm`."""
    row = x.reshape(-1)
    rstd = (torch.dot(row, row).item() / len(row) + eps) ** -0.5
    return torch.addcmul(_ZERO, x, weight, value=rstd)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        exact = x.float()
        rstd = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        normed = exact * rstd
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        scaled, grad_x, grad_weight = grad * normed, grad.float(), None  # fp32
        if weight is not None:
            grad_weight = scaled.flatten(0, -2).sum(0).to(weight.dtype)
            scaled, grad_x = scaled.mul_(weight), grad_x * weight
        grad_x = grad_x.sub(normed.mul_(scaled.mean(-1, keepdim=True))).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None
