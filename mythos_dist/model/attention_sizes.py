"""What an attention layer needs on a rank, by kind: one class for each class of attention.py.

A new attention layer is described here once, for FLOPs, caches, what loops share, and the planner's memory and
messages. All sizes are per token. What is the same for every kind (its input, the sum of its output over the tensor
axis) is in `ops/plan`.

Decisions: PLAN-8.
"""

# H heads here, d and v channels of a query and a value head, b bytes of an element.

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from mythos_dist.config.schema import MythosConfig


@dataclass(frozen=True)
class AttentionSizes:
    """The sizes of a layer on one of `tensor` ranks, with elements of `b` bytes."""

    c: MythosConfig
    tensor: int = 1
    b: int = 2

    # Projections by name; each has its own FLOPs (model/flops.py), the others are counted together.
    kv_projections: ClassVar[tuple[str, ...]]  # of what loops share: not applied by loops that use it
    query_expansions: ClassVar[tuple[str, ...]] = ()  # from a latent to queries; recomputed by `recompute: selective`
    kv_expansions: ClassVar[tuple[str, ...]] = ()  # from a latent to keys and values; recomputed as well

    @property
    def heads(self) -> int:
        return self.c.n_heads // self.tensor

    def padded(self, width: int) -> int:
        """Channels of all ranks together; shards are padded (parallel/tensor.py: shard_range)."""
        return ceil(width / self.tensor) * self.tensor

    @property
    def pair_channels(self) -> int:
        """Channels of a key and a value, which each (query, key) pair multiplies with."""
        raise NotImplementedError

    @property
    def cached(self) -> int:
        """Elements in the cache of one process, in one loop."""
        raise NotImplementedError

    @property
    def kv_width(self) -> int:
        """Channels that the loops of one layer share, and that ranks of the context axis exchange."""
        raise NotImplementedError

    @property
    def gathered_queries(self) -> int:
        """Channels that ranks of the tensor axis gather in every loop."""
        return 0

    @property
    def gathered_kv(self) -> int:
        """Channels that they gather where keys and values are computed."""
        raise NotImplementedError

    def saved(self, selective: bool, context: bool) -> float:
        """Bytes that autograd saves, from queries to the input of `wo`. context: with a context axis."""
        raise NotImplementedError

    def shared(self) -> float:
        """Bytes of what loops share, as it is stored."""
        return self.kv_width * self.b

    def saved_by_loop(self, selective: bool, context: bool) -> float:
        """The part of `saved` that every loop saves, also one that shares keys and values with others."""
        return self.saved(selective, context) - self.shared()

    def gradients(self) -> float:
        """Bytes of the gradients of queries, keys, values and output in the backward pass."""
        raise NotImplementedError

    @property
    def norms_expanded_keys(self) -> bool:
        """Whether keys that come over the context axis still have to be normed."""
        return False


class GQASizes(AttentionSizes):
    """The sizes of `GQAttention`."""

    kv_projections = ("wk", "wv")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values that the rank's queries attend to."""
        return self.heads if self.c.n_kv_heads % self.tensor else self.c.n_kv_heads // self.tensor

    @property
    def pair_channels(self) -> int:
        return 2 * self.c.head_dim

    @property
    def cached(self) -> int:
        """Keys and values."""
        return 2 * self.c.n_kv_heads * self.c.head_dim

    @property
    def kv_width(self) -> int:
        """Keys and values."""
        return 2 * self.kv_heads * self.c.head_dim

    @property
    def gathered_kv(self) -> int:
        """Both, if their heads do not divide."""
        return 2 * self.padded(self.c.n_kv_heads * self.c.head_dim) if self.c.n_kv_heads % self.tensor else 0

    def saved(self, selective: bool, context: bool) -> float:
        c, b, heads = self.c, self.b, self.heads + self.kv_heads
        elements = 2 * heads * c.head_dim  # queries, keys, values, output
        if selective:
            return elements * b
        normed = heads * (c.head_dim * b + 4) if c.qk_norm else 0
        return elements * b + 4 * self.heads + normed  # and the log-sum-exp

    def saved_by_loop(self, selective: bool, context: bool) -> float:
        """Rotated keys are of each loop, so that it shares values, and keys before their norm."""
        part = 1 if selective else (1 + self.c.qk_norm) / 2
        return self.saved(selective, context) - part * self.shared()

    def gradients(self) -> float:
        return 2 * (self.heads + self.kv_heads) * self.c.head_dim * self.b


class MLASizes(AttentionSizes):
    """The sizes of `MLAttention`."""

    kv_projections = ("kv_down",)
    query_expansions = ("q_up",)
    kv_expansions = ("kv_up",)

    @property
    def pair_channels(self) -> int:
        return self.c.head_dim + self.c.v_head_dim

    @property
    def cached(self) -> int:
        """The latent, the rotary key, and with qk_norm the scale of each head's key, which depends on the expanded key
        (DECODE-3)."""
        return self.kv_width + (self.c.n_heads if self.c.qk_norm else 0)

    @property
    def kv_width(self) -> int:
        """Latent and rotary key, in full."""
        return self.c.kv_lora_rank + self.c.qk_rope_head_dim

    @property
    def gathered_queries(self) -> int:
        """Their latent."""
        return self.padded(self.c.q_lora_rank)

    @property
    def gathered_kv(self) -> int:
        return self.padded(self.kv_width)

    def saved(self, selective: bool, context: bool) -> float:
        c, b, H, d, v = self.c, self.b, self.heads, self.c.head_dim, self.c.v_head_dim
        latents = self.gathered_queries + self.gathered_kv
        if selective:
            return (latents + H * v) * b
        normed, unpadded = c.q_lora_rank + c.kv_lora_rank, v if v < d else 0  # of the output
        if context:  # queries, output, output unpadded; entries instead of keys and values
            heads = H * (2 * max(d, v) + unpadded) * b + 4 * H + (H * (d * b + 4) if c.qk_norm else 0)
            return (latents + normed + self.gathered_kv) * b + heads + 8
        values = d if v < d else c.qk_nope_head_dim + v  # padded, or a view of the product
        heads = H * (3 * max(d, v) + values + unpadded) * b + 4 * H  # queries, keys, output; and the log-sum-exp
        if c.qk_norm:
            heads += 2 * H * (d * b + 4)  # queries and keys before their norms
        return (latents + normed) * b + heads + 8

    def shared(self) -> float:
        return self.gathered_kv * self.b

    def gradients(self) -> float:
        d, v = self.c.head_dim, self.c.v_head_dim
        return (4 * max(d, v) - (v if v < d else 0)) * self.heads * self.b  # not of the output unpadded

    @property
    def norms_expanded_keys(self) -> bool:
        return self.c.qk_norm


def attention_sizes(config: MythosConfig, tensor: int = 1, b: int = 2) -> AttentionSizes:
    """The sizes of the config's kind of attention."""
    return (MLASizes if config.attn_type == "mla" else GQASizes)(config, tensor, b)
