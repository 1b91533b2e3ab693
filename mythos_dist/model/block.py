"""A pre-norm transformer block: x + attn(norm(x)), then x + ffn(norm(x)); dense, or with the mixture of experts."""

import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.model.attention import Context, GQAttention, MLAttention
from mythos_dist.model.moe import FFN, MoE, RouterStats


class _ResidualBlock(nn.Module):
    """Norms, attention and dropout, the same for both kinds of block."""

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attn = MLAttention(config) if config.attn_type == "mla" else GQAttention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.dropout = config.dropout

    def _attend(self, x: Tensor, context: Context, cache_key: str) -> Tensor:
        return x + F.dropout(self.attn(self.attn_norm(x), context, cache_key), self.dropout, self.training)


class DenseBlock(_ResidualBlock):
    """A block of the prelude or the coda."""

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.ffn = FFN(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, context: Context, cache_key: str) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = self._attend(x, context, cache_key)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)


class MoEBlock(_ResidualBlock):
    """The block that is looped."""

    def __init__(self, config: MythosConfig, experts: ExpertsConfig):
        super().__init__(config)
        self.ffn = MoE(config, experts)

    def forward(self, x: Tensor, context: Context, cache_key: str) -> tuple[Tensor, RouterStats]:
        """(B, S, D) -> (B, S, D) and the router's statistics."""
        x = self._attend(x, context, cache_key)
        y, stats = self.ffn(self.ffn_norm(x))
        return x + F.dropout(y, self.dropout, self.training), stats
