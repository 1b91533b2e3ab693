"""The mixture of experts: a router with load balancing, routed experts, and the shared experts as one FFN.

Selection: top-k of logits + bias; weights: softmax(logits) of the selected, renormalized. The bias follows the load
after each optimizer step, bias += rate * sign(mean load - load) (DeepSeek-V3, 2024), and never enters the gradient.
The trap: the bias changes by 1e-3, too small a step for bf16, so it stays fp32 whatever the model is cast to.

Decisions: MODEL-1, MODEL-5.
"""

# B batch, S tokens of a sequence on this rank of the context axis (S' = S / tensor of them with sequence parallelism,
# else S), N = B * S tokens, D model,
# E experts, k experts per token.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.model.activations import UNSET
from mythos_dist.model.chunks import TokenChunks, concatenate
from mythos_dist.model.experts import Experts
from mythos_dist.model.grouped import tokens_per_expert
from mythos_dist.model.recompute import checkpoint_if
from mythos_dist.model.swiglu import GatedLinear
from mythos_dist.parallel.collectives import (
    all_gather,
    enter_tensor_parallel,
    leave_tensor_parallel,
    sum_over_sequence,
)
from mythos_dist.parallel.expert import Route, combine
from mythos_dist.parallel.mesh import SINGLE, Mesh
from mythos_dist.parallel.ranges import in_range
from mythos_dist.parallel.tensor import ParallelLinear, replicated, shard_parameter


class RouterStats(NamedTuple):
    """Output of one forward of the mixture, besides y: for load balancing and the objective."""

    counts: Tensor | None  # (E,) int64: (token, expert) pairs in this replica; None: not counted
    # (): weighted auxiliary losses, or None. This rank's term of the sum over the ranks that share the sequences: the
    # context axis, and with sequence parallelism the tensor axis
    loss: Tensor | None


class FFN(nn.Module):
    """Dense SwiGLU: down(silu(gate(x)) * up(x)), its hidden width sharded over the tensor axis."""

    def __init__(self, dim: int, hidden: int, mesh: Mesh = SINGLE, selective: bool = False):
        super().__init__()
        self.gate = ParallelLinear(dim, hidden, "outputs", mesh)
        self.up = ParallelLinear(dim, hidden, "outputs", mesh)
        self.down = GatedLinear(hidden, dim, mesh)
        self.selective = selective

    @in_range("ffn")
    def forward(self, x: Tensor) -> Tensor:
        """x (N, D), full on each tensor rank -> this rank's partial sum (N, D)."""
        return checkpoint_if(self.selective, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x), self.up(x))


class Router(nn.Module):
    """Selects k experts per token, in fp32."""

    bias: Tensor

    def __init__(self, config: MythosConfig, experts: ExpertsConfig, mesh: Mesh, chunks: TokenChunks):
        super().__init__()
        self.chunks = chunks
        self.k = config.n_experts_per_tok
        self.experts = experts
        self.mesh = mesh
        self.weight = shard_parameter((config.n_experts, config.dim), {})
        self.register_buffer("bias", torch.zeros(config.n_experts))
        replicated(self, mesh)

    def _apply(self, fn, recurse=True):
        """Move the bias with the module, but never cast it (DeepSpeed casts the model to bf16)."""
        exact = self.bias
        super()._apply(fn, recurse)
        if not self.bias.is_meta and not exact.is_meta:
            self.bias = exact.to(self.bias.device)
        return self

    @in_range("router")
    def forward(self, x: Tensor, token_share: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, S', D) -> weights (B * S', k) fp32, index (B * S', k), weighted auxiliary losses () or None.

        token_share: the part of its sequences' tokens that x has.
        """
        weight = self.weight.float()  # once: its gradient is then the sum over chunks in fp32
        chunks = [self.chunks.recompute(_logits, chunk, weight) for (chunk,) in self.chunks.split(x)]
        logits = concatenate(chunks, x).flatten(0, 1)  # (N, E)
        with torch.no_grad():
            index = (logits + self.bias).topk(self.k, dim=-1).indices
        weights = logits.gather(-1, index).softmax(-1)  # equals the softmax over all experts, renormalized
        if not self.experts.z_loss and not self.experts.sequence_balance_loss:
            return weights, index, None
        return weights, index, self._losses(logits.view(*x.shape[:2], -1), token_share)

    def _losses(self, logits: Tensor, token_share: float) -> Tensor:
        """ST-MoE's z-loss and DeepSeek-V3's sequence-wise balance loss of logits (B, S', E), each times its weight."""
        loss = logits.new_zeros(())
        if self.experts.z_loss:
            loss = loss + self.experts.z_loss * logits.logsumexp(-1).square().mean()
        if self.experts.sequence_balance_loss:
            scores = logits.softmax(-1)
            n_experts = scores.shape[-1]
            chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(self.k, dim=-1).indices, 1.0)
            share = chosen.mean(1) * (token_share * n_experts / self.k)  # f_i in the paper, per sequence: (B, E)
            share = sum_over_sequence(share, self.mesh)
            loss = loss + self.experts.sequence_balance_loss * (share * scores.mean(1)).sum(-1).mean()
        return loss * token_share

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower the others'; counts (E,) of one optimizer step."""
        load = counts.to(self.bias.device, torch.float32)
        self.bias += self.experts.bias_update_rate * torch.sign(load.mean() - load)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (b, s, D) in any precision, weight (E, D) fp32 -> (b * s, E) fp32, as (b, s, E)."""
    return F.linear(x.flatten(0, 1).float(), weight).view(*x.shape[:2], -1)


class MoE(nn.Module):
    """Routed plus shared experts. The sum of the shared experts is one SwiGLU with the sum of their widths."""

    def __init__(
        self,
        config: MythosConfig,
        experts: ExpertsConfig,
        mesh: Mesh = SINGLE,
        selective: bool = False,
        chunk_tokens: int = 0,
    ):
        super().__init__()
        self.mesh = mesh
        self.chunks = TokenChunks(chunk_tokens, mesh)
        self.router = Router(config, experts, mesh, self.chunks)
        selective = selective and not chunk_tokens  # a chunk is recomputed in full
        self.experts = Experts(config, experts.backend, mesh, selective, self.chunks)
        self.shared = FFN(config.dim, config.shared_dim, mesh, selective) if config.shared_dim else None

    def forward(self, x: Tensor, token_share: float = 1.0, counts_experts: bool = True) -> tuple[Tensor, RouterStats]:
        """x (B, S', D) -> y (B, S', D) and the router's statistics. token_share: as of `Router`."""
        weights, index, loss = self.router(x, token_share)
        weights, index = (part.view(*x.shape[:2], -1) for part in (weights, index))
        seq_len = round(x.shape[1] / token_share)
        parts = self.chunks.split(x, weights, index, seq_len=seq_len)
        chunks = [self._forward_chunk(*part, counts_experts) for part in parts]
        y = concatenate([y for y, _ in chunks], x)
        if not counts_experts:
            return y, RouterStats(None, loss)
        counts = chunks[0][1]
        for _, more in chunks[1:]:
            counts = counts + more
        return y, RouterStats(counts, loss)

    def _forward_chunk(self, x: Tensor, weights: Tensor, index: Tensor, counts_experts: bool) -> tuple[Tensor, Tensor]:
        """A chunk of tokens (b, s, D) and their routing (b, s, k) -> same shape as x, and the counts (E,)."""
        y, rows, route, counts = self.chunks.recompute(self._partial_sums, x, weights, index, counts_experts)
        y = combine(y, route, self.mesh)
        if self.shared is not None:
            y = y + (rows if self.chunks.tokens else self.shared(rows))
        return leave_tensor_parallel(y.view(len(x), -1, x.shape[-1]), self.mesh), counts

    def _partial_sums(
        self, x: Tensor, weights: Tensor, index: Tensor, counts_experts: bool
    ) -> tuple[Tensor, Tensor, Route | None, Tensor]:
        """The part that recomputation repeats. The messages that bring routing and tokens to this rank are in it, those
        that return results are not.

        Returns (y, rows, route, counts). y: the routed experts' partial sums, as `Experts` returns them. rows (tokens,
        D) of all tensor ranks: in chunks the shared experts' partial sums, else their input. route: for `combine`; None
        without an expert axis. counts (E,), or UNSET. Without chunks the shared experts run after `combine`: their
        backward pass then ends before gradients of routed rows exist.
        """
        weights, index = self._gather_routing(weights, index)
        rows = enter_tensor_parallel(x, self.mesh).flatten(0, 1)  # once for the routed and the shared experts
        y, route = self.experts(rows, weights, index)
        if self.chunks.tokens and self.shared is not None:
            rows = self.shared(rows)
        return y, rows, route, tokens_per_expert(index, self.experts.n_experts) if counts_experts else UNSET

    def _gather_routing(self, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The routing of this rank's tokens (b, s, k) -> that of all tensor ranks' tokens (tokens, k)."""
        if self.mesh.sequence:
            index = all_gather(index.to(torch.int32), self.mesh.tensor, 1).long()
        return enter_tensor_parallel(weights, self.mesh).flatten(0, 1), index.flatten(0, 1)
