"""A pre-norm transformer block: x + attn(norm(x)), then x + ffn(norm(x)); dense, or with the mixture of experts.

Decisions: PARALLEL-10.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.model.attention import GQAttention, MLAttention, PassContext
from mythos_dist.model.chunks import TokenChunks, concatenate
from mythos_dist.model.kv_cache import CacheKey
from mythos_dist.model.moe import FFN, MoE, RouterStats
from mythos_dist.model.norm import Norm
from mythos_dist.model.shared_kv import SharedKV
from mythos_dist.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.ranges import in_range
from mythos_dist.parallel.tensor import replicated


class _ResidualBlock(nn.Module):
    """Norms, attention and dropout, which both kinds of block share."""

    def __init__(self, config: MythosConfig, mesh: Mesh, selective: bool, shares_kv: bool):
        super().__init__()
        self.mesh = mesh
        self.attn_norm = replicated(Norm(config.dim, config.norm_eps), mesh)
        self.attn = (MLAttention if config.attn_type == "mla" else GQAttention)(config, mesh, selective, shares_kv)
        self.ffn_norm = replicated(Norm(config.dim, config.norm_eps), mesh)
        self.dropout = config.dropout
        self.factor = 1.0  # of what is added to the residual stream

    @in_range("attention")
    def _attend(
        self, x: Tensor, context: PassContext, cache_key: CacheKey, shared: SharedKV | None = None
    ) -> tuple[Tensor, Tensor | None]:
        partial, kv = self.attn(enter_tensor_parallel(self.attn_norm(x), self.mesh), context, cache_key, shared)
        y = leave_tensor_parallel(partial, self.mesh)
        return self._add(x, y), kv

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            y = F.dropout(y, self.dropout)
        return torch.add(x, y, alpha=self.factor)


class DenseBlock(_ResidualBlock):
    """A block of the prelude or coda."""

    def __init__(self, config: MythosConfig, mesh: Mesh, selective: bool = False, chunk_tokens: int = 0):
        super().__init__(config, mesh, selective, shares_kv=False)
        self.chunks = TokenChunks(chunk_tokens, mesh)
        self.ffn = FFN(config.dim, config.ffn_dim, mesh, selective and not chunk_tokens)

    def forward(self, x: Tensor, context: PassContext, cache_key: CacheKey) -> Tensor:
        """(B, S or S / tensor, D) -> same shape."""
        x, _ = self._attend(x, context, cache_key)
        seq_len = round(x.shape[1] / context.token_share(x))
        return self._add(x, self.feed_forward(self.ffn_norm(x), seq_len))

    def feed_forward(self, x: Tensor, seq_len: int) -> Tensor:
        """Normed tokens (B, S or S / tensor, D) of sequences of `seq_len` tokens -> same shape. With ZeRO-3 every chunk
        gathers the weights, over the context axis too."""
        chunks = [self._feed_chunk_forward(chunk) for (chunk,) in self.chunks.split(x, seq_len=seq_len)]
        return concatenate(chunks, x)

    def _feed_chunk_forward(self, x: Tensor) -> Tensor:
        y = self.chunks.recompute(self._partial_sums, x)
        return leave_tensor_parallel(y.view(len(x), -1, x.shape[-1]), self.mesh)

    def _partial_sums(self, x: Tensor) -> Tensor:
        """(b, s, D) -> (tokens, D) of all tensor ranks' tokens."""
        return self.ffn(enter_tensor_parallel(x, self.mesh).flatten(0, 1))


class MoEBlock(_ResidualBlock):
    """A layer of the recurrent block."""

    def __init__(
        self,
        config: MythosConfig,
        experts: ExpertsConfig,
        mesh: Mesh,
        selective: bool = False,
        chunk_tokens: int = 0,
    ):
        super().__init__(config, mesh, selective, shares_kv=config.kv_loops > 1)
        self.factor = config.residual_factor
        self.ffn = MoE(config, experts, mesh, selective, chunk_tokens)

    def forward(
        self, x: Tensor, context: PassContext, cache_key: CacheKey, shared: SharedKV | None = None
    ) -> tuple[Tensor, RouterStats, Tensor | None]:
        """(B, S or S / tensor, D) -> same shape, the router's statistics, and with model.kv_sharing the keys and values
        that later loops share (B, S, W)."""
        x, kv = self._attend(x, context, cache_key, shared)
        y, stats = self.ffn(self.ffn_norm(x), context.token_share(x), context.counts_experts)
        return self._add(x, y), stats, kv
