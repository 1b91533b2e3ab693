"""Routed experts: E SwiGLU networks as three stacked tensors, dropless, and the backends that run them.

y[n] = sum over j of weights[n, j] * down_e(silu(gate_e(x[n])) * up_e(x[n])) with e = index[n, j].
Layout is MegaBlocks': (E, F, D) each, `down` transposed, so `(E * F, D)` is a view. Every expert's parameters get a
gradient, zero where no token came: an expert whose gradient is missing on one rank breaks the collective after it.
"""

# N tokens, D model, E experts, k experts per token, F hidden width of an expert, M rows, at least N * k.

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mythos_dist.config.schema import MythosConfig

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, times a weight per row if one is given. Keeps its inputs only and computes the rest again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
        """gate, up (..., F), weight (..., 1) or None -> (..., F)."""
        ctx.save_for_backward(gate, up, weight)
        out = F.silu(gate).mul_(up)
        return out if weight is None else out.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        gate, up, weight = ctx.saved_tensors
        active = F.silu(gate)
        grad_weight = None
        if weight is not None:
            grad_weight = (grad * active).mul_(up).sum(-1, keepdim=True)
            grad = grad * weight
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, active.mul_(grad), grad_weight


class _Dispatch(torch.autograd.Function):
    """Copy each token to the rows of its experts: (N, D) -> (M, D). Its gradient is `_Combine`, without atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.n = x.shape[0]
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).view(ctx.n, -1, grad.shape[-1]).sum(1), None, None


class _Combine(torch.autograd.Function):
    """Sum the rows of each token: (M, D) -> (N, D). Its gradient is `_Dispatch`."""

    @staticmethod
    def forward(ctx, y: Tensor, token: Tensor, inverse: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(token)
        return y.index_select(0, inverse).view(n, -1, y.shape[-1]).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None


def count_tokens(index: Tensor, n_experts: int) -> Tensor:
    """How many rows each expert gets: (N, k) -> (E,) int64. Unlike `bincount` it does not wait for the GPU."""
    flat = index.flatten()
    return torch.zeros(n_experts, dtype=torch.int64, device=index.device).scatter_add_(0, flat, torch.ones_like(flat))


class _Rows(NamedTuple):
    """Where each (token, slot) sits among the rows that the experts work on."""

    counts: Tensor  # (E,) int64: rows with a token
    ends: Tensor  # (E,) int32: where each expert's rows end, filling rows included
    token: Tensor  # (M,) whose vector a row holds; token 0 in filling rows
    weight: Tensor  # (M, 1) router weight; 0 in filling rows, so they add nothing, forward or backward
    inverse: Tensor  # (N * k,) the row of each (token, slot)


def _place_rows(weights: Tensor, index: Tensor, n_experts: int, dtype: torch.dtype) -> _Rows:
    """Sort (token, slot) pairs by expert. On a CPU in half precision each expert's rows are filled up to 16s.

    oneDNN compiles a kernel for every shape it has not met, and the router makes new ones all the time: bf16 products
    of 1..512 rows run at 36-123 GFLOP/s as they come and at 239-417 in multiples of 16 (256 x 128 and 512 x 512).
    """
    N, k = index.shape
    counts = count_tokens(index, n_experts)
    order = index.flatten().argsort(stable=True)  # token * k + slot, by expert
    row = torch.arange(N * k, device=index.device)
    if index.device.type != "cpu" or dtype == torch.float32:  # no filling, and no wait for a count
        inverse = torch.empty_like(order).scatter_(0, order, row)
        weight = weights.flatten().index_select(0, order)
        return _Rows(counts, counts.cumsum(0).to(torch.int32), order // k, weight.to(dtype).unsqueeze(-1), inverse)
    filled = (counts + 15) // 16 * 16
    shift = (filled - counts).cumsum(0) - (filled - counts)  # filling rows before each expert
    row = row + shift.repeat_interleave(counts)
    M = int(filled.sum())
    inverse = torch.empty_like(order).scatter_(0, order, row)
    token = order.new_zeros(M).scatter_(0, row, order // k)
    weight = weights.new_zeros(M).scatter(0, row, weights.flatten().index_select(0, order))
    return _Rows(counts, filled.cumsum(0).to(torch.int32), token, weight.to(dtype).unsqueeze(-1), inverse)


def grouped(x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, then one grouped matrix product each for gate, up and down."""
    N, D = x.shape
    width = gate.shape[1]
    rows = _place_rows(weights, index, gate.shape[0], x.dtype)
    align = 16 // x.element_size()  # grouped_mm wants rows of whole 16 bytes
    if D % align or width % align:
        x = F.pad(x, (0, -D % align))
        gate, up, down = (F.pad(w, (0, -D % align, 0, -width % align)) for w in (gate, up, down))

    xs = _Dispatch.apply(x, rows.token, rows.inverse)  # (N, D) -> (M, D)
    hidden = SwiGLU.apply(
        F.grouped_mm(xs, gate.transpose(-2, -1), offs=rows.ends),  # (M, D) -> (M, F)
        F.grouped_mm(xs, up.transpose(-2, -1), offs=rows.ends),
        rows.weight,  # weighting the hidden rows saves a pass over the wider output, and its copy for the backward
    )
    ys = F.grouped_mm(hidden, down, offs=rows.ends)  # (M, F) -> (M, D)
    return _Combine.apply(ys, rows.token, rows.inverse, N)[..., :D], rows.counts


def reference(
    x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """One expert after the other, for tests: what the other backends must equal."""
    y = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        token, slot = (index == e).nonzero(as_tuple=True)
        rows = x[token]
        out = (F.silu(rows @ gate[e].T) * (rows @ up[e].T)) @ down[e]
        y = y.index_add(0, token, out * weights[token, slot].to(x.dtype).unsqueeze(-1))
    return y, count_tokens(index, gate.shape[0])


BACKENDS: dict[str, Backend] = {"grouped": grouped, "reference": reference}


class Experts(nn.Module):
    """The stacked parameters of all routed experts and the backend that runs them."""

    def __init__(self, config: MythosConfig, backend: str):
        super().__init__()
        shape = (config.n_experts, config.expert_dim, config.dim)
        self.gate = nn.Parameter(torch.empty(shape))
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape))
        self.backend = BACKENDS[backend]

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, D), weights and index (N, k) -> y (N, D), rows per expert (E,) int64."""
        return self.backend(x, weights, index, self.gate, self.up, self.down)
