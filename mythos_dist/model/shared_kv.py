"""Keys and values that several loops attend to (model.kv_sharing): what is shared, and its shape.

Decisions: LOOPS-8.
"""

# B batch, S tokens, W channels per token.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mythos_dist.config.schema import MythosConfig
from mythos_dist.model.attention_sizes import attention_sizes
from mythos_dist.model.loops import where_active


class SharedKV(NamedTuple):
    """Keys and values that an earlier loop has computed (model.kv_sharing), before norms and rotation."""

    kv: Tensor  # (B, S, W), see `AttentionSizes.kv_width`
    renewed: Tensor | None  # bool (B,): sequences that compute their own, because their loops begin a group; None: none


def merge_kv(new: Tensor | None, shared: SharedKV | None) -> Tensor:
    """What a loop attends to (B, S, W): `new` for the sequences that compute their own, else the shared."""
    if shared is None or new is None:
        kv = new if shared is None else shared.kv
        assert kv is not None
        return kv
    return where_active(shared.renewed, new, shared.kv)


def kv_by_layer(kv: Tensor, layers: int) -> Sequence[Tensor]:
    """What loops share (B, S, W) -> each layer's part."""
    return (kv,) if layers == 1 else kv.chunk(layers, dim=-1)


def join_kv(parts: list[Tensor | None]) -> Tensor | None:
    """The inverse of `kv_by_layer`; None if the layers share nothing."""
    tensors = [part for part in parts if part is not None]
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    return torch.cat(tensors, dim=-1)


def shared_kv_shape(config: MythosConfig, batch: int, seq_len: int, tensor: int) -> torch.Size | None:
    """(B, S, W) of what the loops of all layers share; None: every loop has keys and values of its own."""
    width = config.loop_layers * attention_sizes(config, tensor).kv_width
    return torch.Size([batch, seq_len, width]) if config.kv_loops > 1 else None
