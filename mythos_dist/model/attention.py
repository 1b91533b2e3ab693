"""Attention layers: grouped-query (GQA) and multi-head latent (MLA), and rotary positions.

Rotary channels are rotated in adjacent pairs. `mythos_dist.model.attend` has the kernels, `mythos_dist.model.kv_cache`
the cache.

Decisions: MODEL-3, MODEL-4, PARALLEL-6, LOOPS-8, DECODE-3.
"""

# B batch, S new tokens (with context parallelism this rank's), T all tokens (cached and new), D model, H query heads,
# K key-value heads,
# R rotary channels, L latent, d channels of a query or key head, v channels of a value head.

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import MythosConfig
from mythos_dist.model.attend import DocumentSpans, Kernel, attend, find_documents
from mythos_dist.model.context_attention import attend_over_context
from mythos_dist.model.kv_cache import CacheKey, KVCache
from mythos_dist.model.norm import Norm, rms_normalize
from mythos_dist.model.recompute import checkpoint_if
from mythos_dist.model.rope import query_factor, rope_frequencies, softmax_scale
from mythos_dist.model.shared_kv import SharedKV, merge_kv
from mythos_dist.parallel.collectives import all_gather_many
from mythos_dist.parallel.context import ContextShard
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.tensor import ParallelLinear, replicated

# Attention to latents stores its scores, B * S * H * T elements of 4 bytes; above this, keys are expanded.
MAX_SCORES = 1 << 26


@dataclass(frozen=True)
class PassContext:
    """What all attention layers share in one forward pass."""

    seq_len: int  # new tokens of each sequence, on all ranks that share it
    rope: Tensor  # (S, 1, R / 2) complex64: exp(i * position * frequency); (B, S, 1, R / 2) if rows' positions differ
    kernel: Kernel
    documents: DocumentSpans | None = None  # None when every row is one document
    cache: KVCache | None = None
    # bool (S, T) or (B, S, T): the keys that a query sees; None: causal, with the last query at the last key.
    mask: Tensor | None = None
    shard: ContextShard | None = None  # the tokens of this rank of the context axis; None: all
    counts_experts: bool = True  # whether tokens per expert are counted, as training needs

    def repeated(self, times: int) -> "PassContext":
        """For `times` copies of the batch, concatenated."""
        documents = None if self.documents is None else self.documents.repeated(times)
        shard = None if self.shard is None else self.shard.repeated(times)
        rope = self.rope.repeat(times, 1, 1, 1) if self.rope.dim() == 4 else self.rope
        return replace(self, documents=documents, shard=shard, rope=rope)

    def token_share(self, x: Tensor) -> float:
        """The part of its sequences' tokens that x (B, S', D) has."""
        return x.shape[1] / self.seq_len


def build_context(
    config: MythosConfig,
    shape: torch.Size,
    device: torch.device,
    document_ids: Tensor | None = None,
    cache: KVCache | None = None,
    kernel: Kernel = "sdpa",
    shard: ContextShard | None = None,
) -> PassContext:
    """The context of a pass over (B, S) tokens that follow those in `cache`, in each row after its own.

    With a `shard` the shape is that of all ranks, and the rotary positions those of the shard's tokens.

    Rotary angles are computed in fp32 for each pass: as buffers they would lose their imaginary part in `.to(bfloat16)`
    and add 768 MB to checkpoints at a context of 1,000,000.
    """
    positions, mask = None, None  # positions: (B, S) if rows differ, else (S,)
    if cache is not None:
        positions, mask = _cached_positions(cache, shape, device)
    if shard is not None:
        positions = shard.positions
    if positions is None:
        positions = torch.arange(shape[1], device=device)
    # Times the reciprocal, not divided: the angles are then OpenMythos' to the bit.
    angles = (positions.float().unsqueeze(-1) * rope_frequencies(config, device)).unsqueeze(-2)
    rope = torch.polar(torch.ones_like(angles), angles)
    documents = None if document_ids is None or shard is not None else find_documents(document_ids)
    return PassContext(shape[1], rope, kernel, documents, cache, mask, shard)


def _cached_positions(cache: KVCache, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Positions of the new tokens, and the mask of the keys that they see, as in `PassContext`."""
    (B, S), start = shape, cache.tokens
    positions = cache.start_pass(B, S, device)
    if positions is not None:
        return positions, torch.arange(start + S, device=device) <= positions.unsqueeze(-1)
    positions = torch.arange(start, start + S, device=device)
    if start == 0 or S == 1:
        return positions, None
    return positions, torch.ones(S, start + S, dtype=torch.bool, device=device).tril(start)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x (B, S, H, R) by `PassContext.rope`, in fp32; same shape and dtype as x."""
    if torch.is_inference_mode_enabled():  # views that autograd does not know, with half the operations
        exact = x.float().contiguous()
        if exact.storage_offset() % 2 == 0:
            return (exact.view(torch.complex64) * rope).view(torch.float32).to(x.dtype)
    pairs = x.float().unflatten(-1, (-1, 2))
    if pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
        pairs = pairs.contiguous()  # a slice that starts at an odd channel
    return torch.view_as_real(torch.view_as_complex(pairs) * rope).flatten(-2).to(x.dtype)


class GQAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): n_heads queries share n_kv_heads keys and values.

    Query heads are sharded over the tensor axis. So are keys and values if their heads divide evenly; otherwise each
    rank computes 1 / tensor of their channels, gathers all, and selects the heads that its queries attend to.
    """

    def __init__(self, config: MythosConfig, mesh: Mesh, selective: bool = False, shares_kv: bool = False):
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.selective = selective
        self.shares_kv = shares_kv
        self.scale = softmax_scale(config) * query_factor(config)  # all channels are rotary
        q_dim, kv_dim = (heads * config.head_dim for heads in (config.n_heads, config.n_kv_heads))
        self.wq = ParallelLinear(config.dim, q_dim, "outputs", mesh, config.qkv_bias)
        self.wk = ParallelLinear(config.dim, kv_dim, "outputs", mesh, config.qkv_bias)
        self.wv = ParallelLinear(config.dim, kv_dim, "outputs", mesh, config.qkv_bias)
        self.wo = ParallelLinear(q_dim, config.dim, "inputs", mesh)
        if config.qk_norm:
            self.qk_norm = replicated(Norm(config.head_dim, config.norm_eps), mesh, in_parallel_region=True)
        if config.key_norm_weight:
            self.k_norm = replicated(Norm(config.head_dim, config.norm_eps), mesh, in_parallel_region=True)

    def forward(
        self, x: Tensor, context: PassContext, cache_key: CacheKey, shared: SharedKV | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D), full on each tensor rank -> this rank's partial sum (B, S, D), and with `shares_kv` the keys and
        values that were attended to (B, S, W): computed here, or `shared`."""
        rows = x.flatten(0, 1)  # a 2D product launches fewer operations than a batched one
        q, kv = self.wq(rows), None
        if self.shares_kv:
            new = None
            if shared is None or shared.renewed is not None:
                new = torch.cat(self._keys_and_values(rows), dim=-1).view(*x.shape[:2], -1)
            kv = merge_kv(new, shared)
            k, v = kv.chunk(2, -1)
        else:
            k, v = self._keys_and_values(rows)
        q, k, v = (part.view(*x.shape[:2], -1, self.config.head_dim) for part in (q, k, v))
        return self.wo(checkpoint_if(self.selective, self._attend, q, k, v, context, cache_key)).view_as(x), kv

    def _keys_and_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> keys and values (N, K * d) of the heads that this rank's queries attend to."""
        k, v = self.wk(rows), self.wv(rows)
        return self._select_kv_heads(k, v) if self.config.n_kv_heads % self.mesh.tensor.size else (k, v)

    def kv_projections(self) -> list[nn.Module]:
        """Layers that a loop with shared keys and values does not apply."""
        return [self.wk, self.wv]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: PassContext, cache_key: CacheKey) -> Tensor:
        if self.config.key_norm_weight:
            q, k = self.qk_norm(q), self.k_norm(k)
        elif self.config.qk_norm:  # one weight for both: without RoPE only the product of two would matter
            q, k = self.qk_norm(q), rms_normalize(k, self.config.norm_eps)
        q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        if context.shard is not None:
            entries = torch.cat([k.flatten(2), v.flatten(2)], dim=-1)
            return attend_over_context(q, entries, None, self._expand, self.config.head_dim, context.shard, self.scale)
        if context.cache is not None:
            new = torch.cat([k.flatten(2), v.flatten(2)], dim=-1)  # (B, S, 2 * K * d)
            k, v = context.cache.append(cache_key, new).unflatten(-1, (2, -1, self.config.head_dim)).unbind(2)
        dropout = self.config.dropout if self.training else 0.0
        return attend(q, k, v, context.kernel, context.documents, dropout, context.mask, self.scale)

    def _expand(self, entries: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Key and value heads (n, 2 * K * d) -> those of each query head, both (n, H, d)."""
        k, v = entries.unflatten(-1, (2, -1, self.config.head_dim)).unbind(1)
        queries = self.config.n_heads // self.mesh.tensor.size
        return k.repeat_interleave(queries // k.shape[1], 1), v.repeat_interleave(queries // v.shape[1], 1)

    def _select_kv_heads(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's channels of keys and values -> the heads that its queries attend to, (N, H / tensor * d)."""
        c, axis = self.config, self.mesh.tensor
        queries = c.n_heads // axis.size
        heads = torch.arange(axis.rank * queries, (axis.rank + 1) * queries, device=k.device)
        heads = heads * c.n_kv_heads // c.n_heads  # the key head of each query head
        full = (x[..., : c.n_kv_heads * c.head_dim] for x in all_gather_many([k, v], axis, -1))
        k, v = (x.unflatten(-1, (-1, c.head_dim)).index_select(1, heads).flatten(1) for x in full)
        return k, v


class LatentExpansion(ParallelLinear):
    """MLA's projection from latents to keys and values. `use(weight)` runs within its forward, where ZeRO-3 has
    gathered the weight."""

    def forward(self, x: Tensor, use: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """x (..., L) -> (..., H * (nope + v)); with `use`, `use(x, weight)`."""
        return super().forward(x) if use is None else use(x, self.weight)


class MLAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are computed from one narrow latent per token.

    A head's query and key have nope channels without position and rope channels with it; all heads share the rotary
    key. The cache holds the normed latent and the rotary key, kv_lora_rank + qk_rope_head_dim elements. A few queries
    after many cached tokens attend to the latents themselves: `_attend_latents`.
    Heads are sharded over the tensor axis, and so are the channels of the latents, which every rank then gathers.
    """

    def __init__(self, config: MythosConfig, mesh: Mesh, selective: bool = False, shares_kv: bool = False):
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.selective = selective
        self.shares_kv = shares_kv
        self.scale, self.query_factor = softmax_scale(config), query_factor(config)
        heads, latent = config.n_heads, config.kv_lora_rank
        self.q_down = ParallelLinear(config.dim, config.q_lora_rank, "outputs", mesh)
        self.q_norm = replicated(Norm(config.q_lora_rank, config.norm_eps), mesh, in_parallel_region=True)
        # Per head: nope, then rope.
        self.q_up = ParallelLinear(config.q_lora_rank, heads * config.head_dim, "outputs", mesh)
        self.kv_down = ParallelLinear(config.dim, latent + config.qk_rope_head_dim, "outputs", mesh)
        self.kv_norm = replicated(Norm(latent, config.norm_eps), mesh, in_parallel_region=True)
        self.kv_up = LatentExpansion(latent, heads * (config.qk_nope_head_dim + config.v_head_dim), "outputs", mesh)
        self.wo = ParallelLinear(heads * config.v_head_dim, config.dim, "inputs", mesh)
        if config.qk_norm:
            self.qk_norm = replicated(Norm(config.head_dim, config.norm_eps), mesh, in_parallel_region=True)

    def forward(
        self, x: Tensor, context: PassContext, cache_key: CacheKey, shared: SharedKV | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D), full on each tensor rank -> this rank's partial sum (B, S, D), and with `shares_kv` the latents
        of the keys and values that were attended to (B, S, W): computed here, or `shared`."""
        c, rows, shape = self.config, x.flatten(0, 1), x.shape[:2]
        down = [(self.q_down, c.q_lora_rank)]
        if shared is None or shared.renewed is not None:
            down.append((self.kv_down, c.kv_lora_rank + c.qk_rope_head_dim))
        q, *new = all_gather_many([project(rows) for project, _ in down], self.mesh.tensor, -1)
        if self.mesh.tensor.size > 1:  # without padding
            q, *new = (latent[:, :width] for latent, (_, width) in zip([q, *new], down, strict=True))
        kv = merge_kv(new[0].view(*shape, -1) if new else None, shared) if self.shares_kv else None
        latents = new[0] if kv is None else kv.flatten(0, 1)
        is_cached = shared is not None and shared.renewed is None
        out = checkpoint_if(self.selective, self._attend, q, latents, shape, context, cache_key, is_cached)
        return self.wo(out).view_as(x), kv

    def kv_projections(self) -> list[nn.Module]:
        """Layers that a loop with shared keys and values does not apply."""
        return [self.kv_down]

    def _attend(
        self, q: Tensor, kv: Tensor, shape: torch.Size, context: PassContext, cache_key: CacheKey, is_cached: bool
    ) -> Tensor:
        """Full latents of queries (N, -) and of keys and values (N, L + R) -> this rank's heads (N, H * v).

        is_cached: an earlier loop of this pass has cached `kv`.
        """
        c = self.config
        nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        q = self.q_up(self.q_norm(q)).view(*shape, -1, nope + rope)
        q_nope, q_rope = (self.qk_norm(q) if c.qk_norm else q).split([nope, rope], dim=-1)
        latent, k_rope = kv.split([c.kv_lora_rank, rope], dim=-1)  # (N, L), (N, R)
        rotated = apply_rope(torch.cat([q_rope, k_rope.view(*shape, 1, rope)], dim=2), context.rope)
        q_rope, k_rope = rotated.split([q_rope.shape[2], 1], dim=2)
        if self.query_factor != 1.0:
            q_rope = q_rope * self.query_factor
        latent = self.kv_norm(latent).view(*shape, -1)  # (B, S, L)
        if (shard := context.shard) is not None:
            q = torch.cat([q_nope, q_rope], dim=-1)
            entries = torch.cat([latent, k_rope.squeeze(2)], dim=-1)
            return self.kv_up(
                entries,
                lambda x, weight: attend_over_context(q, x, weight, self._expand, c.v_head_dim, shard, self.scale),
            )
        if context.cache is not None:
            if is_cached and isinstance(cache_key, str):
                entries = context.cache.read(cache_key, shape[1])
            else:
                entries = context.cache.append(cache_key, self._cache_entry(latent, k_rope.squeeze(2)))
            # Without a mask only one query sees all keys: that of a prompt is causal, which the kernel does.
            if (shape[1] == 1 or context.mask is not None) and self._absorbs(q, entries.shape[1]):
                return self._attend_latents(q_nope, q_rope, entries, context.mask)
            latent, k_rope = entries[..., : c.kv_lora_rank + rope].split([c.kv_lora_rank, rope], dim=-1)  # (B, T, -)
            k_rope = k_rope.unsqueeze(2)
        kv = self.kv_up(latent.flatten(0, 1)).view(shape[0], -1, q.shape[2], nope + c.v_head_dim)
        k, v = self._keys_and_values(kv, k_rope)  # (B, T, H, -)
        q = torch.cat([q_nope, q_rope], dim=-1)  # (B, S, H, d)
        dropout = c.dropout if self.training else 0.0
        return attend(q, k, v, context.kernel, context.documents, dropout, context.mask, self.scale)

    def _keys_and_values(self, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Expanded latents (..., H, nope + v), rotary keys (..., 1, R) -> keys (..., H, d), values (..., H, v)."""
        k_nope, v = kv.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], dim=-1)
        # Rotation keeps the length, so the norm can follow it.
        return rms_normalize(k, self.config.norm_eps) if self.config.qk_norm else k, v

    def _expand(self, entries: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normed latents and rotary keys (n, L + R) -> keys (n, H, d), values (n, H, v); weight: of `kv_up`."""
        c = self.config
        assert weight is not None
        latent, k_rope = entries.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = F.linear(latent, weight).unflatten(-1, (-1, c.qk_nope_head_dim + c.v_head_dim))
        return self._keys_and_values(kv, k_rope.unsqueeze(1))

    def _cache_entry(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """What the cache holds of tokens: normed latents (B, S, L), rotary keys (B, S, R), with qk_norm also scales."""
        scales = [self._key_scales(latent, k_rope)] if self.config.qk_norm else []
        return torch.cat([latent, k_rope, *scales], dim=-1)

    def _up_by_head(self) -> tuple[Tensor, Tensor]:
        """kv_up's weight by head: for keys (H, nope, L) and for values (H, v, L)."""
        c = self.config
        weight = self.kv_up.weight.view(-1, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        key, value = weight.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        return key, value

    def _key_scales(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """1 / RMS of each head's key, the factor that normalizes it: (B, S, L), (B, S, R) -> (B, S, H)."""
        key_up, _ = self._up_by_head()
        rows = latent.flatten(0, 1)
        squares = torch.matmul(rows, key_up.transpose(1, 2)).float().square().sum(-1)  # (H, N)
        squares = squares.t().reshape(*latent.shape[:2], -1) + k_rope.float().square().sum(-1, keepdim=True)
        return (squares / self.config.head_dim + self.config.norm_eps).rsqrt().to(latent.dtype)

    def _absorbs(self, q: Tensor, T: int) -> bool:
        """Whether attention to latents takes fewer operations than expanding all T of them to keys and values.

        Per head, in products: expanding L * (nope + v) for each key, then nope + rope + v for each query and key; with
        latents L * (nope + v) for each query, and 2 * L + rope for each query and key. Reading a prompt expands.
        """
        c, (B, S, H, d) = self.config, q.shape
        if self.training or B * S * H * T > MAX_SCORES:
            return False
        expand = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        expanded = T * expand + S * T * (d + c.v_head_dim)
        return S * expand + S * T * (2 * c.kv_lora_rank + c.qk_rope_head_dim) < expanded

    def _attend_latents(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor | None) -> Tensor:
        """q_nope (B, S, H, nope), q_rope (B, S, H, R), cached entries (B, T, L + R (+ H)) -> (N, H * v).

        q . (W c) = (W^T q) . c: queries are projected to the latent (DeepSeek-V2, 2024, "absorbed" projections), all
        heads attend to the same (T, L + R) keys, and only their sums of latents are expanded to values.
        """
        c, (B, S, H, _), T = self.config, q_nope.shape, entries.shape[1]
        L, R = c.kv_lora_rank, c.qk_rope_head_dim
        key_up, value_up = self._up_by_head()
        by_head = torch.bmm(q_nope.reshape(B * S, H, -1).transpose(0, 1), key_up)  # (H, N, L)
        q = torch.cat([by_head.transpose(0, 1).reshape(B, S * H, L), q_rope.reshape(B, S * H, R)], dim=-1)
        keys = entries[..., : L + R] if c.qk_norm else entries
        scores = torch.bmm(q, keys.transpose(1, 2)).view(B, S, H, T).float() * self.scale
        if c.qk_norm:
            scores = scores * entries[..., L + R :].transpose(1, 2).unsqueeze(1)  # (B, 1, H, T)
        if mask is not None:
            scores = scores.masked_fill(~mask.view(-1, S, 1, T), -torch.inf)
        probs = scores.softmax(-1).to(entries.dtype).view(B, S * H, T)
        sums = torch.bmm(probs, entries[..., :L]).view(B * S, H, L)
        values = torch.bmm(sums.transpose(0, 1), value_up.transpose(1, 2))  # (H, N, v)
        return values.transpose(0, 1).reshape(B * S, -1)
