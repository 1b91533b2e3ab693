"""softmax(q k^T / sqrt(d)) v over earlier tokens of the same document, by a kernel that never stores S x S scores.

`flash_attn` is FlashAttention 2 (Dao 2023), for half precision on a GPU; `sdpa` is PyTorch's own. The trap: both need
values as wide as keys. MLA's are narrower, so they are padded with zeros and the output is sliced; without padding
PyTorch falls back to its math kernel, which stores the scores, and flash-attn raises (`benchmarks/README.md`).

Decisions: MODEL-12.
"""

# B batch, S new tokens, T all tokens (cached and new), H query heads, K key-value heads, d channels of a query or key
# head, v channels of a value head.

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_dist.config.schema import MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.gpu_packages import unavailable

Kernel = Literal["flash_attn", "sdpa"]
MAX_HEAD_DIM = 256  # channels, in flash-attn 2


def choose_kernel(setting: str, device: torch.device, dtype: torch.dtype, config: MythosConfig) -> Kernel:
    """The kernel for `train.attention`. Raises UserError if it is flash_attn and flash-attn cannot run."""
    if setting == "sdpa":
        return "sdpa"
    reasons = []
    if device.type != "cuda":
        reasons.append(f"it runs on a GPU, not on {device.type}")
    elif torch.cuda.get_device_capability(device)[0] < 8:
        reasons.append(f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)")
    if dtype == torch.float32:
        reasons.append("it computes in half precision, and train.dtype=fp32")
    if config.widest_head > MAX_HEAD_DIM:
        reasons.append(f"a head has {config.widest_head} channels, more than its {MAX_HEAD_DIM}")
    if setting == "auto" and reasons:
        return "sdpa"  # without importing the package
    if missing := unavailable("flash_attn"):
        reasons.append(f"{missing}: bash launch/install_gpu.sh installs it")
    if not reasons:
        return "flash_attn"
    if setting == "auto":
        return "sdpa"
    raise UserError(f"train.attention=flash_attn cannot run: {'; '.join(reasons)}; set train.attention=auto")


@dataclass(frozen=True)
class DocumentSpans:
    """The documents among the B * S flattened tokens of a batch; every row begins a new one."""

    spans: list[tuple[int, int]]  # start and end of each
    ends: Tensor  # (documents + 1,) int32, cumulative: 0, then the end of each
    longest: int  # tokens

    def repeated(self, times: int) -> "DocumentSpans":
        """For `times` copies of the batch, concatenated."""
        total = self.spans[-1][1]
        spans = [(start + i * total, end + i * total) for i in range(times) for start, end in self.spans]
        starts = [self.ends[:1], *(self.ends[1:] + i * total for i in range(times))]
        return DocumentSpans(spans, torch.cat(starts), self.longest)


def find_documents(document_ids: Tensor) -> DocumentSpans | None:
    """document_ids (B, S), equal within a document -> spans; None if each row is one document. Waits for the GPU."""
    B, S = document_ids.shape
    inner = document_ids[:, 1:] != document_ids[:, :-1]
    if not bool(inner.any()):
        return None
    changes = torch.ones(B, S, dtype=torch.bool, device=document_ids.device)
    changes[:, 1:] = inner
    bounds = [*changes.flatten().nonzero().flatten().tolist(), B * S]
    spans = list(itertools.pairwise(bounds))
    ends = torch.tensor(bounds, dtype=torch.int32, device=document_ids.device)
    return DocumentSpans(spans, ends, max(end - start for start, end in spans))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel = "sdpa",
    documents: DocumentSpans | None = None,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention inside documents: q (B, S, H, d), k (B, T, K, d), v (B, T, K, v) -> (B * S, H * v).

    With T > S the queries are the last S of the T tokens, or `mask`, bool (S, T) or (B, S, T), says which keys each
    sees. `scale`: of the products of queries and keys; None: d^-0.5.
    """
    d, v_dim = q.shape[-1], v.shape[-1]
    factor: float = d**-0.5 if scale is None else scale
    if v_dim < d:
        v = F.pad(v, (0, d - v_dim))
    elif v_dim > d:
        q, k = F.pad(q, (0, v_dim - d)), F.pad(k, (0, v_dim - d))
    if kernel == "flash_attn" and (mask is None or mask.dim() == 2):
        out = _flash_attn(q, k, v, documents, dropout, factor)  # (B, S, H, max(d, v))
    else:  # flash-attn has no mask for rows of different lengths
        out = _sdpa(q, k, v, documents, dropout, factor, mask)
    return out[..., :v_dim].reshape(q.shape[0] * q.shape[1], -1)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, documents: DocumentSpans | None, dropout: float, scale: float
) -> Tensor:
    """flash_attn/flash_attn_interface.py; its causal mask aligns the last query with the last key, as ours does."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    settings = dict(dropout_p=dropout, softmax_scale=scale, causal=True)
    if documents is None or k.shape[1] > q.shape[1]:
        return flash_attn_func(q, k, v, **settings)
    rows = (x.flatten(0, 1) for x in (q, k, v))  # (B * S, heads, channels)
    ends, longest = documents.ends, documents.longest
    return flash_attn_varlen_func(*rows, ends, ends, longest, longest, **settings).view(*q.shape[:3], -1)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: DocumentSpans | None,
    dropout: float,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),  # (B, S, H, d) -> (B, H, S, d)
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        ).transpose(1, 2)

    S, T = q.shape[1], k.shape[1]
    if mask is None and T > S > 1:
        mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    if mask is not None:  # after cached tokens
        return kernel(q, k, v, mask if mask.dim() == 2 else mask.unsqueeze(1))
    if documents is None or T > S:
        return kernel(q, k, v, causal=T == S)
    # One call per document: a dense mask is three times as slow on a CPU.
    rows = [x.flatten(0, 1).unsqueeze(0) for x in (q, k, v)]  # (1, B * S, heads, channels)
    parts = [kernel(*(x[:, start:end] for x in rows), causal=True) for start, end in documents.spans]
    return torch.cat(parts, dim=1).view(*q.shape[:3], -1)
