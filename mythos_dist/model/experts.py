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
from mythos_dist.model.recompute import recomputed
from mythos_dist.parallel.expert import combine, dispatch
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.rows import Places, sum_rows, take_rows
from mythos_dist.parallel.tensor import cut_parameter

# (x, weights, index, gate, up, down, pairs) -> y. An index of E is an empty slot; `pairs` says how many are not empty,
# None that all are filled.
Backend = Callable[..., Tensor]


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


def count_tokens(index: Tensor, n_experts: int) -> Tensor:
    """How many rows each expert gets: (N, k) -> (E,) int64. Unlike `bincount` it does not wait for the GPU."""
    flat = index.flatten()
    return torch.zeros(n_experts, dtype=torch.int64, device=index.device).scatter_add_(0, flat, torch.ones_like(flat))


class _Rows(NamedTuple):
    """Where each (token, slot) sits among the rows that the experts work on."""

    ends: Tensor  # (E,) int32: where each expert's rows end, filling rows included
    places: Places
    weight: Tensor  # (M, 1) router weight; 0 in filling rows, so they add nothing, forward or backward


def _place_rows(weights: Tensor, index: Tensor, n_experts: int, pairs: int | None, dtype: torch.dtype) -> _Rows:
    """Sort (token, slot) pairs by expert. On a CPU in half precision each expert's rows are filled up to 16s.

    oneDNN compiles a kernel for every shape it has not met, and the router makes new ones all the time: bf16 products
    of 1..512 rows run at 36-123 GFLOP/s as they come and at 239-417 in multiples of 16 (256 x 128 and 512 x 512).
    """
    N, k = index.shape
    counts = filled = count_tokens(index, n_experts + 1)[:n_experts]
    order = index.flatten().argsort(stable=True)[:pairs]  # token * k + slot, by expert, empty slots last and cut off
    row = torch.arange(order.shape[0], device=index.device)
    M = order.shape[0]
    if index.device.type == "cpu" and dtype != torch.float32:
        filled = (counts + 15) // 16 * 16
        shift = (filled - counts).cumsum(0) - (filled - counts)  # filling rows before each expert
        row = row + shift.repeat_interleave(counts)
        M = int(filled.sum())
    rows_of_slots = order.new_full((N * k,), M).scatter_(0, order, row).view(N, k)
    token = order.new_zeros(M).scatter_(0, row, order // k)  # token 0 in filling rows
    weight = weights.new_zeros(M).scatter(0, row, weights.flatten().index_select(0, order))
    places = Places(token, rows_of_slots, holes=pairs is not None)
    return _Rows(filled.cumsum(0).to(torch.int32), places, weight.to(dtype).unsqueeze(-1))


def grouped(
    x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, pairs: int | None = None
) -> Tensor:
    """Rows sorted by expert, then one grouped matrix product each for gate, up and down."""
    D, width = x.shape[1], gate.shape[1]
    rows = _place_rows(weights, index, gate.shape[0], pairs, x.dtype)
    align = 16 // x.element_size()  # grouped_mm wants rows of whole 16 bytes
    if D % align or width % align:
        x = F.pad(x, (0, -D % align))
        gate, up, down = (F.pad(w, (0, -D % align, 0, -width % align)) for w in (gate, up, down))

    xs = take_rows(x, rows.places)  # (N, D) -> (M, D)
    hidden = SwiGLU.apply(
        F.grouped_mm(xs, gate.transpose(-2, -1), offs=rows.ends),  # (M, D) -> (M, F)
        F.grouped_mm(xs, up.transpose(-2, -1), offs=rows.ends),
        rows.weight,  # weighting the hidden rows saves a pass over the wider output, and its copy for the backward
    )
    ys = F.grouped_mm(hidden, down, offs=rows.ends)  # (M, F) -> (M, D)
    return sum_rows(ys, rows.places)[..., :D]


def reference(
    x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, pairs: int | None = None
) -> Tensor:
    """One expert after the other, for tests: what the other backends must equal."""
    y = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        token, slot = (index == e).nonzero(as_tuple=True)
        rows = x[token]
        out = (F.silu(rows @ gate[e].T) * (rows @ up[e].T)) @ down[e]
        y = y.index_add(0, token, out * weights[token, slot].to(x.dtype).unsqueeze(-1))
    return y


BACKENDS: dict[str, Backend] = {"grouped": grouped, "reference": reference}


class Experts(nn.Module):
    """The stacked parameters of this rank's routed experts, the backend that runs them, and the way to the others.

    w1 is gate, w3 up, w2 down: the names by which DeepSpeed saves experts. Experts are cut over the expert axis, their
    hidden width over the tensor axis.
    """

    def __init__(self, config: MythosConfig, backend: str, mesh: Mesh, selective: bool = False):
        super().__init__()
        self.mesh = mesh
        self.selective = selective
        self.n_experts = config.n_experts
        shape = (config.n_experts, config.expert_dim, config.dim)
        cuts = {0: mesh.expert, 1: mesh.tensor}
        self.w1, self.w2, self.w3 = (cut_parameter(shape, cuts) for _ in range(3))
        self.backend = BACKENDS[backend]

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x (N, D) whole, weights and index (N, k) -> this tensor rank's partial sums (N, D)."""
        if self.mesh.expert.size == 1:
            return self._run(x, weights, index, None)
        route = dispatch(x, weights, index, self.n_experts, self.mesh)
        return combine(self._run(route.rows, route.weights, route.experts, route.pairs), route, self.mesh)

    def _run(self, x: Tensor, weights: Tensor, index: Tensor, pairs: int | None) -> Tensor:
        return recomputed(self.selective, self.backend, x, weights, index, self.w1, self.w3, self.w2, pairs)
