"""The `grouped` backend of the routed experts: rows sorted by expert, then one grouped matrix product per weight.

No operation depends on the number of rows per expert, so 512 experts launch as many kernels as 8, and the GPU never
waits for the host (where `F.grouped_mm` is one kernel: bf16, compute capability 9.x and 10.x; elsewhere it is a loop in
torch that waits). The backward pass keeps the tokens, the products with gate and up, and the order of rows.

Decisions: MODEL-6, MODEL-8.
"""

# N tokens, D model, E experts, k experts per token, F hidden width of an expert, M rows, at least N * k.

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos_dist.model.gradient_sums import GradientSums
from mythos_dist.model.swiglu import swiglu_backward, swiglu_forward
from mythos_dist.parallel.process import on_cpu
from mythos_dist.parallel.rows import RowIndex, index_slots, sum_rows_no_grad


def tokens_per_expert(index: Tensor, n_experts: int) -> Tensor:
    """Rows per expert: (N, k) -> (E,) int64. Unlike `bincount` it does not wait for the GPU."""
    flat = index.flatten()
    return torch.zeros(n_experts, dtype=torch.int64, device=index.device).scatter_add_(0, flat, torch.ones_like(flat))


class SortedRows(NamedTuple):
    """The (token, slot) pairs as rows sorted by expert."""

    ends: Tensor  # (E,) int32: the end of each expert's rows, padding rows included
    pair: Tensor  # (M,) token * k + slot; 0 in padding rows
    real: Tensor | None  # (M,) False for padding rows; None: no padding
    row: Tensor  # (N * k,) the row of each pair; M for an empty slot
    places: RowIndex


def sort_rows(index: Tensor, n_experts: int, pairs: int | None, dtype: torch.dtype) -> SortedRows:
    """Sort (token, slot) pairs by expert. On a CPU in half precision each expert's rows are padded to a multiple of 16.

    oneDNN compiles a kernel for every new shape, and routing produces new shapes in every step: bf16 products of 1..512
    rows run at 36-123 GFLOP/s unpadded and at 239-417 in multiples of 16 (256 x 128 and 512 x 512).
    """
    N, k = index.shape
    device = index.device
    by_expert, pair = index.flatten().sort(stable=True)  # empty slots come last and are dropped
    by_expert, pair = by_expert[:pairs], pair[:pairs]
    ends = torch.searchsorted(by_expert, torch.arange(n_experts, device=device), right=True, out_int32=True)
    M = pair.shape[0]
    row, real = torch.arange(M, device=device), None
    if on_cpu(index) and dtype != torch.float32:
        padded = (ends.diff(prepend=ends.new_zeros(1)) + 15) // 16 * 16
        padded_ends = padded.cumsum(0)
        row += ((padded_ends - padded) - F.pad(ends[:-1], (1, 0))).index_select(0, by_expert)  # padding rows before it
        M, ends = int(padded_ends[-1]), padded_ends.int()
        pair = pair.new_zeros(M).scatter_(0, row, pair)
        real = torch.zeros(M, dtype=torch.bool).scatter_(0, row, True)
    row_of_pair = row.new_full((N * k,), M).scatter_(0, pair if real is None else pair[real], row)
    is_pair = None if pairs is None else index < n_experts
    places = index_slots(pair // k, row_of_pair.view(N, k), is_pair, pairs)
    return SortedRows(ends, pair, real, row_of_pair, places)


def pad_to_16_bytes(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, D) and the stacks (E, F, D) with D and F zero-padded to multiples of 16 bytes; unchanged if they are."""
    align = 16 // x.element_size()
    spare_D, spare_F = -x.shape[1] % align, -gate.shape[1] % align
    if not spare_D and not spare_F:
        return x, gate, up, down
    gate, up, down = (F.pad(stack, (0, spare_D, 0, spare_F)) for stack in (gate, up, down))
    return F.pad(x, (0, spare_D)), gate, up, down


def grouped(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    pairs: int | None = None,
    sums: GradientSums | None = None,
) -> Tensor:
    """See `mythos_dist.model.experts.Backend`."""
    D, stack = x.shape[1], gate
    x, gate, up, down = pad_to_16_bytes(x, gate, up, down)  # grouped_mm requires it
    if gate is not stack or not torch.is_grad_enabled():
        sums = None  # padded copies get gradients of their own
    rows = sort_rows(index, gate.shape[0], pairs, x.dtype)
    anchor = None if sums is None else sums.anchor((gate, up, down))
    return _Grouped.apply(x, weights, gate, up, down, rows, sums, anchor)[..., :D]


class _Grouped(torch.autograd.Function):
    """y[n] = sum of the rows of n, of weight * (silu(x @ gate^T) * (x @ up^T)) @ down.

    Weighting the hidden rows, not the output rows, saves a pass over the wider output and its copy for the backward.
    """

    @staticmethod
    def forward(
        ctx, x, weights, gate, up, down, rows: SortedRows, sums: GradientSums | None, anchor: Tensor | None
    ) -> Tensor:
        place, row, starts = rows.places
        xs = x.index_select(0, place)  # (N, D) -> (M, D)
        g = F.grouped_mm(xs, gate.transpose(-2, -1), offs=rows.ends)  # (M, D) -> (M, F)
        u = F.grouped_mm(xs, up.transpose(-2, -1), offs=rows.ends)
        weight = weights.flatten().index_select(0, rows.pair).to(x.dtype)  # (M,)
        if rows.real is not None:
            weight.mul_(rows.real)  # padding rows add nothing, forward or backward
        ctx.save_for_backward(x, g, u, weight, gate, up, down, place, row, starts, rows.row, rows.ends)
        ctx.weights, ctx.sums = (weights.shape, weights.dtype), sums
        ys = F.grouped_mm(swiglu_forward(g, u, weight), down, offs=rows.ends)  # (M, F) -> (M, D)
        return sum_rows_no_grad(ys, row, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, g, u, weight, gate, up, down, place, row, starts, row_of_pair, ends = ctx.saved_tensors
        product = _weight_gradients((gate, up, down), ends, ctx.sums)
        grad_ys = grad.index_select(0, place)  # (M, D)
        grad_hidden = F.grouped_mm(grad_ys, down.transpose(-2, -1), offs=ends)
        hidden, grad_g, grad_u, grad_weight = swiglu_backward(grad_hidden, g, u, weight)
        grad_down = product(2, hidden, grad_ys)
        del hidden, grad_ys
        xs = x.index_select(0, place)
        grad_gate, grad_up = product(0, grad_g, xs), product(1, grad_u, xs)
        del xs
        grad_xs = F.grouped_mm(grad_g, gate, offs=ends).add_(F.grouped_mm(grad_u, up, offs=ends))
        shape, dtype = ctx.weights
        grad_weights = F.pad(grad_weight, (0, 1)).index_select(0, row_of_pair).view(shape).to(dtype)
        return sum_rows_no_grad(grad_xs, row, starts), grad_weights, grad_gate, grad_up, grad_down, None, None, None


def _weight_gradients(
    stacks: tuple[Tensor, Tensor, Tensor], ends: Tensor, sums: GradientSums | None
) -> Callable[[int, Tensor, Tensor], Tensor | None]:
    """A function: (stack's index, left (M, F), right (M, D)) -> its gradient (E, F, D), or None if `sums` has it."""
    if sums is None:
        return lambda which, left, right: F.grouped_mm(left.t(), right, offs=ends)
    host = ends.tolist()
    return lambda which, left, right: sums.add(which, left, right, host, stacks)
