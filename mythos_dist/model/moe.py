"""The mixture of experts: a router that keeps its load even, routed experts, and the shared experts as one FFN.

Selection: top-k of logits + bias; weights: softmax(logits) of the selected, renormalised. The bias follows the load
after each optimizer step, bias += rate * sign(mean load - load) (DeepSeek-V3, 2024), and never enters the gradient.
The trap: the bias moves by 1e-3 and bf16 cannot hold such a step, so it stays fp32 whatever the model is cast to.
"""

# B batch, S sequence (S' of it on this rank: S / tensor with sequence parallelism, else S), N = B * S tokens, D model,
# E experts, k experts per token.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.model.experts import Experts, SwiGLU, count_tokens
from mythos_dist.model.recompute import recomputed
from mythos_dist.parallel.collectives import enter, gather, leave, sum_over
from mythos_dist.parallel.mesh import SINGLE, Mesh
from mythos_dist.parallel.tensor import CutLinear, cut_parameter, whole_on_every_rank


class RouterStats(NamedTuple):
    """What one pass through the mixture leaves for the objective and the load balance."""

    counts: Tensor  # (E,) int64: (token, expert) pairs of this replica
    loss: Tensor  # (): weighted auxiliary losses; this rank's part of the sum over the ranks that share a sequence


class FFN(nn.Module):
    """Dense SwiGLU: down(silu(gate(x)) * up(x)), its hidden width cut over the tensor axis."""

    def __init__(self, dim: int, hidden: int, mesh: Mesh = SINGLE, selective: bool = False):
        super().__init__()
        self.gate = CutLinear(dim, hidden, "outputs", mesh)
        self.up = CutLinear(dim, hidden, "outputs", mesh)
        self.down = CutLinear(hidden, dim, "inputs", mesh)
        self.selective = selective

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, D) whole -> this tensor rank's partial sum (B, S, D); callers `enter` before and `leave` after."""
        return recomputed(self.selective, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        return self.down(SwiGLU.apply(self.gate(x), self.up(x), None))


class Router(nn.Module):
    """Chooses k experts per token, in fp32."""

    bias: Tensor

    def __init__(self, config: MythosConfig, experts: ExpertsConfig, mesh: Mesh):
        super().__init__()
        self.k = config.n_experts_per_tok
        self.experts = experts
        self.mesh = mesh
        self.weight = cut_parameter((config.n_experts, config.dim), {})
        self.register_buffer("bias", torch.zeros(config.n_experts))
        whole_on_every_rank(self, mesh)

    def _apply(self, fn, recurse=True):
        """Move the bias with the module, but never cast it (DeepSpeed casts the whole model to bf16)."""
        exact = self.bias
        super()._apply(fn, recurse)
        if not self.bias.is_meta and not exact.is_meta:
            self.bias = exact.to(self.bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S', D) -> weights (B, S', k) fp32, index (B, S', k) int64, weighted auxiliary losses ()."""
        logits = F.linear(x.float(), self.weight.float())  # (B, S', D) -> (B, S', E)
        scores = logits.softmax(-1)
        index = (logits.detach() + self.bias).topk(self.k, dim=-1).indices
        weights = scores.gather(-1, index)
        return weights / weights.sum(-1, keepdim=True), index, self._losses(logits, scores)

    def _losses(self, logits: Tensor, scores: Tensor) -> Tensor:
        """ST-MoE's z-loss and DeepSeek-V3's sequence-wise balance loss, each times its weight: ()."""
        loss = logits.new_zeros(())
        parts = self.mesh.tensor.size if self.mesh.sequence else 1  # ranks that a sequence's tokens are spread over
        if self.experts.z_loss:
            loss = loss + self.experts.z_loss * logits.logsumexp(-1).square().mean() / parts
        if self.experts.sequence_balance_loss:
            n_experts = scores.shape[-1]
            chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(self.k, dim=-1).indices, 1.0)
            share = chosen.mean(1) * (n_experts / self.k)  # f_i in the paper, per sequence: (B, E)
            if self.mesh.sequence:
                share = sum_over(share, self.mesh.tensor) / parts
            loss = loss + self.experts.sequence_balance_loss * (share * scores.mean(1)).sum(-1).mean() / parts
        return loss

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower the others'; counts (E,) of the whole step."""
        load = counts.to(self.bias.device, torch.float32)
        self.bias += self.experts.bias_update_rate * torch.sign(load.mean() - load)


class MoE(nn.Module):
    """Routed experts plus shared experts. The shared ones' sum is exactly one SwiGLU of their widths together."""

    def __init__(self, config: MythosConfig, experts: ExpertsConfig, mesh: Mesh = SINGLE, selective: bool = False):
        super().__init__()
        self.mesh = mesh
        self.router = Router(config, experts, mesh)
        self.experts = Experts(config, experts.backend, mesh, selective)
        self.shared = FFN(config.dim, config.shared_dim, mesh, selective) if config.shared_dim else None

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats]:
        """x (B, S', D) -> y (B, S', D) and the router's statistics."""
        weights, index, loss = self.router(x)
        if self.mesh.sequence:
            index = gather(index.to(torch.int32), self.mesh.tensor, 1).long()
        weights, index = enter(weights, self.mesh).flatten(0, 1), index.flatten(0, 1)  # (N, k)
        x = enter(x, self.mesh)  # once for the routed and the shared experts
        y = self.experts(x.flatten(0, 1), weights, index).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return leave(y, self.mesh), RouterStats(count_tokens(index, self.experts.n_experts), loss)
