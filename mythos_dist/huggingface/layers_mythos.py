"""The layers of Mythos: norm, both kinds of attention, mixture of experts, block, and what depends on the loop.

A file of mythos_dist that exports carry; it needs PyTorch and transformers, and nothing else.
"""

# B batch, S new tokens, T all tokens (cached and new), N = B * S, D model, H query heads, K key-value heads,
# d channels of a query or key head, v of a value head, R rotary channels, L latent, E experts, k experts per token,
# M = N * k rows.

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mythos import MythosPretrainedConfig as Config


class MythosNorm(nn.Module):
    """RMSNorm in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return (rms_normalize(x.float(), self.eps) * self.weight.float()).to(x.dtype)


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., D) without a weight, in the dtype of x."""
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x (B, heads, S, R) by the angles rope (B, S, R / 2), in fp32 (RoPE)."""
    cos, sin = rope.cos().unsqueeze(1), rope.sin().unsqueeze(1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angles per position of the rotary channel pairs, (R / 2,); those of transformers for the same `rope_scaling`."""
    R = config.rope_dim
    scaling: dict[str, Any] = config.rope_scaling or {"rope_type": "default"}
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, device=device).float() / R)
    if scaling["rope_type"] == "default":
        return frequencies
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    if scaling["rope_type"] == "llama3":
        rotations = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling.get("low_freq_factor") or 1, scaling.get("high_freq_factor") or 4
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return frequencies * kept + slow * (1 - kept)
    if scaling["rope_type"] != "yarn":
        raise ValueError(f"rope_type={scaling['rope_type']!r} is not supported; expected linear, yarn or llama3")

    def pair_of(rotations: float) -> float:
        """The index of the pair that rotates so often within the original length."""
        turns = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return R * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    high += 0.001 * (low == high)
    kept = 1 - ((torch.arange(R // 2, device=device).float() - low) / (high - low)).clamp(0, 1)
    return frequencies * kept + slow * (1 - kept)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """softmax(scale q k^T) v: q (B, H, S, d), k (B, K, T, d), v (B, K, T, v) -> (B, S, H * v).

    mask: bool, broadcast to (B, H, S, T), True where a query sees a key; None: causal.
    """
    d, v_dim = q.shape[-1], v.shape[-1]
    if v_dim < d:  # fused kernels need values as wide as keys
        v = F.pad(v, (0, d - v_dim))
    causal = mask is None and q.shape[2] > 1
    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return out[..., :v_dim].transpose(1, 2).flatten(2)


class MythosGQA(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): n_heads queries share n_kv_heads keys and values."""

    def __init__(self, config: Config):
        super().__init__()
        self.d, self.dropout = config.key_dim, config.dropout
        q_dim, kv_dim = config.n_heads * self.d, config.n_kv_heads * self.d
        self.scale = config.softmax_scale * config.query_factor  # all channels are rotary
        self.wq = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(q_dim, config.dim, bias=False)
        self.qk_norm = MythosNorm(self.d, config.norm_eps) if config.qk_norm else None
        self.k_norm = MythosNorm(self.d, config.norm_eps) if config.key_norm_weight else None

    def keys_and_values(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, D) -> what is cached: keys and values, (B, K, S, d) each."""
        k, v = (part.unflatten(-1, (-1, self.d)).transpose(1, 2) for part in (self.wk(x), self.wv(x)))
        if self.k_norm is not None:
            k = self.k_norm(k)
        elif self.qk_norm is not None:
            k = rms_normalize(k, self.qk_norm.eps)
        return rotate(k, rope), v

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        """x (B, S, D), and keys and values of all T tokens -> (B, S, D)."""
        q = self.wq(x).unflatten(-1, (-1, self.d)).transpose(1, 2)
        q = rotate(q if self.qk_norm is None else self.qk_norm(q), rope)
        return self.wo(attend(q, k, v, mask, self.dropout if self.training else 0.0, self.scale))


class MythosMLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are computed from one narrow latent per token.

    A head's query and key have channels without position and rotary channels; all heads share the rotary key.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.dropout, self.scale, self.query_factor = config.dropout, config.softmax_scale, config.query_factor
        self.nope, self.rope, self.v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent, heads = config.kv_lora_rank, config.n_heads
        self.q_down = nn.Linear(config.dim, config.q_lora_rank, bias=False)
        self.q_norm = MythosNorm(config.q_lora_rank, config.norm_eps)
        self.q_up = nn.Linear(config.q_lora_rank, heads * config.key_dim, bias=False)
        self.kv_down = nn.Linear(config.dim, self.latent + self.rope, bias=False)
        self.kv_norm = MythosNorm(self.latent, config.norm_eps)
        self.kv_up = nn.Linear(self.latent, heads * (self.nope + self.v), bias=False)
        self.wo = nn.Linear(heads * self.v, config.dim, bias=False)
        self.qk_norm = MythosNorm(config.key_dim, config.norm_eps) if config.qk_norm else None

    def keys_and_values(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, D) -> what is cached: the rotary key (B, 1, S, R) and the latent (B, 1, S, L)."""
        latent, k_rope = self.kv_down(x).unsqueeze(1).split([self.latent, self.rope], dim=-1)
        return rotate(k_rope, rope), latent

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        """x (B, S, D), rotary keys and latents of all T tokens -> (B, S, D)."""
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (-1, self.nope + self.rope)).transpose(1, 2)
        q_nope, q_rope = (q if self.qk_norm is None else self.qk_norm(q)).split([self.nope, self.rope], dim=-1)
        q_rope = rotate(q_rope, rope)
        if self.query_factor != 1.0:  # not the keys: their norm below is that of rotated keys
            q_rope = q_rope * self.query_factor
        q = torch.cat([q_nope, q_rope], dim=-1)  # (B, H, S, d)
        kv = self.kv_up(self.kv_norm(v.squeeze(1))).unflatten(-1, (-1, self.nope + self.v)).transpose(1, 2)
        k_nope, values = kv.split([self.nope, self.v], dim=-1)  # (B, H, T, -)
        keys = torch.cat([k_nope, k.expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        if self.qk_norm is not None:
            keys = rms_normalize(keys, self.qk_norm.eps)
        return self.wo(attend(q, keys, values, mask, self.dropout if self.training else 0.0, self.scale))


class MythosFFN(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MythosRouter(nn.Module):
    """Selects k experts per token by logits + bias, in fp32; the weights are a softmax of the selected logits.

    Training has set the bias so that the load is balanced (DeepSeek-V3, 2024); here it is constant.
    """

    bias: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.k = config.n_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.register_buffer("bias", torch.zeros(config.n_experts))

    def _apply(self, fn, recurse=True):
        """Move the bias with the model, but never cast it: its steps of 1e-3 are below the resolution of bf16."""
        exact = self.bias
        super()._apply(fn, recurse)
        if not self.bias.is_meta and not exact.is_meta:
            self.bias = exact.to(self.bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, D) -> weights (N, k) fp32, index (N, k)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        index = (logits.detach() + self.bias).topk(self.k, dim=-1).indices
        return logits.gather(-1, index).softmax(-1), index


class MythosExperts(nn.Module):
    """The routed experts: E SwiGLU networks as three stacks; w1 is gate, w3 up, w2 down (transposed)."""

    def __init__(self, config: Config):
        super().__init__()
        shape = (config.n_experts, config.expert_dim, config.dim)
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.empty(shape)) for _ in range(3))

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x (N, D), weights and index (N, k) -> the weighted sum (N, D) of each token's experts."""
        expert, order = index.flatten().sort(stable=True)  # rows sorted by expert: one product for all of them
        ends = torch.searchsorted(expert, torch.arange(len(self.w1), device=x.device), right=True).int()
        token = order // index.shape[1]
        rows = x.index_select(0, token)  # (M, D)
        hidden = F.silu(grouped_gemm(rows, self.w1.mT, ends)) * grouped_gemm(rows, self.w3.mT, ends)
        y = grouped_gemm(hidden, self.w2, ends) * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, y.to(x.dtype))


def grouped_gemm(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Rows (M, I) of group g, those before ends[g], times stack[g] (I, O) -> (M, O)."""
    aligned = all(width * rows.element_size() % 16 == 0 for width in stack.shape[1:])
    if aligned and hasattr(F, "grouped_mm") and rows.device.type in ("cpu", "cuda"):
        return F.grouped_mm(rows, stack, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(sizes), stack, strict=True)])


class MythosMoE(nn.Module):
    """Routed experts plus the shared ones, which are one SwiGLU with the sum of their widths."""

    def __init__(self, config: Config):
        super().__init__()
        self.router = MythosRouter(config)
        self.experts = MythosExperts(config)
        shared = config.n_shared_experts * config.expert_dim * config.n_experts_per_tok
        self.shared = MythosFFN(config.dim, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        rows = x.flatten(0, 1)
        y = self.experts(rows, *self.router(rows))
        return (y if self.shared is None else y + self.shared(rows)).view_as(x)


class MythosBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block: x + factor * attn(norm(x)), then x + factor * ffn(norm(x))."""

    def __init__(self, config: Config, ffn: nn.Module, factor: float = 1.0):
        super().__init__()
        self.factor = factor
        self.attn_norm = MythosNorm(config.dim, config.norm_eps)
        self.attn = MythosMLA(config) if config.attn_type == "mla" else MythosGQA(config)
        self.ffn_norm = MythosNorm(config.dim, config.norm_eps)
        self.ffn = ffn
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        past_key_values: Any = None,
        slot: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x (B, S, D) -> the same shape, and the keys and values that were used: k and v, if given, else its own."""
        normed = self.attn_norm(x)
        if k is None or v is None:
            k, v = self.attn.keys_and_values(normed, rope)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, slot)
        x = x + self.factor * F.dropout(self.attn(normed, rope, mask, k, v), self.dropout, self.training)
        return x + self.factor * F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training), k, v


class MythosDepthLoRA(nn.Module):
    """A low-rank correction that depends on the loop (Bae et al. 2024): u + ((u @ down^T) * scale[t]) @ B.

    lora=per_loop: each loop has its own down and B instead of a row of scale.
    """

    def __init__(self, config: Config):
        super().__init__()
        table = (config.max_loop_iters,) if config.lora == "per_loop" else ()
        self.rows = config.max_loop_iters
        self.down = nn.Parameter(torch.empty(*table, config.lora_rank, config.dim))
        self.B = nn.Parameter(torch.empty(*table, config.lora_rank, config.dim))
        self.scale = None if table else nn.Parameter(torch.empty(config.max_loop_iters, config.lora_rank))

    def forward(self, u: Tensor, t: int) -> Tensor:
        """u (..., D) of loop t -> the same shape; loops beyond the table use its last row."""
        t = min(t, self.rows - 1)
        if self.scale is None:
            return u + F.linear(u, self.down[t]) @ self.B[t]
        return u + (F.linear(u, self.down) * self.scale[t]) @ self.B


class MythosInjection(nn.Module):
    """OpenMythos' injection: decay = exp(-exp(log_dt + log_A)) and scale = B, per channel."""

    def __init__(self, config: Config):
        super().__init__()
        self.log_A = nn.Parameter(torch.zeros(config.dim))
        self.log_dt = nn.Parameter(torch.zeros(1))
        self.B = nn.Parameter(torch.full((config.dim,), 0.1))

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """e (B, S, D) -> decay (D,), scale * e."""
        decay = torch.exp(-torch.exp((self.log_dt.float() + self.log_A.float()).clamp(-20, 20)))
        return decay.to(e.dtype), self.B * e


class MythosDifferenceInjection(nn.Module):
    """The block's input is h + B * (e - h), with B per channel."""

    def __init__(self, config: Config):
        super().__init__()
        self.B = nn.Parameter(torch.zeros(config.dim))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """h and e (B, S, D) -> (B, S, D)."""
        return torch.lerp(h, e, self.B)


class MythosParcaeInjection(nn.Module):
    """Parcae's: decay = exp(-dt * exp(log_A)), scale = dt = softplus(delta) per channel, and B is a matrix."""

    def __init__(self, config: Config):
        super().__init__()
        self.log_A = nn.Parameter(torch.zeros(config.dim))
        self.delta = nn.Parameter(torch.zeros(config.dim))
        self.B = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """e (B, S, D) -> decay (D,), scale * B e."""
        dt = F.softplus(self.delta.float())
        decay = torch.exp(-dt * torch.exp(self.log_A.float().clamp(-20, 20)))
        return decay.to(e.dtype), dt.to(e.dtype) * self.B(e)


class MythosHalting(nn.Module):
    """The weight of each loop's hidden state in the output (ACT, Graves 2016; PonderNet, Banino et al. 2021)."""

    def __init__(self, config: Config):
        super().__init__()
        self.mode, self.threshold = config.act_mode, config.act_threshold
        self.halt = nn.Linear(config.dim, 1)

    def forward(self, h: Tensor, cum_halting: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        """h (B, S, D), probability (B, S, 1) fp32 of having halted before -> weight of h, probability after it."""
        if self.mode == "off":
            return torch.full_like(cum_halting, float(is_last)), cum_halting
        p, running = torch.sigmoid(self.halt(h).float()), cum_halting < self.threshold
        if self.mode == "ponder":
            weight = (1 - cum_halting) * (1 if is_last else p)
            after = cum_halting + weight
            if self.training and torch.is_grad_enabled():
                return weight, after
            return (running & ((after >= self.threshold) | is_last)).float(), after
        # A token that reaches the threshold gets the remainder of 1; `safe` gives it to all others in the last loop.
        after = cum_halting + p * running
        halts = (after >= self.threshold) | (is_last and self.mode == "safe")
        return torch.where(halts, (1 - cum_halting) * running, p * running), after
