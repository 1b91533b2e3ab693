"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (Zhang and Sennrich 2019).

On a GPU, PyTorch's fused kernel; on a CPU, where PyTorch has none, an autograd function that saves only its input, but
for inference, where launching it takes a third of the time.

Decisions: MODEL-13.
"""

# N rows, D channels.

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-6


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
    return F.rms_norm(x, x.shape[-1:], weight, eps)


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
