"""The mixture of experts: a router that keeps its load even, routed experts, and the shared experts as one FFN.

Selection: top-k of logits + bias; weights: softmax(logits) of the selected, renormalised. The bias follows the load
after each optimizer step, bias += rate * sign(mean load - load) (DeepSeek-V3, 2024), and never enters the gradient.
The trap: the bias moves by 1e-3 and bf16 cannot hold such a step, so it stays fp32 whatever the model is cast to.
"""

# B batch, S sequence, N = B * S tokens, D model, E experts, k experts per token.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.model.experts import Experts, SwiGLU


class RouterStats(NamedTuple):
    """What one pass through the mixture leaves for the objective and the load balance."""

    counts: Tensor  # (E,) int64: rows per expert
    loss: Tensor  # (): weighted auxiliary losses, to be added to the objective


class FFN(nn.Module):
    """Dense SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(SwiGLU.apply(self.gate(x), self.up(x), None))


class Router(nn.Module):
    """Chooses k experts per token, in fp32."""

    bias: Tensor

    def __init__(self, config: MythosConfig, experts: ExpertsConfig):
        super().__init__()
        self.k = config.n_experts_per_tok
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.register_buffer("bias", torch.zeros(config.n_experts))

    def _apply(self, fn, recurse=True):
        """Move the bias with the module, but never cast it (DeepSpeed casts the whole model to bf16)."""
        exact = self.bias
        super()._apply(fn, recurse)
        if not self.bias.is_meta and not exact.is_meta:
            self.bias = exact.to(self.bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) -> weights (N, k) fp32, index (N, k) int64, weighted auxiliary losses ()."""
        logits = F.linear(x.float(), self.weight.float())  # (B, S, D) -> (B, S, E)
        scores = logits.softmax(-1)
        index = (logits.detach() + self.bias).topk(self.k, dim=-1).indices
        weights = scores.gather(-1, index)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights.flatten(0, 1), index.flatten(0, 1), self._losses(logits, scores)

    def _losses(self, logits: Tensor, scores: Tensor) -> Tensor:
        """ST-MoE's z-loss and DeepSeek-V3's sequence-wise balance loss, each times its weight: ()."""
        loss = logits.new_zeros(())
        if self.experts.z_loss:
            loss = loss + self.experts.z_loss * logits.logsumexp(-1).square().mean()
        if self.experts.sequence_balance_loss:
            n_experts = scores.shape[-1]
            chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(self.k, dim=-1).indices, 1.0)
            share = chosen.mean(1) * (n_experts / self.k)  # f_i in the paper, per sequence: (B, E)
            loss = loss + self.experts.sequence_balance_loss * (share * scores.mean(1)).sum(-1).mean()
        return loss

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower the others'; counts (E,) of the whole step."""
        load = counts.to(self.bias.device, torch.float32)
        self.bias += self.experts.bias_update_rate * torch.sign(load.mean() - load)


class MoE(nn.Module):
    """Routed experts plus shared experts. The shared ones' sum is exactly one SwiGLU of their widths together."""

    def __init__(self, config: MythosConfig, experts: ExpertsConfig):
        super().__init__()
        self.router = Router(config, experts)
        self.experts = Experts(config, experts.backend)
        self.shared = FFN(config.dim, config.shared_dim) if config.shared_dim else None

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """x (B, S, D) -> y (B, S, D) and the router's statistics."""
        weights, index, loss = self.router(x)
        y, counts = self.experts(x.flatten(0, 1), weights, index)
        y = y.view_as(x)
        return (y if self.shared is None else y + self.shared(x)), RouterStats(counts, loss)
