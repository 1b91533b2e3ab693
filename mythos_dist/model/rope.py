"""Rotary positions (RoPE, Su et al. 2021), also for contexts longer than the one that a model was trained with.

Channel pair i of a query or key at position p is rotated by the angle p * f[i], f[i] = theta^(-2 i / R). Stretched by
a factor s: `linear` (position interpolation, Chen et al. 2023) divides all f by s; `yarn` (Peng et al. 2023) keeps
those that rotate often within the original length, divides the slow ones, and sharpens the softmax; `llama3`
(Grattafiori et al. 2024) keeps and divides by other borders, and leaves the softmax as it is.
Frequencies and factors are those of transformers' modeling_rope_utils.py for the same settings.

The trap: transformers multiplies rotated queries and keys by the attention factor. Here queries get its square and
keys nothing, so that a key keeps its length: MLA normalizes keys after the rotation (`model.qk_norm`).

Decisions: MODEL-3, MODEL-19.
"""

# R rotary channels.

import math
from typing import Any

import torch
from torch import Tensor

from mythos_dist.config.schema import (
    BETA_FAST,
    BETA_SLOW,
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    MythosConfig,
    RopeScaling,
)

# Fields of RopeScaling by the names that transformers has for them.
_THEIRS = {"rope_type": "kind", "original_max_position_embeddings": "original_max_seq_len"}


def rope_frequencies(config: MythosConfig, device: torch.device | str = "cpu") -> Tensor:
    """Angles per position of the channel pairs, (R / 2,) fp32. Without scaling they are OpenMythos' to the bit."""
    exponents = torch.arange(0, config.rope_dim, 2, device=device, dtype=torch.float32) / config.rope_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    share_kept = _share_kept if scaling.kind == "yarn" else _share_kept_of_llama3
    kept = share_kept(config, scaling, device)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def _share_kept(config: MythosConfig, scaling: RopeScaling, device: torch.device | str) -> Tensor:
    """YaRN: which share of each frequency is not divided by the factor, (R / 2,) fp32: 1, a ramp, 0."""
    R, original = config.rope_dim, scaling.original_max_seq_len

    def pair_of(rotations: float) -> float:
        """The index, as a fraction, of the pair that rotates so often within the original length."""
        return R * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_of(scaling.beta_fast or BETA_FAST), pair_of(scaling.beta_slow or BETA_SLOW)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    if low == high:
        high += 0.001  # as in transformers: a step
    ramp = (torch.arange(R // 2, device=device, dtype=torch.float32) - low) / (high - low)
    return 1 - ramp.clamp(0, 1)


def _share_kept_of_llama3(config: MythosConfig, scaling: RopeScaling, device: torch.device | str) -> Tensor:
    """As `_share_kept`, by how often a pair rotates within the original length."""
    exponents = torch.arange(0, config.rope_dim, 2, device=device, dtype=torch.float32) / config.rope_dim
    rotations = scaling.original_max_seq_len / config.rope_theta**exponents / (2 * math.pi)
    low, high = scaling.low_freq_factor or LOW_FREQ_FACTOR, scaling.high_freq_factor or HIGH_FREQ_FACTOR
    return ((rotations - low) / (high - low)).clamp(0, 1)


def query_factor(config: MythosConfig) -> float:
    """What rotated channels of queries are multiplied by: the square of transformers' attention factor."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return (_mscale(scaling.factor, 1.0) if factor is None else factor) ** 2


def softmax_scale(config: MythosConfig) -> float:
    """What products of queries and keys are multiplied by, d^-0.5; with MLA and `mscale_all_dim` as DeepSeek-V3."""
    scale, scaling = config.head_dim**-0.5, config.rope_scaling
    if scaling is None or config.attn_type != "mla" or not scaling.mscale_all_dim:
        return scale
    return scale * _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def to_hugging_face(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """transformers' `rope_scaling`."""
    if scaling is None:
        return None
    ours = {name: value for name, value in vars(scaling).items() if value is not None}
    theirs = {ours_name: their_name for their_name, ours_name in _THEIRS.items()}
    return {theirs.get(name, name): value for name, value in ours.items()}


def from_hugging_face(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """The inverse of `to_hugging_face`, as the fields of RopeScaling, which are not checked; ours pass unchanged."""
    if scaling is None:
        return None
    return {_THEIRS.get(name, name): value for name, value in scaling.items()}
