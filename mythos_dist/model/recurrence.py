"""The recurrent block: one transformer block, applied `n_loops` times to a state h with the input e injected each time.

u = block(norm(h + e + signal(t))) plus its depth LoRA; h = A * h + B * injected(e) + u with A in (0, 1) by construction
(Parcae, Prairie et al. 2026). `e` is the prelude's output. What the loops output is decided by halting
(model/halting.py): the last h, a weighted sum of all, or every loop's h.

Every rank runs the same number of loops: a loop contains collectives, so a rank that exits early would hang the others.
Tokens that have halted get weight zero instead. A sequence with fewer loops than the others starts later, so that all
end together: gradient through the last k loops is then through the last k of each sequence.

Decisions: LOOPS-1, LOOPS-2.
"""

# B batch, S' tokens of each sequence on this rank (S / tensor with sequence parallelism, else S), D model, E experts,
# R loops that are read out.

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mythos_dist.config.schema import ActConfig, ExpertsConfig, MythosConfig
from mythos_dist.model.attention import Context
from mythos_dist.model.block import MoEBlock
from mythos_dist.model.depth_lora import DepthLoRA
from mythos_dist.model.halting import NoHalting, build_halting
from mythos_dist.model.injection import Injection, ParcaeInjection
from mythos_dist.model.loop_recorder import LoopRecorder
from mythos_dist.model.loops import Loops, loop_signals
from mythos_dist.model.moe import RouterStats
from mythos_dist.model.norm import Norm
from mythos_dist.model.recompute import Recompute, checkpoint_if
from mythos_dist.model.state import UNSET, State
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import loops_with_grad
from mythos_dist.parallel.tensor import replicated

Readout = tuple[Tensor, Tensor]  # the output if the pass ended here (B, S', D), the weight of its loss (B, S') fp32


class LoopInputs(NamedTuple):
    """What the loops of a pass share, computed once before the first."""

    A: Tensor  # (D,)
    B: Tensor  # (D,)
    injected: Tensor  # (B, S', D): B * injected is added in every loop
    signals: dict[int, Tensor]  # by loop: (D,), or (B, 1, D) where sequences have loops of their own; empty: none


class Recurrent(nn.Module):
    """The looped block, and all that depends on the loop."""

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
        self.act = build_halting(config, act, mesh)
        self.recorder: LoopRecorder | None = None  # set during a telemetry pass

    def start(self, e: Tensor, loops: Loops) -> State:
        """The state before the first loop, from the prelude's output (B, S', D)."""
        if self.config.injection == "parcae":
            e = self.e_norm(e)
        if self.config.initial_state == "e":
            h = e
        elif self.config.initial_state == "zero":
            h = torch.zeros_like(e)
        else:
            h = self._random_state(e, loops.seeds)
        return State(
            h=h,
            e=e,
            output=torch.zeros_like(e, dtype=torch.float32),
            halted=torch.zeros_like(e[..., 0], dtype=torch.float32),
            aux_loss=e.new_zeros(1, dtype=torch.float32),
        )

    def _random_state(self, e: Tensor, seeds: Tensor | None) -> Tensor:
        """A state like e from N(0, 2 / 5) (Huginn, Geiping et al. 2025). Each sequence is drawn from its own seed: its
        values do not depend on the micro-batch or on the rank of the tensor axis."""
        B, parts, D = e.shape[0], self.mesh.tensor.size if self.mesh.sequence else 1, e.shape[2]
        generator = torch.Generator(e.device)
        state = torch.empty(B, e.shape[1] * parts, D, device=e.device)
        for row, seed in zip(state, range(B) if seeds is None else seeds.tolist(), strict=True):
            row.normal_(0.0, math.sqrt(2 / 5), generator=generator.manual_seed(seed))
        return state.chunk(parts, 1)[self.mesh.tensor.rank if parts > 1 else 0].to(e.dtype)

    def finish(self, state: State) -> State:
        """The state after the last loop -> the coda's input: the loops' output, or the R readouts as one batch."""
        if state.readouts is None:
            return State(state.output.to(state.e.dtype), aux_loss=state.aux_loss)
        h = state.readouts.flatten(0, 1)  # (R, B, S', D) -> (R * B, S', D)
        return State(h, aux_loss=state.aux_loss, readout_weights=state.readout_weights)

    def forward(self, state: State, loop_range: range, loops: Loops, context: Context) -> tuple[State, Tensor]:
        """Run the loops `loop_range` of the pass; the first `loops.no_grad_loops` of the pass have no gradient.

        Returns the state, with the readouts of these loops appended, and the counts (len(loop_range), E) of each
        loop's (token, expert) pairs.
        """
        with_grad = loops_with_grad(loop_range, loops.no_grad_loops) if torch.is_grad_enabled() else range(0)
        self.block.ffn.experts.start_pass(len(with_grad))
        A, B, injected = self.injection(state.e)
        inputs = LoopInputs(A, B, injected, self._signals(loop_range, loops, state.h))
        counts = torch.zeros(len(loop_range), self.config.n_experts, dtype=torch.int64, device=state.h.device)
        readouts: list[Readout] = []
        # Earlier readouts stay out of the groups: a recomputed group holds its arguments until the backward.
        earlier = state.readouts, state.readout_weights
        state = state._replace(readouts=UNSET, readout_weights=UNSET)
        for group in self._groups(loop_range, loops):
            if self._all_halted(state, context):
                break
            has_grad = torch.is_grad_enabled() and group.start >= loops.no_grad_loops
            with torch.set_grad_enabled(has_grad):
                # The counts are outputs of the forward: recomputation in the backward must not count again.
                state, group_counts, group_readouts = checkpoint_if(
                    self.recompute.kind == "loop", self._run_group, group, loops, state, inputs, context
                )
            first = group.start - loop_range.start
            counts[first : first + len(group)] = torch.stack(group_counts)
            readouts += group_readouts
        if torch.is_grad_enabled():
            state = state._replace(aux_loss=self._use_all_parameters(state, len(with_grad) > 0))
        if self.recorder is not None and len(loop_range) > 0:
            self.recorder.rho = A.max()
            self.recorder.estimate_gain(
                lambda h: self._update(loop_range.stop - 1, loops, h, state.e, inputs, context)[0], state.h
            )
        state = state._replace(readouts=earlier[0], readout_weights=earlier[1])
        return _append_readouts(state, readouts), counts

    def _signals(self, loop_range: range, loops: Loops, like: Tensor) -> dict[int, Tensor]:
        if not self.config.loop_signal:
            return {}
        if loops.depths is None:
            return dict(zip(loop_range, loop_signals(loop_range, self.config.dim, like), strict=True))
        table = loop_signals(range(loops.n_loops), self.config.dim, like)
        return {t: table[loops.own_index(t)].unsqueeze(1) for t in loop_range}

    def _groups(self, loop_range: range, loops: Loops) -> Iterator[range]:
        """The loops that are recomputed together, `recompute.every` of them, all with gradient or all without."""
        every = self.recompute.every if self.recompute.kind == "loop" else 1
        n_no_grad = max(0, loops.no_grad_loops - loop_range.start)
        for part in (loop_range[:n_no_grad], loop_range[n_no_grad:]):
            for first in range(0, len(part), every):
                yield part[first : first + every]

    def _all_halted(self, state: State, context: Context) -> bool:
        """Whether the remaining loops can be skipped, because their weight is zero for all tokens. Only where no other
        rank waits for this one in a collective, and no later token needs the keys of all loops."""
        single = self.mesh.tensor.size == self.mesh.expert.size == self.mesh.pipe.size == 1
        needed = torch.is_grad_enabled() or context.cache is not None or self.recorder is not None
        return single and not needed and self.act.all_halted(state.halted)

    def _run_group(
        self, group: range, loops: Loops, state: State, inputs: LoopInputs, context: Context
    ) -> tuple[State, list[Tensor], list[Readout]]:
        counts, readouts = [], []
        for t in group:
            state, loop_counts, readout = self._loop(t, loops, state, inputs, context)
            counts.append(loop_counts)
            if readout is not None:
                readouts.append(readout)
        return state, counts, readouts

    def _loop(
        self, t: int, loops: Loops, state: State, inputs: LoopInputs, context: Context
    ) -> tuple[State, Tensor, Readout | None]:
        """Loop t: the state after it, the (token, expert) counts (E,), and what is read out."""
        h, e, output, halted, aux_loss, *_ = state
        if self.config.initial_state == "e":  # sequences that start now: no-grad loops have detached their h
            h = loops.where_active(t - 1, h, e)
        new_h, router = self._update(t, loops, h, e, inputs, context)
        new_h = loops.where_active(t, new_h, h)
        weight, new_halted = self.act(new_h, halted, loops.is_last(t))
        weight, new_halted = loops.where_active(t, weight, 0.0), loops.where_active(t, new_halted, halted)
        if router.loss is not None:
            aux_loss = aux_loss + router.loss / loops.n_loops
        aux_loss = self.act.add_loss(aux_loss, weight, t, loops)
        readout = None
        if loops.reads_out(t):
            readout = self.act.readout(output, new_h, halted, weight), self.act.readout_weight(weight, t, loops)
        output = self.act.accumulate(output, new_h, weight, t, loops)
        if self.recorder is not None:
            self.recorder.record(t, h, new_h, weight)
        state = state._replace(h=new_h, output=output, halted=new_halted, aux_loss=aux_loss)
        return state, router.counts, readout

    def _update(
        self, t: int, loops: Loops, h: Tensor, e: Tensor, inputs: LoopInputs, context: Context
    ) -> tuple[Tensor, RouterStats]:
        """h[t + 1] = A * h[t] + B * injected + u, with u = block(norm(h[t] + e + signal)) plus its depth LoRA."""
        x = h + e
        if inputs.signals:
            x = x + inputs.signals[t]
        # Without a cache one key for all loops: `torch.compile` would compile the block for each key.
        u, stats = self.block(self.norm(x), context, "recurrent" if context.cache is None else f"recurrent.{t}")
        if self.config.lora != "none":
            u = self.lora(u, loops.own_index(t))
        return torch.addcmul(torch.addcmul(u, inputs.A, h), inputs.B, inputs.injected), stats

    def _use_all_parameters(self, state: State, has_grad: bool) -> Tensor:
        """`aux_loss` unchanged; its backward gives gradients of zeros to parameters that this pass has not used,
        because every parameter takes part in collectives."""
        aux_loss = state.aux_loss
        if has_grad and isinstance(self.act, NoHalting):
            aux_loss = aux_loss + self.act.zero_loss(state.h)
        if self.mesh.pipe.size == 1:
            return aux_loss
        # Some pipeline stages run no loop with gradient, and only the first stage with loops applies e_norm.
        unused = self if not has_grad else getattr(self, "e_norm", nn.Module())
        return _ZeroGradients.apply(aux_loss, *unused.parameters())


def _append_readouts(state: State, new: list[Readout]) -> State:
    if not new:
        return state
    readouts = torch.stack([output for output, _ in new])
    weights = torch.stack([weight for _, weight in new])
    if state.readouts is not None:
        readouts = torch.cat([state.readouts, readouts])
        weights = torch.cat([state.readout_weights, weights])
    return state._replace(readouts=readouts, readout_weights=weights)


class _ZeroGradients(torch.autograd.Function):
    """Identity on x; the backward gives each parameter a gradient of zeros.

    For parameters that take part in collectives though the pass has not used them. Not with ZeRO-3, which would have to
    gather them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.parameters)
