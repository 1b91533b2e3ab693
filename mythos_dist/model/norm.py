"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (Zhang and Sennrich 2019)."""

# N rows, D channels.

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-6


class Norm(nn.Module):
    """On a GPU PyTorch's fused kernel; on a CPU, where it has none, one that keeps nothing but its input."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if x.device.type == "cpu":
            return _RMSNorm.apply(x, self.weight)
        return F.rms_norm(x, self.weight.shape, self.weight, EPS)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        exact = x.float()
        rstd = exact.square().mean(-1, keepdim=True).add_(EPS).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        return (exact * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        scaled = grad * normed  # fp32
        grad_weight = scaled.flatten(0, -2).sum(0)
        share = scaled.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad.float() * weight).sub_(normed.mul_(share)).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype)
