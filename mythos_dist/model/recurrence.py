"""The recurrent block: one transformer block, applied `n_loops` times to a state h with the input e injected each time.

u = block(norm(h + signal(t) + e)) plus its depth LoRA; h = A * h + B * e + u with A in (0, 1) by construction
(Parcae, Prairie et al. 2026); the output is the sum of h weighted by halting probabilities (ACT, Graves 2016).
`e` is the prelude's output and stays fixed. Every rank runs the same number of loops: a loop holds collectives, so a
rank that left early would hang the others. Tokens that have halted add with weight zero instead.
"""

# B batch, S sequence, D model, r rank of the depth LoRA.

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.model.attention import Context
from mythos_dist.model.block import MoEBlock
from mythos_dist.model.moe import RouterStats


def loop_signal(t: int, dim: int, like: Tensor) -> Tensor:
    """Sines and cosines of t * 10000^(-2i / L) in the first L = dim // 8 channels, zeros behind: (D,)."""
    width = dim // 8
    pairs = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angles = t * 10000.0 ** (-pairs / max(width, 1))
    signal = torch.zeros(dim, device=like.device, dtype=torch.float32)
    signal[:width] = torch.cat([angles.sin(), angles.cos()])[:width]
    return signal.to(like.dtype)


class Injection(nn.Module):
    """h = A * h + B * e + u, A = exp(-exp(log_dt + log_A)) per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.log_A = nn.Parameter(torch.empty(dim))
        self.log_dt = nn.Parameter(torch.empty(1))
        self.B = nn.Parameter(torch.empty(dim))

    def forward(self, h: Tensor, e: Tensor, u: Tensor) -> Tensor:
        """Three times (B, S, D) -> (B, S, D)."""
        # The clamp keeps the exponential finite for any value that an optimizer step may reach.
        A = torch.exp(-torch.exp((self.log_dt.float() + self.log_A.float()).clamp(-20, 20)))
        return torch.addcmul(torch.addcmul(u, A.to(h.dtype), h), self.B, e)


class DepthLoRA(nn.Module):
    """((down(u) * scale[t]) @ B): a low-rank correction whose diagonal depends on the loop (Bae et al. 2024)."""

    def __init__(self, dim: int, rank: int, max_loops: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.scale = nn.Embedding(max_loops, rank)
        self.B = nn.Parameter(torch.empty(rank, dim))

    def forward(self, u: Tensor, t: int) -> Tensor:
        """(B, S, D) -> (B, S, D); loops beyond the table use its last row."""
        row = torch.full((), min(t, self.scale.num_embeddings - 1), device=u.device)
        return (self.down(u) * self.scale(row)) @ self.B


class Halting(nn.Module):
    """The probability that a token halts after this loop, and the weight its state gets.

    A token whose cumulative probability reaches the threshold gets what is left of 1 and halts. `train` mode gives
    tokens that are still running at the last loop what is left as well, so weights sum to 1 at any number of loops;
    the reference loses that mass (0.45 of it at one loop).
    """

    def __init__(self, config: MythosConfig):
        super().__init__()
        self.halt = nn.Linear(config.dim, 1)
        self.threshold = config.act_threshold
        self.last_takes_rest = config.mode == "train"

    def forward(self, h: Tensor, mass: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """h (B, S, D), mass (B, S) fp32, cumulative -> weight (B, S) fp32, the new mass."""
        p = torch.sigmoid(self.halt(h).squeeze(-1).float())
        running = (mass < self.threshold).float()
        rest = (1.0 - mass).clamp(min=0)
        halts = torch.ones_like(mass, dtype=torch.bool) if last and self.last_takes_rest else mass + p >= self.threshold
        return torch.where(halts, rest, p) * running, mass + p * running


class Recurrent(nn.Module):
    """The looped block and everything that knows which loop it is."""

    def __init__(self, config: MythosConfig, experts: ExpertsConfig, recompute: str):
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.block = MoEBlock(config, experts)
        self.lora = DepthLoRA(config.dim, config.lora_rank, config.max_loop_iters)
        self.injection = Injection(config.dim)
        self.act = Halting(config)

    def forward(self, e: Tensor, n_loops: int, context: Context) -> tuple[Tensor, RouterStats]:
        """e (B, S, D) -> halting-weighted state (B, S, D); stats of all loops: counts (n_loops, E), mean loss."""
        h, mass = e, e.new_zeros(e.shape[:2], dtype=torch.float32)
        mixed = e.new_zeros(e.shape, dtype=torch.float32)  # the sum of up to 64 states is kept in fp32
        counts, losses = [], []
        for t in range(n_loops):
            arguments = (t, t == n_loops - 1, h, mass, mixed, e, context)
            if self.recompute == "loop" and torch.is_grad_enabled():
                # Statistics are outputs of the first run: the second one, in the backward, cannot count again.
                h, mass, mixed, stats = checkpoint(self._loop, *arguments, use_reentrant=False)
            else:
                h, mass, mixed, stats = self._loop(*arguments)
            counts.append(stats.counts)
            losses.append(stats.loss)
        return mixed.to(e.dtype), RouterStats(torch.stack(counts), torch.stack(losses).mean())

    def _loop(self, t: int, last: bool, h: Tensor, mass: Tensor, mixed: Tensor, e: Tensor, context: Context):
        """One turn: states (B, S, D), mass (B, S) -> the same and the router's statistics."""
        x = self.norm(h + e + loop_signal(t, self.config.dim, like=h))
        u, stats = self.block(x, context, f"recurrent.{t}")
        u = u + self.lora(u, t)
        h = self.injection(h, e, u)
        weight, mass = self.act(h, mass, last)
        return h, mass, torch.addcmul(mixed, weight.unsqueeze(-1), h.float()), stats
