"""The recurrent block: a stack of model.loop_layers transformer layers (one by default), applied `n_loops` times to a
hidden state h with the same input e.

u = block(norm(h + e + signal(t))) plus its depth LoRA; h = decay * h + scale * injected(e) + u, where decay, in (0, 1)
by construction, and scale are Parcae's A and B (Prairie et al. 2026). `e` is the prelude's output. With
model.injection=none, h = u = block(h), as in a plain transformer whose layers share their weights; with `difference`
h = u = block(h + scale * (e - h)). The output of the loops depends on halting (model/halting.py): the last h, a
weighted sum of all, or every loop's h.

Every rank runs the same number of loops: a loop contains collectives, so a rank that exits early would hang the others.
Tokens that have halted get weight zero instead. A sequence with fewer loops than the others starts later, so that all
end together: gradient through the last k loops is then through the last k of each sequence.

Decisions: LOOPS-1, LOOPS-2, LOOPS-8, LOOPS-10, LOOPS-15, LOOPS-16.
"""

# B batch, S' tokens of each sequence on this rank (with context and sequence parallelism a part of the S), D model,
# E experts, L layers of the block, R loops that are read out.

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mythos_dist.config.schema import ActConfig, ExpertsConfig, MythosConfig
from mythos_dist.model.activations import UNSET, Activations, Readout
from mythos_dist.model.attention import PassContext
from mythos_dist.model.block import MoEBlock
from mythos_dist.model.depth_lora import DepthLoRA
from mythos_dist.model.fixed_point import add_fixed_point_loss
from mythos_dist.model.halting import build_halting
from mythos_dist.model.injection import build_injection
from mythos_dist.model.kv_cache import CacheKey, looped_layer
from mythos_dist.model.loop_recorder import LoopRecorder
from mythos_dist.model.loops import Loops, loop_signal, loop_signals, open_pass, where_active
from mythos_dist.model.norm import Norm, rms_normalize
from mythos_dist.model.recompute import OffloadedStates, Recompute, checkpoint_if
from mythos_dist.model.shared_kv import SharedKV, join_kv, kv_by_layer, shared_kv_shape
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import loops_with_grad
from mythos_dist.parallel.ranges import named_range
from mythos_dist.parallel.tensor import replicated

# The activations after a group; the counts (L * E,) of each of its loops; the readouts of its loops.
GroupOutputs = tuple[Activations, list[Tensor], list[Readout]]


class LoopInputs(NamedTuple):
    """What the loops of a pass share, computed once before the first."""

    decay: Tensor  # (D,)
    scale: Tensor  # (D,)
    injected: Tensor  # (B, S', D): scale * injected is added in every loop
    signals: dict[int, Tensor]  # by loop: (D,), or (B, 1, D) where sequences have loops of their own; empty: none

    def with_signal(self, x: Tensor, t: int) -> Tensor:
        """x (B, S', D) plus the signal of loop t, if there is one."""
        return x + self.signals[t] if self.signals else x


class LoopStats(NamedTuple):
    """The routers' statistics in one loop."""

    # (L * E,) int64: (token, expert) pairs in this replica, of the first layer's experts first; unset: not counted
    counts: Tensor
    loss: Tensor | None  # (): sum of the layers' `RouterStats.loss`, or None


class LoopOutputs(NamedTuple):
    """What one loop returns."""

    activations: Activations  # after it
    weight: Tensor  # (B, S') fp32: of its h in the loops' output
    counts: Tensor  # those of `LoopStats`
    readout: Readout | None


class Recurrent(nn.Module):
    """The looped block, and all that depends on the loop."""

    def __init__(
        self,
        config: MythosConfig,
        act: ActConfig,
        experts: ExpertsConfig,
        recompute: Recompute,
        mesh: Mesh,
        chunk_tokens: int = 0,
        fixed_point: float = 0.0,
    ):
        super().__init__()
        self.config = config
        self.fixed_point = fixed_point
        self.recompute = recompute
        self.mesh = mesh
        self.adds_e = config.injection in ("reference", "parcae")
        self.norm = replicated(Norm(config.dim, config.norm_eps), mesh) if self.adds_e else nn.Identity()
        layers = [
            MoEBlock(config, experts, mesh, recompute.kind == "selective", chunk_tokens)
            for _ in range(config.loop_layers)
        ]
        # The first layer has the name that it has in a block of one layer; the others are blocks.1, blocks.2, ...
        self.block, self.blocks = layers[0], nn.ModuleDict({str(i): layers[i] for i in range(1, len(layers))})
        if config.lora != "none":
            per_loop = config.lora == "per_loop"
            self.lora = DepthLoRA(config.dim, config.lora_rank, config.max_loop_iters, per_loop, mesh)
        if config.injection == "parcae":
            self.e_norm = replicated(Norm(config.dim, config.norm_eps), mesh)
        self.injection = build_injection(config, mesh)
        self.act = build_halting(config, act, mesh)
        self.recorder: LoopRecorder | None = None  # set during a telemetry pass

    @property
    def layers(self) -> list[MoEBlock]:
        """The layers of the block, in their order."""
        return [self.block, *self.blocks.values()]  # pyright: ignore[reportReturnType]

    def start(self, e: Tensor, loops: Loops, context: PassContext) -> Activations:
        """The activations before the first loop, from the prelude's output (B, S', D)."""
        if self.config.injection == "parcae":
            e = self.e_norm(e)
        if self.config.initial_state == "e":
            h = e
        elif self.config.initial_state == "zero":
            h = torch.zeros_like(e)
        else:
            h = self._random_hidden_state(e, loops.seeds, context)
        return Activations(
            h=h,
            e=e,
            output=torch.zeros_like(e, dtype=torch.float32),
            cum_halting=torch.zeros_like(e[..., 0], dtype=torch.float32),
            aux_loss=e.new_zeros(1, dtype=torch.float32),
            kv=self._no_kv(e),
        )

    def _no_kv(self, e: Tensor) -> Tensor:
        """Zeros (B, S, W), which no loop attends to: a pipeline stage without a loop in this step sends them. Unset if
        loops share nothing."""
        parts = self.mesh.tensor.size if self.mesh.sequence else 1
        shape = shared_kv_shape(self.config, e.shape[0], e.shape[1] * parts, self.mesh.tensor.size)
        return UNSET if shape is None else e.new_zeros(shape)

    def _random_hidden_state(self, e: Tensor, seeds: Tensor | None, context: PassContext) -> Tensor:
        """A hidden state like e from N(0, 2 / 5) (Huginn, Geiping et al. 2025). Each sequence is drawn from its own
        seed: its values do not depend on the micro-batch or on the ranks that share it."""
        B, parts, D = e.shape[0], self.mesh.tensor.size if self.mesh.sequence else 1, e.shape[2]
        generator = torch.Generator(e.device)
        h = []
        for i, seed in enumerate(range(B) if seeds is None else seeds.tolist()):
            row = torch.empty(context.seq_len, D, device=e.device)
            row.normal_(0.0, math.sqrt(2 / 5), generator=generator.manual_seed(seed))
            if context.shard is not None:
                row = row[context.shard.positions[i]]
            h.append(row.chunk(parts)[self.mesh.tensor.rank if parts > 1 else 0].to(e.dtype))
        return torch.stack(h)

    def _positions(self, context: PassContext, batch: int) -> Tensor:
        """The positions (B, S') of this rank's tokens in their sequences."""
        if context.shard is not None:
            positions = context.shard.positions
        else:
            positions = torch.arange(context.seq_len, device=context.rope.device).expand(batch, -1)
        tensor = self.mesh.tensor
        return positions.chunk(tensor.size, 1)[tensor.rank] if self.mesh.sequence else positions

    def finish(self, activations: Activations) -> Activations:
        """After the last loop: h becomes the loops' output, or the R readouts as one batch, for the coda."""
        if activations.readouts is None:
            return Activations(activations.output.to(activations.e.dtype), aux_loss=activations.aux_loss)
        h = activations.readouts.flatten(0, 1)  # (R, B, S', D) -> (R * B, S', D)
        return Activations(h, aux_loss=activations.aux_loss, readout_weights=activations.readout_weights)

    def forward(
        self, activations: Activations, loop_range: range, loops: Loops, context: PassContext
    ) -> tuple[Activations, Tensor]:
        """Run the loops `loop_range` of the pass; the first `loops.no_grad_loops` of the pass have no gradient.

        Returns the activations, with the readouts of these loops appended, and the counts (len(loop_range), L * E) of
        each loop's (token, expert) pairs.
        """
        with_grad = loops_with_grad(loop_range, loops.no_grad_loops) if torch.is_grad_enabled() else range(0)
        for layer in self.layers:
            layer.ffn.experts.start_pass(len(with_grad))
        inputs = self.inputs(activations.e)._replace(signals=self._signals(loop_range, loops, activations.h))
        experts = self.config.loop_layers * self.config.n_experts
        counts = torch.zeros(len(loop_range), experts, dtype=torch.int64, device=activations.h.device)
        readouts: list[Readout] = []
        # Earlier readouts stay out of the groups: a recomputed group holds its arguments until the backward.
        earlier = activations.readouts, activations.readout_weights
        activations = activations._replace(readouts=UNSET, readout_weights=UNSET)
        run_group = self._group_runner(loops, inputs, context)
        for group in self._groups(loop_range, loops):
            if self._all_halted(activations, context):
                break
            has_grad = torch.is_grad_enabled() and group.start >= loops.no_grad_loops
            if loops.computes_kv(group.start, self.config.kv_loops) is True:
                activations = activations._replace(kv=UNSET)  # a recomputed group holds its arguments
            with torch.set_grad_enabled(has_grad):
                # The counts are outputs of the forward: recomputation in the backward must not count again.
                activations, group_counts, group_readouts = run_group(group, activations)
            first = group.start - loop_range.start
            counts[first : first + len(group)] = torch.stack(group_counts)
            readouts += group_readouts
        if torch.is_grad_enabled():
            activations = activations._replace(aux_loss=self._use_all_parameters(activations, with_grad, loops))
        if self.recorder is not None and len(loop_range) > 0:
            self.recorder.rho = inputs.decay.max()
            last_loop, last = loop_range.stop - 1, activations
            self.recorder.estimate_gain(
                lambda h: self._loop(last_loop, loops, last._replace(h=h), inputs, context).activations.h,
                last.h,
                self._positions(context, len(last.h)),
            )
        activations = activations._replace(readouts=earlier[0], readout_weights=earlier[1])
        return activations.with_readouts(readouts), counts

    def inputs(self, e: Tensor) -> LoopInputs:
        """What all loops of a pass share but signals, of e (B, S', D) in `Activations`."""
        decay, scale, injected = self.injection(e)
        return LoopInputs(decay, scale, injected, {})

    def advance(
        self, activations: Activations, inputs: LoopInputs, index: int | Tensor, context: PassContext
    ) -> Activations:
        """Run one more loop of a pass that may end after any loop, as in decoding; without gradient.

        index: of the loop, or (B,) of each sequence's own."""
        t, loops = open_pass(index)
        if self.config.loop_signal:
            inputs = inputs._replace(signals={t: loop_signal(loops.own_index(t), self.config.dim, activations.h)})
        return self._run_group(range(t, t + 1), loops, activations, inputs, context)[0]

    def _signals(self, loop_range: range, loops: Loops, like: Tensor) -> dict[int, Tensor]:
        if not self.config.loop_signal:
            return {}
        if loops.depths is None:
            index = torch.arange(loop_range.start, loop_range.stop, device=like.device)
            return dict(zip(loop_range, loop_signals(index, self.config.dim, like), strict=True))
        own = {t: torch.as_tensor(loops.own_index(t), device=like.device) for t in loop_range}
        return {t: loop_signals(index, self.config.dim, like).unsqueeze(1) for t, index in own.items()}

    def _groups(self, loop_range: range, loops: Loops) -> Iterator[range]:
        """The loops that are recomputed together, `recompute.every` of them, all with gradient or all without."""
        every = self.recompute.every if self.recompute.kind == "loop" else 1
        n_no_grad = max(0, loops.no_grad_loops - loop_range.start)
        for part in (loop_range[:n_no_grad], loop_range[n_no_grad:]):
            for first in range(0, len(part), every):
                yield part[first : first + every]

    def _all_halted(self, activations: Activations, context: PassContext) -> bool:
        """Whether the remaining loops can be skipped, because their weight is zero for all tokens. Only where no other
        rank waits for this one in a collective, and no later token needs the keys of all loops."""
        mesh = self.mesh
        single = mesh.tensor.size == mesh.expert.size == mesh.pipe.size == mesh.context.size == 1
        needed = torch.is_grad_enabled() or context.cache is not None or self.recorder is not None
        return single and not needed and self.act.all_halted(activations.cum_halting)

    def _group_runner(self, loops: Loops, inputs: LoopInputs, context: PassContext) -> Callable[..., GroupOutputs]:
        """A function (group, activations before it) -> `_run_group`, which the backward pass recomputes if configured;
        what it keeps for that, h and the output so far, goes to host memory if configured."""
        if self.recompute.kind != "loop":
            return lambda group, activations: self._run_group(group, loops, activations, inputs, context)
        states = OffloadedStates() if self.recompute.offload else None
        names = ["h", "output"] if self.act.sums_states(loops) else ["h"]

        def run(group: range, activations: Activations) -> GroupOutputs:
            if states is None or not torch.is_grad_enabled():
                return checkpoint_if(True, self._run_group, group, loops, activations, inputs, context)
            others = activations._replace(**dict.fromkeys(names, UNSET))

            def run_with(*moved: Tensor) -> GroupOutputs:
                inside = others._replace(**dict(zip(names, moved, strict=True)))
                return self._run_group(group, loops, inside, inputs, context)

            return states.run(partial(checkpoint_if, True, run_with), *(getattr(activations, name) for name in names))

        return run

    def _run_group(
        self, group: range, loops: Loops, activations: Activations, inputs: LoopInputs, context: PassContext
    ) -> GroupOutputs:
        counts, readouts = [], []
        for t in group:
            if self.config.initial_state == "e":  # sequences that start now: no-grad loops have detached their h
                h = where_active(loops.active(t - 1), activations.h, activations.e)
                activations = activations._replace(h=h)
            with named_range(f"loop {t}"):
                outputs = self._loop(t, loops, activations, inputs, context)
            if self.recorder is not None:
                before, after = activations.h, outputs.activations.h
                self.recorder.record(t, before, after, outputs.weight, context.seq_len)
            activations = outputs.activations
            counts.append(outputs.counts)
            if outputs.readout is not None:
                readouts.append(outputs.readout)
        return activations, counts, readouts

    def _loop(self, t: int, loops: Loops, before: Activations, inputs: LoopInputs, context: PassContext) -> LoopOutputs:
        """Loop t: h = decay * h + scale * injected + u, with u = block(norm(h + e + signal)); then the weight of h.

        With model.injection=none h = u = block(h + signal), with `difference` the same of h + scale * (e - h). A
        sequence that has not started keeps its h.
        """
        h = before.h
        x = h + before.e if self.adds_e else h
        if self.config.injection == "difference":
            x = torch.lerp(h, inputs.injected, inputs.scale)  # exactly h where e equals h
        x = self.norm(inputs.with_signal(x, t))
        u, routers, kv = self._apply_layers(x, t, loops, before.kv, context)
        if self.adds_e:
            u = torch.addcmul(torch.addcmul(u, inputs.decay, h), inputs.scale, inputs.injected)
        h = where_active(loops.active(t), rms_normalize(u, self.config.norm_eps) if self.config.state_norm else u, h)
        weight, cum_halting = self.act(h, before.cum_halting, t, loops)
        # The uses of h and weight stay in this order: autograd sums their gradients in it, so the bits depend on it.
        aux_loss = self._add_losses(before, h, weight, routers, t, loops, context)
        readout = self.act.readout(before, h, weight, t, loops)
        output = self.act.accumulate(before.output, h, weight, t, loops)
        after = before._replace(h=h, output=output, cum_halting=cum_halting, aux_loss=aux_loss, kv=kv)
        return LoopOutputs(after, weight, routers.counts, readout)

    def _add_losses(
        self,
        before: Activations,
        h: Tensor,
        weight: Tensor,
        routers: LoopStats,
        t: int,
        loops: Loops,
        context: PassContext,
    ) -> Tensor:
        """`aux_loss` after loop t: plus the routers' losses, the penalty on the last loop, and halting's."""
        aux_loss, share = before.aux_loss, context.token_share(h)
        if routers.loss is not None:
            aux_loss = aux_loss + routers.loss / loops.n_loops
        if self.fixed_point > 0 and loops.is_last(t):
            aux_loss = add_fixed_point_loss(aux_loss, before.h, h, self.fixed_point, loops, share)
        return self.act.add_loss(aux_loss, weight, t, loops, share)

    def _apply_layers(
        self, x: Tensor, t: int, loops: Loops, kv: Tensor, context: PassContext
    ) -> tuple[Tensor, LoopStats, Tensor | None]:
        """The layers one after the other in loop t, and the depth LoRA: x (B, S', D) -> the same shape.

        kv: of the loops before. Returns also the routers' statistics, and the keys and values that later loops share.
        """
        # computes: True if all sequences compute keys and values in this loop, False if none does; (B,): those that do.
        L, computes = self.config.loop_layers, loops.computes_kv(t, self.config.kv_loops)
        shared: list[SharedKV | None] = [None] * L
        if computes is not True:
            shared = [SharedKV(own, None if computes is False else computes) for own in kv_by_layer(kv, L)]
        counts, losses, new_kv = [], [], []
        for layer, key, shared_kv in zip(self.layers, self._cache_keys(t, loops, context), shared, strict=True):
            x, stats, own_kv = layer(x, context, key, shared_kv)
            counts.append(stats.counts)
            losses.append(stats.loss)
            new_kv.append(own_kv)
        if self.config.lora != "none":
            x = self.lora(x, loops.own_index(t))
        loss = None if losses[0] is None else sum(losses[1:], losses[0])
        total = torch.cat(counts) if context.counts_experts else UNSET
        return x, LoopStats(total, loss), kv if computes is False else join_kv(new_kv)

    def _cache_keys(self, t: int, loops: Loops, context: PassContext) -> list[CacheKey]:
        """The layers' keys in loop t. Loops that share keys and values share a cache entry, named after the first of
        them."""
        names = [looped_layer(i) for i in range(self.config.loop_layers)]
        if context.cache is None:  # one key for all loops: `torch.compile` would compile a layer for each key
            return [*names]
        cache, index = context.cache, loops.cache_index(t, self.config.kv_loops)
        if isinstance(index, int):
            return [cache.loop_key(name, index) for name in names]
        return [[cache.loop_key(name, own) for own in index] for name in names]

    def _use_all_parameters(self, activations: Activations, with_grad: range, loops: Loops) -> Tensor:
        """`aux_loss` unchanged; its backward gives gradients of zeros to parameters that this pass has not used,
        because every parameter takes part in collectives."""
        aux_loss = activations.aux_loss
        if with_grad:
            aux_loss = self.act.use_all_parameters(aux_loss, activations.h)
        if self.mesh.pipe.size == 1:
            return aux_loss
        # Some pipeline stages run no loop with gradient, or none of them computes keys and values, and only the first
        # stage with loops applies e_norm.
        unused = [self] if not with_grad else [getattr(self, "e_norm", nn.Module())]
        if with_grad and all(loops.computes_kv(t, self.config.kv_loops) is False for t in with_grad):
            unused += [projection for layer in self.layers for projection in layer.attn.kv_projections()]
        return _ZeroGradients.apply(aux_loss, *(parameter for module in unused for parameter in module.parameters()))


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
