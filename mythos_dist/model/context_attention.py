"""Attention of a rank's own queries to the tokens of all ranks of the context axis.

Ranks exchange `entries`, what keys and values are computed from: MLA's normed latents and rotary keys, GQA's key and
value heads. They are gathered (as keys and values in Llama 3, arXiv 2407.21783), and keys and values are expanded from
them for one tile of tokens at a time. Partial results merge by their log-sum-exp in fp32:

    lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) * out_1 + exp(lse_2 - lse) * out_2

The backward pass gathers the entries and expands each tile again, so that a loop keeps this rank's entries only; a
reduce-scatter brings the gradients of the entries to their ranks. A kernel's backward with the merged `out` and `lse`
gives a block's part of the full gradient (Dao 2023).

Decisions: PARALLEL-17, PARALLEL-19.
"""

# B batch, S' tokens of each sequence on this rank, N = B * S' queries, M rows of all ranks, n tokens of a tile,
# H query heads, d channels of a query or key head, v channels of a value head, w = max(d, v), W elements of an entry.

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos_dist.parallel.context import ContextShard, KeyTile

# entries (n, W) and a weight or None -> keys (n, H, d), values (n, H, v)
Expand = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def attend_over_context(
    q: Tensor,
    entries: Tensor,
    weight: Tensor | None,
    expand: Expand,
    value_dim: int,
    shard: ContextShard,
    scale: float | None = None,
) -> Tensor:
    """Causal attention inside documents: q (B, S', H, d), entries (B, S', W) -> (N, H * v).

    Collective over the context axis, forward and backward. `expand` gets the weight as an argument, because autograd
    must see it. `scale`: of the products of queries and keys; None: d^-0.5.
    """
    head_dim = q.shape[-1]
    width = max(head_dim, value_dim)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x  # F.pad copies in any case

    def expand_padded(rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        k, v = expand(rows, weight)
        return pad(k), pad(v)

    out = _apply(
        _Attend, pad(q).flatten(0, 1), entries, weight, expand_padded, shard, head_dim**-0.5 if scale is None else scale
    )
    return out[..., :value_dim].flatten(1)


def each_tile(shard: ContextShard) -> Iterable[KeyTile]:
    """The tiles of keys, in order. A dry run skips those that repeat (ops/dry_run.py)."""
    return shard.tiles


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        entries: Tensor,
        weight: Tensor | None,
        expand: Expand,
        shard: ContextShard,
        scale: float,
    ) -> Tensor:
        """q (N, H, w), entries (B, S', W) -> (N, H, w)."""
        rows = shard.gather(entries)
        out = torch.zeros_like(q, dtype=torch.float32)
        lse = out.new_full(q.shape[:2], -torch.inf)
        for tile in each_tile(shard):
            k, v = expand(rows[shard.rows[tile.tokens]], weight)
            for queries, keys, causal in tile.blocks:
                part, part_lse = block_forward(q[queries], k[keys], v[keys], causal, scale)
                merged = torch.logaddexp(lse[queries], part_lse)
                out[queries] *= (lse[queries] - merged).exp().unsqueeze(-1)
                out[queries] += part * (part_lse - merged).exp().unsqueeze(-1)
                lse[queries] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, entries, weight, out, lse)
        ctx.expand, ctx.shard, ctx.scale = expand, shard, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, entries, weight, out, lse = ctx.saved_tensors
        shard: ContextShard = ctx.shard
        rows = shard.gather(entries)
        grad_rows, grad_q = torch.zeros_like(rows), torch.zeros_like(q, dtype=torch.float32)
        grad_weight = None if weight is None else torch.zeros_like(weight)
        for tile in each_tile(shard):
            index = shard.rows[tile.tokens]
            with torch.enable_grad():
                inputs = [rows[index].requires_grad_()]
                if weight is not None:
                    inputs.append(weight.detach().requires_grad_())
                k, v = ctx.expand(inputs[0], inputs[1] if weight is not None else None)
            grad_kv = _tile_backward(grad, q, k.detach(), v.detach(), out, lse, tile, ctx.scale, grad_q)
            grads = torch.autograd.grad((k, v), inputs, grad_kv)
            grad_rows[index] = grads[0]
            if grad_weight is not None:
                grad_weight += grads[1]
            del k, v, grad_kv, grads  # else they would exist beside those of the next tile
        return grad_q.to(q.dtype), shard.reduce_scatter(grad_rows), grad_weight, None, None, None


def _tile_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: KeyTile,
    scale: float,
    grad_q: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of a tile's keys and values (n, H, w); those of queries are added to `grad_q` (N, H, w) fp32."""
    grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for queries, keys, causal in tile.blocks:
        parts = block_backward(grad[queries], q[queries], k[keys], v[keys], out[queries], lse[queries], causal, scale)
        for total, part in zip((grad_q[queries], grad_k[keys], grad_v[keys]), parts, strict=True):
            total += part
    return grad_k.to(k.dtype), grad_v.to(v.dtype)


def _run(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


_apply: Any = torch._disable_dynamo(_run)  # as in parallel/collectives.py


def block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q (m, H, w), k and v (n, H, w) -> softmax(q k^T * scale) v (m, H, w), and the log-sum-exp (m, H) fp32.

    PyTorch's kernels that return it: FlashAttention's on CPUs and for half precision on GPUs, else the
    memory-efficient one.
    """
    heads = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]  # (1, H, n, w)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, causal, scale=scale)
    elif q.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            *heads, None, True, 0.0, causal, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads, 0.0, causal, False, scale=scale)
    return out[0].transpose(0, 1), lse[0, :, : len(q)].t()


def block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v by `block_forward`; `out` (m, H, w) and `lse` (m, H) may be of more keys than these."""
    grad, q, k, v, out = (x.transpose(0, 1).unsqueeze(0) for x in (grad, q, k, v, out))
    lse = lse.t().unsqueeze(0)  # (1, H, m)
    if q.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    else:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is off
        if q.dtype == torch.float32:
            padded = F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)  # as the forward kernel returns it
            seed, wanted = seed.to(torch.int64), [True, True, True, False]
            grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, out, padded, seed[0], seed[1], 0.0, wanted, causal, scale=scale
            )
        else:
            none, queries, keys = None, q.shape[2], k.shape[2]
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse.contiguous(), none, none, queries, keys, 0.0, causal, seed, seed, scale=scale
            )
    first, second, third = (x[0].transpose(0, 1) for x in grads[:3])
    return first, second, third
