"""The recurrent block: one transformer block, applied `n_loops` times to a state h with the input e injected each time.

u = block(norm(h + signal(t) + e)) plus its depth LoRA; h = A * h + B * e + u with A in (0, 1) by construction
(Parcae, Prairie et al. 2026); the output is the sum of h weighted by halting probabilities (ACT, Graves 2016).
`e` is the prelude's output and stays fixed. Every rank runs the same number of loops: a loop holds collectives, so a
rank that left early would hang the others. Tokens that have halted add with weight zero instead.
"""

# B batch, S sequence (S' of it on this rank: S / tensor with sequence parallelism, else S), D model, E experts,
# r rank of the depth LoRA.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.model.attention import Context
from mythos_dist.model.block import MoEBlock
from mythos_dist.model.moe import RouterStats
from mythos_dist.model.norm import Norm
from mythos_dist.model.recompute import Recompute, recomputed
from mythos_dist.parallel.collectives import gather_together
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import live_turns
from mythos_dist.parallel.tensor import cut_parameter, whole_on_every_rank


def loop_signals(turns: range, dim: int, like: Tensor) -> Tensor:
    """Sines and cosines of t * 10000^(-2i / L) in the first L = dim // 8 channels, zeros behind: (len(turns), D)."""
    width = dim // 8
    pairs = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    t = torch.arange(turns.start, turns.stop, device=like.device, dtype=torch.float32)
    angles = torch.outer(t, 10000.0 ** (-pairs / max(width, 1)))
    signals = torch.zeros(len(turns), dim, device=like.device, dtype=torch.float32)
    signals[:, :width] = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
    return signals.to(like.dtype)


class Injection(nn.Module):
    """What h = A * h + B * e + u needs, A = exp(-exp(log_dt + log_A)) per channel."""

    def __init__(self, dim: int, mesh: Mesh):
        super().__init__()
        self.log_A = nn.Parameter(torch.empty(dim))
        self.log_dt = nn.Parameter(torch.empty(1))
        self.B = nn.Parameter(torch.empty(dim))
        whole_on_every_rank(self, mesh)

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B, (D,) each: the same in every loop."""
        # The clamp keeps the exponential finite for any value that an optimizer step may reach.
        A = torch.exp(-torch.exp((self.log_dt.float() + self.log_A.float()).clamp(-20, 20)))
        return A.to(self.B.dtype), self.B.clone()  # ZeRO-3 takes a parameter's own numbers away behind its module


class Fixed(NamedTuple):
    """What is the same in every loop of a pass, or known before the first: made once."""

    A: Tensor  # (D,)
    B: Tensor  # (D,)
    signals: tuple[Tensor, ...]  # (D,) per turn of this stage
    first: int  # the turn of the first signal


class DepthLoRA(nn.Module):
    """u + ((u @ down^T) * scale[t]) @ B: a low-rank correction whose diagonal depends on the loop (Bae et al. 2024).

    The rank r is cut over the tensor axis. To use it each rank gathers the 2 * D * r weights: that sends r / N of what
    it would take to gather the N tokens' states and to add up the results.
    """

    def __init__(self, dim: int, rank: int, max_loops: int, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.down = cut_parameter((rank, dim), {0: mesh.tensor})
        self.scale = cut_parameter((max_loops, rank), {1: mesh.tensor})
        self.B = cut_parameter((rank, dim), {0: mesh.tensor})

    def forward(self, u: Tensor, t: int) -> Tensor:
        """u (B, S', D) -> u plus its correction; loops beyond the table use its last row."""
        scale = self.scale[min(t, self.scale.shape[0] - 1)]
        # With sequence parallelism ranks see different tokens, so their gradients are parts; otherwise they are equal.
        down, scale, B = gather_together([self.down, scale, self.B], self.mesh.tensor, 0, partial=self.mesh.sequence)
        rows = u.flatten(0, 1)
        return torch.addmm(rows, F.linear(rows, down) * scale, B).view_as(u)


class Halting(nn.Module):
    """The probability that a token halts after this loop, and the weight its state gets.

    With `model.halting: none` nothing halts: the last loop's state gets weight 1, the others 0. Otherwise a token whose
    cumulative probability reaches the threshold gets what is left of 1 and halts. `train` mode gives tokens that are
    still running at the last loop what is left as well, so weights sum to 1 at any number of loops; the reference loses
    that mass (0.45 of it at one loop).
    """

    def __init__(self, config: MythosConfig, mesh: Mesh):
        super().__init__()
        self.halts = config.halting == "act"
        if self.halts:
            self.halt = whole_on_every_rank(nn.Linear(config.dim, 1), mesh)
        self.threshold = config.act_threshold
        self.last_takes_rest = config.mode == "train"

    def forward(self, h: Tensor, mass: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """h (B, S', D), mass (B, S') fp32, cumulative -> weight (B, S') fp32, the new mass."""
        if not self.halts:
            return torch.full_like(mass, float(last)), mass
        running = mass < self.threshold
        p = torch.sigmoid(self.halt(h.flatten(0, 1)).float()).view_as(mass) * running
        rest = (1.0 - mass) * running  # of those that run it is positive: their mass is below the threshold
        new_mass = mass + p
        # In the last loop too the halting layer takes part: a stage that runs no other must have a gradient for it.
        halts = torch.ones_like(running) if last and self.last_takes_rest else new_mass >= self.threshold
        return torch.where(halts, rest, p), new_mass


class Carry(NamedTuple):
    """What one loop hands to the next, and one pipeline stage to the next."""

    h: Tensor  # (B, S', D)
    e: Tensor  # (B, S', D): the prelude's output, injected in every loop
    mixed: Tensor  # (B, S', D) fp32: the sum of h weighted so far; that of up to 64 states is kept in fp32
    mass: Tensor  # (B, S') fp32: halting probability so far
    loss: Tensor  # (1,) fp32: auxiliary losses so far, over the number of loops

    @staticmethod
    def start(e: Tensor) -> "Carry":
        """Before the first loop, from the prelude's output (B, S', D)."""
        zeros = e.new_zeros(e.shape, dtype=torch.float32)
        return Carry(e, e, zeros, zeros[..., 0].clone(), zeros.new_zeros(1))


class Recurrent(nn.Module):
    """The looped block and everything that knows which loop it is."""

    def __init__(self, config: MythosConfig, experts: ExpertsConfig, recompute: Recompute, mesh: Mesh):
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.norm = whole_on_every_rank(Norm(config.dim), mesh)
        self.block = MoEBlock(config, experts, mesh, recompute.kind == "selective")
        self.lora = DepthLoRA(config.dim, config.lora_rank, config.max_loop_iters, mesh)
        self.injection = Injection(config.dim, mesh)
        self.act = Halting(config, mesh)

    def forward(
        self, carry: Carry, turns: range, n_loops: int, context: Context, frozen: int = 0
    ) -> tuple[Carry, Tensor]:
        """Run the loops `turns` of all `n_loops`; no gradient flows through the first `frozen` of them.

        Returns the carry and the counts (len(turns), E) of each loop's (token, expert) pairs.
        """
        trained = live_turns(turns, frozen) if torch.is_grad_enabled() else range(0)
        self.block.ffn.experts.start_pass(len(trained))
        A, B = self.injection()
        fixed = Fixed(A, B, loop_signals(turns, self.config.dim, carry.h).unbind(), turns.start)
        every = self.recompute.every if self.recompute.kind == "loop" else 1
        counts = []
        t = turns.start
        while t < turns.stop:
            live = t >= frozen
            stop = min(t + every, turns.stop if live else min(frozen, turns.stop))
            with torch.set_grad_enabled(live and torch.is_grad_enabled()):
                # Counts are outputs of the first run: the second one, in the backward, cannot count again.
                carry, more = recomputed(
                    self.recompute.kind == "loop", self._loops, range(t, stop), n_loops, carry, fixed, context
                )
            counts += more
            t = stop
        if torch.is_grad_enabled() and not trained:
            carry = carry._replace(mixed=_ZeroGradients.apply(carry.mixed, *self.parameters()))
        E = self.config.n_experts
        return carry, torch.stack(counts) if counts else carry.mass.new_zeros(0, E, dtype=torch.int64)

    def _loops(
        self, turns: range, n_loops: int, carry: Carry, fixed: Fixed, context: Context
    ) -> tuple[Carry, list[Tensor]]:
        counts = []
        for t in turns:
            carry, stats = self._loop(t, n_loops, carry, fixed, context)
            counts.append(stats.counts)
        return carry, counts

    def _loop(self, t: int, n_loops: int, carry: Carry, fixed: Fixed, context: Context) -> tuple[Carry, RouterStats]:
        h, e, mixed, mass, loss = carry
        x = self.norm(h + e + fixed.signals[t - fixed.first])
        # One name for all loops without a cache: `torch.compile` would compile the block for each name.
        u, stats = self.block(x, context, "recurrent" if context.cache is None else f"recurrent.{t}")
        u = self.lora(u, t)
        h = torch.addcmul(torch.addcmul(u, fixed.A, h), fixed.B, e)
        weight, mass = self.act(h, mass, t == n_loops - 1)
        mixed = torch.addcmul(mixed, weight.unsqueeze(-1), h.float())
        if stats.loss is not None:
            loss = loss + stats.loss / n_loops
        return Carry(h, e, mixed, mass, loss), stats


class _ZeroGradients(torch.autograd.Function):
    """x as it is; backward gives each parameter a gradient of zeros.

    For a pipeline stage that runs no loop with a gradient in this step: its parameters take part in collectives.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.parameters)
