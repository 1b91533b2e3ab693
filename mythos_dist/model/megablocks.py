"""Routed experts on MegaBlocks' kernels (Gale et al. 2022): its dropless layer, with our router and our parameters.

`ParallelDroplessMLP` sorts (token, slot) pairs by expert, copies them with Triton, multiplies with grouped_gemm, and
sums the weighted outputs. It gets our stacks as views (E * F, D): w1 is gate, v1 up, w2 down transposed. Every forward
synchronizes with the GPU once: grouped_gemm needs each expert's row count on the host.
Disabled: its auxiliary loss (a global list that grows with every forward), its expert parallelism and its scale on
expert gradients (ours is in `parallel/expert.py`, and ZeRO already divides), and its memory-optimized backward, which
overwrites the incoming gradient and leaves gradients on saved tensors, so that a second pass would be wrong.

Decisions: MODEL-11.
"""

# N tokens, D model, E experts, k experts per token, F hidden width of an expert, M rows, one per used slot.

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from mythos_dist.errors import UserError
from mythos_dist.gpu_packages import unavailable
from mythos_dist.model.grouped import pad_to_16_bytes
from mythos_dist.parallel.rows import RowIndex, nonzero_no_sync, row_starts, sum_rows, take_rows

BLOCK = 128  # MegaBlocks' block size along the hidden width of all experts together


def check_megablocks(dtype: torch.dtype | None = None) -> None:
    """Raises UserError, with all reasons, if MegaBlocks cannot run in this process, or not in `dtype`."""
    problems = []
    if dtype not in (None, torch.bfloat16) and not _interpreted():
        problems.append(_other_dtype(dtype))
    missing = unavailable("megablocks")
    if missing:
        problems.append(
            f"experts.backend=megablocks: {missing}; install it with `bash launch/install_gpu.sh`, "
            "or set experts.backend=grouped"
        )
    if not torch.cuda.is_available() and not _interpreted():
        problems.append(
            "experts.backend=megablocks: its kernels run on a GPU, and torch sees none; set experts.backend=grouped"
        )
    if problems:
        raise UserError(problems)


def megablocks(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    pairs: int | None = None,
    impl: str = "grouped",
) -> Tensor:
    """x (N, D), weights and index (N, k), stacks (E, F, D) -> y (N, D). An index of E is an empty slot.

    `pairs`: the number of used slots, None if all are. `impl` is MegaBlocks' `mlp_impl`; "sparse" does not work with
    Triton 3.2 and newer. Raises UserError for a dtype that grouped_gemm does not support.
    """
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise UserError(_other_dtype(x.dtype))
    if pairs == 0 or not index.numel():
        return _NoRows.apply(x, weights, gate, up, down)
    run = functools.partial(_run, gate=gate, up=up, down=down, impl=impl)
    if pairs is None:
        return run(x, weights, index)

    # MegaBlocks has no empty slots: every used one becomes a token of its own, with one expert.
    used = index < gate.shape[0]
    slot = nonzero_no_sync(used, pairs)  # (M,) token * k + slot
    order = torch.arange(pairs, device=x.device)  # rows are in the order of tokens
    rows = RowIndex(slot // index.shape[1], order, row_starts(used))
    weights = weights.flatten().index_select(0, slot).unsqueeze(1)  # (N, k) -> (M, 1)
    index = index.flatten().index_select(0, slot).unsqueeze(1)
    return sum_rows(run(take_rows(x, rows), weights, index), rows)


def _run(x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, impl: str) -> Tensor:
    """All slots used: x (N, D), weights and index (N, k) -> (N, D)."""
    true_D = x.shape[1]
    x, gate, up, down = pad_to_16_bytes(x, gate, up, down)  # grouped_gemm's CUTLASS requires it
    E, width, D = gate.shape
    layer = _layer(E, width, D, index.shape[1], x.dtype, impl)
    stacks = {"mlp.w1": gate.view(-1, D), "mlp.v1": up.view(-1, D), "mlp.w2": down.view(-1, D)}
    # No router scores: only the auxiliary loss uses them. Contiguous, because its kernels ignore strides.
    return functional_call(layer, stacks, (x.contiguous(), None, weights, index))[:, :true_D]


@functools.cache
def _layer(E: int, width: int, D: int, k: int, dtype: torch.dtype, impl: str) -> nn.Module:
    """MegaBlocks' layer as a shell on the meta device: its constructor would allocate all experts twice.

    It is not a submodule of the model, so none of it is trained, moved or saved.
    """
    from megablocks.layers.arguments import Arguments  # pyright: ignore[reportMissingImports]
    from megablocks.layers.dmoe import ParallelDroplessMLP  # pyright: ignore[reportMissingImports]

    settings: dict[str, Any] = {
        "hidden_size": D,
        # With less than one block it takes the logarithm of 0. The true width is that of the stacks.
        "ffn_hidden_size": max(width, -(-BLOCK // E)),
        "moe_num_experts": E,
        "moe_top_k": k,
        "moe_loss_weight": 0.0,
        "mlp_type": "glu",
        "mlp_impl": impl,
        "activation_fn": F.silu,
        "bias": False,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "device": torch.device("meta"),
    }
    layer = ParallelDroplessMLP(Arguments(**settings))
    layer.mlp.gradient_scale = None
    return layer


def _other_dtype(dtype: torch.dtype) -> str:
    return (
        f"experts.backend=megablocks computes in bf16 only and got {str(dtype).removeprefix('torch.')}; "
        "set train.dtype=bf16, or experts.backend=grouped"
    )


def _interpreted() -> bool:
    """Whether Triton's interpreter replaces the GPU, as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class _NoRows(torch.autograd.Function):
    """Zeros for tokens that have no expert here, without a kernel; every input still gets a gradient, zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [tensor.shape for tensor in (x, *others)]
        return torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        needed = zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        return tuple(grad.new_zeros(shape) if need else None for shape, need in needed)
