"""The recurrent block: one transformer block, applied `n_loops` times to a state h with the input e injected each time.

u = block(norm(h + signal(t) + e)) plus its depth LoRA; h = A * h + injected(e) + u with A in (0, 1) by construction
(Parcae, Prairie et al. 2026). What goes on is the last h, or the sum of h weighted by halting probabilities (ACT,
Graves 2016), or every loop's h (PonderNet, Banino et al. 2021; Ouro, Zhu et al. 2025). `e` is the prelude's output.

Every rank runs the same number of loops: a loop holds collectives, so a rank that left early would hang the others.
Tokens that have halted add with weight zero instead. A sequence with fewer loops than the others joins later, so that
all end together: gradient through the last k loops is then through the last k of each sequence.
"""

# B batch, S sequence (S' of it on this rank: S / tensor with sequence parallelism, else S), D model, E experts,
# r rank of the depth LoRA, R loops that are read out.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ActConfig, ExpertsConfig, MythosConfig
from mythos_dist.model.attention import Context
from mythos_dist.model.block import MoEBlock
from mythos_dist.model.halting import Halting
from mythos_dist.model.injection import Injection, ParcaeInjection
from mythos_dist.model.moe import RouterStats
from mythos_dist.model.norm import Norm
from mythos_dist.model.recompute import Recompute, recomputed
from mythos_dist.model.watch import Watch
from mythos_dist.parallel.collectives import all_gather_many
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import loops_with_grad
from mythos_dist.parallel.tensor import replicated, shard_parameter


class Loops(NamedTuple):
    """The loops of one pass, known before it begins and the same on every rank that sees these sequences."""

    n_loops: int
    frozen: int = 0  # so many of them, the first ones, get no gradient
    depths: Tensor | None = None  # (B,) loops of each sequence, at most n_loops; None: n_loops
    seeds: Tensor | None = None  # (B,) int64: of random initial states; None: 0 to B - 1
    readouts: bool = False  # read out, behind every loop with a gradient, what would go on if it were the last

    def started(self, t: int) -> Tensor | None:
        """Which sequences take part in loop t, (B, 1, 1); None: all of them."""
        return None if self.depths is None else (self.depths > self.n_loops - 1 - t).view(-1, 1, 1)

    def own_turn(self, t: int) -> int | Tensor:
        """Which loop of its own, from 0, loop t is for each sequence: (B,), or one number for all."""
        return t if self.depths is None else (t - self.n_loops + self.depths).clamp(min=0)


def loop_signals(turns: range, dim: int, like: Tensor) -> Tensor:
    """Sines and cosines of t * 10000^(-2i / L) in the first L = dim // 8 channels, zeros behind: (len(turns), D)."""
    width = dim // 8
    pairs = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    t = torch.arange(turns.start, turns.stop, device=like.device, dtype=torch.float32)
    angles = torch.outer(t, 10000.0 ** (-pairs / max(width, 1)))
    signals = torch.zeros(len(turns), dim, device=like.device, dtype=torch.float32)
    signals[:, :width] = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
    return signals.to(like.dtype)


class Fixed(NamedTuple):
    """What is the same in every loop of a pass, or known before the first: made once."""

    A: Tensor  # (D,)
    B: Tensor  # (D,)
    injected: Tensor  # (B, S', D): B * injected is added in every loop
    signals: tuple[Tensor, ...]  # (D,) per turn of this stage; (B, 1, D) where sequences differ; empty: none
    first: int  # the turn of the first signal


class DepthLoRA(nn.Module):
    """u + ((u @ down^T) * scale[t]) @ B: a low-rank correction whose diagonal depends on the loop (Bae et al. 2024).
    With `per_loop` each loop has its own down and B instead of a row of `scale`.

    The rank r is cut over the tensor axis. To use it each rank gathers the 2 * D * r weights: that sends r / N of what
    it would take to gather the N tokens' states and to add up the results.
    """

    def __init__(self, dim: int, rank: int, max_loops: int, per_loop: bool, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.max_loops = max_loops
        self.per_loop = per_loop
        if per_loop:
            self.down = shard_parameter((max_loops, rank, dim), {1: mesh.tensor})
            self.B = shard_parameter((max_loops, rank, dim), {1: mesh.tensor})
        else:
            self.down = shard_parameter((rank, dim), {0: mesh.tensor})
            self.scale = shard_parameter((max_loops, rank), {1: mesh.tensor})
            self.B = shard_parameter((rank, dim), {0: mesh.tensor})

    def forward(self, u: Tensor, t: int | Tensor) -> Tensor:
        """u (B, S', D), t the loop, or that of each sequence (B,) -> u plus its correction; loops beyond the table use
        its last row."""
        rows = u.flatten(0, 1)
        # With sequence parallelism ranks see different tokens, so their gradients are parts; otherwise they are equal.
        axis, partial = self.mesh.tensor, self.mesh.sequence
        if self.per_loop:
            assert isinstance(t, int), "config.check refuses it"
            t = min(t, self.max_loops - 1)
            down, B = all_gather_many([self.down[t], self.B[t]], axis, 0, partial=partial)
            return torch.addmm(rows, F.linear(rows, down), B).view_as(u)
        if isinstance(t, int):
            scale = self.scale[min(t, self.max_loops - 1)]
            down, scale, B = all_gather_many([self.down, scale, self.B], axis, 0, partial=partial)
            return torch.addmm(rows, F.linear(rows, down) * scale, B).view_as(u)
        scale = self.scale[t.clamp(max=self.max_loops - 1)].t()  # (local r, B)
        down, scale, B = all_gather_many([self.down, scale, self.B], axis, 0, partial=partial)
        scaled = F.linear(u, down) * scale.t().unsqueeze(1)
        return torch.addmm(rows, scaled.flatten(0, 1), B).view_as(u)


class Carry(NamedTuple):
    """What one loop hands to the next, and one pipeline stage to the next."""

    h: Tensor  # (B, S', D)
    e: Tensor  # (B, S', D): the prelude's output, injected in every loop
    mixed: Tensor  # (B, S', D) fp32: the sum of h weighted so far; that of up to 64 states is kept in fp32
    mass: Tensor  # (B, S') fp32: halting probability so far
    loss: Tensor  # (1,) fp32: auxiliary losses so far, over the number of loops


class Read(NamedTuple):
    """What would go on behind loops, the first loop's first, and what each counts in the objective."""

    states: Tensor  # (R, B, S', D)
    weights: Tensor  # (R, B, S') fp32


class Recurrent(nn.Module):
    """The looped block and everything that knows which loop it is."""

    def __init__(self, config: MythosConfig, act: ActConfig, experts: ExpertsConfig, recompute: Recompute, mesh: Mesh):
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.mesh = mesh
        self.norm = replicated(Norm(config.dim), mesh)
        self.block = MoEBlock(config, experts, mesh, recompute.kind == "selective")
        if config.lora != "none":
            per_loop = config.lora == "per_loop"
            self.lora = DepthLoRA(config.dim, config.lora_rank, config.max_loop_iters, per_loop, mesh)
        if config.injection == "parcae":
            self.e_norm = replicated(Norm(config.dim), mesh)
            self.injection = ParcaeInjection(config.dim, mesh)
        else:
            self.injection = Injection(config.dim, mesh)
        self.act = Halting(config, act, mesh)
        self.watch: Watch | None = None  # set while somebody wants to know how the loops are doing

    def start(self, e: Tensor, loops: Loops) -> Carry:
        """Before the first loop, from the prelude's output (B, S', D)."""
        if self.config.injection == "parcae":
            e = self.e_norm(e)
        zeros = e.new_zeros(e.shape, dtype=torch.float32)
        h = {"e": lambda: e, "zero": lambda: torch.zeros_like(e), "random": lambda: self._random(e, loops.seeds)}
        return Carry(h[self.config.initial_state](), e, zeros, zeros[..., 0].clone(), zeros.new_zeros(1))

    def _random(self, e: Tensor, seeds: Tensor | None) -> Tensor:
        """A state of N(0, 2 / 5) (Huginn, Geiping et al. 2025), drawn for each sequence by itself: the same numbers in
        whatever micro-batch, on whatever rank of a tensor line."""
        B, parts, D = e.shape[0], self.mesh.tensor.size if self.mesh.sequence else 1, e.shape[2]
        generator = torch.Generator(e.device)
        drawn = torch.empty(B, e.shape[1] * parts, D, device=e.device)
        for row, seed in zip(drawn, range(B) if seeds is None else seeds.tolist(), strict=True):
            row.normal_(0.0, math.sqrt(2 / 5), generator=generator.manual_seed(seed))
        return drawn.chunk(parts, 1)[self.mesh.tensor.rank if parts > 1 else 0].to(e.dtype)

    def forward(self, carry: Carry, turns: range, loops: Loops, context: Context) -> tuple[Carry, Tensor, Read]:
        """Run the loops `turns`; no gradient flows through the first `frozen` of all.

        Returns the carry, the counts (len(turns), E) of each loop's (token, expert) pairs, and with `loops.readouts`
        what is read out of those of these loops that gradient flows through.
        """
        trained = loops_with_grad(turns, loops.frozen) if torch.is_grad_enabled() else range(0)
        self.block.ffn.experts.start_pass(len(trained))
        A, B, injected = self.injection(carry.e)
        fixed = Fixed(A, B, injected, self._signals(turns, loops, carry.h), turns.start)
        every = self.recompute.every if self.recompute.kind == "loop" else 1
        counts: list[Tensor] = []
        read: list[tuple[Tensor, Tensor]] = []
        t = turns.start
        while t < turns.stop and not self._all_halted(carry, context):
            live = t >= loops.frozen
            stop = min(t + every, turns.stop if live else min(loops.frozen, turns.stop))
            with torch.set_grad_enabled(live and torch.is_grad_enabled()):
                # Counts are outputs of the first run: the second one, in the backward, cannot count again.
                carry, more, states = recomputed(
                    self.recompute.kind == "loop", self._loops, range(t, stop), loops, carry, fixed, context
                )
            counts += more
            read += states if live else []
            t = stop
        if torch.is_grad_enabled():
            carry = carry._replace(loss=self._touched(carry, bool(trained)))
        if self.watch is not None and len(turns) > 0:
            self.watch.rho = A.max()
            self.watch.gain(lambda h: self._update(turns.stop - 1, loops, h, carry.e, fixed, context)[0], carry.h)
        counts += [carry.mass.new_zeros(self.config.n_experts, dtype=torch.int64)] * (len(turns) - len(counts))
        return carry, self._stacked(counts, carry), self._read(read, carry)

    def _touched(self, carry: Carry, trained: bool) -> Tensor:
        """The carry's loss as it is; its backward gives gradients of zeros to what nothing was made with: every
        parameter takes part in collectives."""
        loss = carry.loss
        if trained and self.act.mode == "off":
            loss = loss + self.act.idle(carry.h)
        if self.mesh.pipe.size == 1:
            return loss
        # Of a pipeline's stages some run no loop with a gradient, and only the first with loops norms e.
        unused = self if not trained else getattr(self, "e_norm", nn.Module())
        return _ZeroGradients.apply(loss, *unused.parameters())

    def _signals(self, turns: range, loops: Loops, like: Tensor) -> tuple[Tensor, ...]:
        if not self.config.loop_signal:
            return ()
        if loops.depths is None:
            return loop_signals(turns, self.config.dim, like).unbind()
        table = loop_signals(range(loops.n_loops), self.config.dim, like)
        return tuple(table[loops.own_turn(t)].unsqueeze(1) for t in turns)

    def _stacked(self, counts: list[Tensor], carry: Carry) -> Tensor:
        E = self.config.n_experts
        return torch.stack(counts) if counts else carry.mass.new_zeros(0, E, dtype=torch.int64)

    @staticmethod
    def _read(read: list[tuple[Tensor, Tensor]], carry: Carry) -> Read:
        if not read:
            return Read(carry.h.new_zeros(0, *carry.h.shape), carry.mass.new_zeros(0, *carry.mass.shape))
        states, weights = zip(*read, strict=True)
        return Read(torch.stack(states), torch.stack(weights))

    def _all_halted(self, carry: Carry, context: Context) -> bool:
        """Whether what is left would add with weight zero: looked at where nobody waits for this rank's messages, and
        where no later token will ask for the keys of all loops."""
        alone = self.mesh.tensor.size == self.mesh.expert.size == self.mesh.pipe.size == 1
        watched = torch.is_grad_enabled() or context.cache is not None or self.watch is not None
        if self.act.mode == "off" or watched or not alone:
            return False
        return bool((carry.mass >= self.act.threshold).all())

    def _loops(
        self, turns: range, loops: Loops, carry: Carry, fixed: Fixed, context: Context
    ) -> tuple[Carry, list[Tensor], list[tuple[Tensor, Tensor]]]:
        counts, read = [], []
        for t in turns:
            carry, stats, answer = self._loop(t, loops, carry, fixed, context)
            counts.append(stats.counts)
            read += [answer] if loops.readouts else []
        return carry, counts, read

    def _loop(
        self, t: int, loops: Loops, carry: Carry, fixed: Fixed, context: Context
    ) -> tuple[Carry, RouterStats, tuple[Tensor, Tensor]]:
        """The carry behind loop t, the router's statistics, and what can be read out: a state (B, S', D), its weight
        in the objective (B, S')."""
        h, e, mixed, mass, loss = carry
        joined = loops.started(t - 1)
        if joined is not None and self.config.initial_state == "e":
            h = torch.where(joined, h, e)  # what waits through loops without gradient would come without it
        new_h, stats = self._update(t, loops, h, e, fixed, context)
        if stats.loss is not None:
            loss = loss + stats.loss / loops.n_loops
        started, last = loops.started(t), t == loops.n_loops - 1
        new_h = new_h if started is None else torch.where(started, new_h, h)
        if self.act.mode == "off":
            weight, new_mass = torch.full_like(mass, float(last)), mass
            mixed = new_h.float() if last else mixed
        else:
            weight, new_mass = self.act(new_h, mass, last)
            if started is not None:
                weight, new_mass = weight * started.squeeze(-1), torch.where(started.squeeze(-1), new_mass, mass)
            if self.act.regularised:
                depths = loops.n_loops if loops.depths is None else loops.depths
                loss = loss + self.act.loss(weight, loops.own_turn(t), depths, last)
        read = (new_h, weight)
        if self.act.mode in ("reference", "safe"):
            if loops.readouts:
                rest = (1.0 - mass) * (mass < self.act.threshold) if self.act.mode == "safe" else weight
                read = (torch.addcmul(mixed, rest.unsqueeze(-1), new_h.float()).to(h.dtype), weight)
            mixed = torch.addcmul(mixed, weight.unsqueeze(-1), new_h.float())
        elif self.act.mode == "ponder" and not loops.readouts:
            mixed = torch.addcmul(mixed, weight.unsqueeze(-1), new_h.float())
        if loops.readouts and self.act.mode != "ponder":
            read = (read[0], self._even(loops, mass, started))
        if self.watch is not None:
            self.watch.see(t, h, new_h, weight)
        return Carry(new_h, e, mixed, new_mass, loss), stats, read

    def _update(
        self, t: int, loops: Loops, h: Tensor, e: Tensor, fixed: Fixed, context: Context
    ) -> tuple[Tensor, RouterStats]:
        """The state behind loop t, and the router's statistics."""
        x = h + e
        if fixed.signals:
            x = x + fixed.signals[t - fixed.first]
        # One name for all loops without a cache: `torch.compile` would compile the block for each name.
        u, stats = self.block(self.norm(x), context, "recurrent" if context.cache is None else f"recurrent.{t}")
        if self.config.lora != "none":
            u = self.lora(u, loops.own_turn(t))
        return torch.addcmul(torch.addcmul(u, fixed.A, h), fixed.B, fixed.injected), stats

    @staticmethod
    def _even(loops: Loops, like: Tensor, started: Tensor | None) -> Tensor:
        """Every loop of a sequence that gradient flows through counts the same."""
        live = loops.n_loops - loops.frozen
        if started is None or loops.depths is None:
            return torch.full_like(like, 1 / live)
        return (started.squeeze(-1) / loops.depths.clamp(max=live).unsqueeze(1)).expand_as(like).float()


class _ZeroGradients(torch.autograd.Function):
    """x as it is; backward gives each parameter a gradient of zeros.

    For parameters that take part in collectives though nothing was made with them; not with ZeRO-3, which would have to
    gather them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.parameters)
