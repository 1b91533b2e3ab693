"""A stand-in for flash-attn 2, which needs a GPU: it demands what flash-attn demands, and computes the truth.

The demands are those of flash_attn 2.8.3: `flash_attn_interface.py` and `csrc/flash_attn/flash_api.cpp`.
"""

import torch
from torch import Tensor

calls: list[str] = []


def _demand(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    for x in (q, k, v):
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.dtype == q.dtype
        assert x.dim() == dims
        assert x.stride(-1) == 1, "the last dimension must be contiguous"
        assert x.shape[-1] == q.shape[-1] <= 256, "heads of one width, at most 256"
    assert k.shape == v.shape
    assert q.shape[-2] % k.shape[-2] == 0, "query heads must be a multiple of key heads"


def _truth(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """q (S, H, d), k, v (T, K, d) of one sequence, in float64; the mask is aligned to the last query and key."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q.double(), k) * scale
    S, T = scores.shape[1:]
    if causal:
        scores = scores.masked_fill(torch.ones(S, T, dtype=torch.bool).tril(T - S).logical_not(), float("-inf"))
    return torch.einsum("hst,thd->shd", scores.softmax(-1), v).to(q.dtype)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False) -> Tensor:
    """q (B, S, H, d), k, v (B, T, K, d) -> (B, S, H, d)."""
    calls.append("flash_attn_func")
    _demand(q, k, v, 4)
    assert dropout_p == 0.0, "the stand-in drops nothing"
    assert q.shape[0] == k.shape[0]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return torch.stack([_truth(*one, scale, causal) for one in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
) -> Tensor:
    """q (all tokens, H, d), k, v (all tokens, K, d), where sequences end -> (all tokens, H, d)."""
    calls.append("flash_attn_varlen_func")
    _demand(q, k, v, 3)
    assert dropout_p == 0.0, "the stand-in drops nothing"
    for ends, longest, rows in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert ends.device == q.device
        assert type(longest) is int
        assert ends[0] == 0
        assert ends[-1] == rows.shape[0]
        assert (ends.diff() > 0).all()
        assert longest == ends.diff().max()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    spans = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)
    return torch.cat([_truth(q[a:b], k[a:b], v[a:b], scale, causal) for a, b in spans])
