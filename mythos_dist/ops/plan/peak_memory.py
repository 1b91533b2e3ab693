"""Peak memory of a rank in a step, by formula and by part (`memory.py`).

It is reached at one of a few points: in the loss, or in the backward pass of a looped block, of prelude or of coda,
where their widest tensors are. Each term names the code that creates the tensors; what is as small as a norm's scale is
left out.
The trap: autograd sums up the gradient of a weight that every loop uses, so from the second loop on the sum exists
beside the current loop's gradient; and the first sum of a transposed product is a third tensor.

Decisions: PLAN-3.
"""

# Letters as in activations.py.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from mythos_dist.config.deepspeed import LARGEST_BUCKET
from mythos_dist.config.schema import Config
from mythos_dist.model.flops import stage_specs
from mythos_dist.model.parameter_groups import kept_gradients, plan_groups
from mythos_dist.model.parameter_table import LocalParameter, local_parameters
from mythos_dist.model.recompute import pinned_bytes
from mythos_dist.ops.plan.activations import LayerActivations, Saved
from mythos_dist.ops.plan.chunks import ExpertRows
from mythos_dist.ops.plan.layer_communication import LayerMessages
from mythos_dist.ops.plan.memory import Memory, bucket_bytes, static_memory, uses_bf16_optimizer
from mythos_dist.ops.plan.muon import muon_workspace
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import StageSpec, loops_with_grad


def peak_memory(
    config: Config,
    mesh: Mesh,
    stage: StageSpec,
    loops: range,
    no_grad: int,
    rows: ExpertRows,
    chunk_rows: ExpertRows,
) -> tuple[Memory, float]:
    """Bytes by part at the peak, of a rank whose stage runs the loops `loops`; the step's first `no_grad` loops have no
    gradient. And bytes of host memory for saved hidden states."""
    parameters = local_parameters(config.model, mesh.tensor.size, mesh.expert.size, stage)
    static = static_memory(config, mesh, parameters)
    peak: Memory = {}
    candidates = _PeakCandidates(LayerActivations(config, mesh, rows, chunk_rows), stage, loops, no_grad, parameters)
    for candidate in candidates.all():
        total = {name: static.get(name, 0.0) + candidate.get(name, 0.0) for name in {*static, *candidate}}
        if sum(total.values()) > sum(peak.values()):
            peak = total
    return peak, candidates.host()


class _PeakCandidates:
    """Memory besides the static parts at the points of a step that can be the peak."""

    def __init__(
        self,
        layers: LayerActivations,
        stage: StageSpec,
        loops: range,
        no_grad: int,
        parameters: Sequence[LocalParameter],
    ):
        self.layers, self.stage, self.parameters = layers, stage, parameters
        self.config, self.mesh = config, mesh = layers.config, layers.mesh
        self.trained = loops_with_grad(loops, no_grad)
        self.live = len(self.trained)
        self.recomputed = config.train.recompute == "loop"
        self.every = config.train.recompute_every if self.recomputed else 1
        # The coda and the head run on all readouts at once.
        self.readouts = config.loops.readouts(config.loops.mean_of(config.model), no_grad)
        # Held until the embedding's backward, if that is the same table; else only until that of the head.
        tied = config.model.tie_embeddings
        self.new_head_gradient = self._gradients("embed" if tied else "unembed") if stage.is_last else 0.0
        self.head_gradient = self.new_head_gradient if tied else 0.0
        self.recurrent_gradients = self._gradients("recurrent")
        self.layer_gradients = self._gradients("recurrent.block.")  # the first layer's, as large as the others'

        injection = layers.injection() if stage.has_loops else Saved()
        before_loops = layers.dense_block() * len(stage.prelude) + injection
        after_loops = layers.dense_block() * (len(stage.coda) * self.readouts)
        if config.loops.fixed_point and not self.recomputed:  # the last loop's change, in fp32
            after_loops += Saved(layers.output)
        if self.recomputed and self.live:  # recomputation keeps the first loop's inputs, act.mode=off's output too
            before_loops += Saved(layers.output - layers.output_so_far)
        carries = self._carries(ceil(self.live / self.every), on_device=1)
        in_loops = (carries if self.recomputed else layers.loop().total * self.live) + self._held_kv(self.trained)
        saved = before_loops.total + after_loops.total + in_loops  # of one micro-batch
        micro_batches = max(1, config.train.global_batch // (config.train.micro_batch * mesh.data.size))
        self.exchange = layers.context_exchange()
        self.bucket = 0.0 if config.parallel.zero == 3 else bucket_bytes(config, mesh, parameters)
        self.in_flight = min(mesh.pipe.size - mesh.pipe.rank, micro_batches) - 1  # other micro-batches in the pipeline
        boundary_layers = LayerMessages(config, mesh, self.readouts)
        self.boundaries = boundary_layers.stage_boundaries(stage_specs(config), loops, no_grad)  # received, sent
        buffers = self._pipeline_buffers(micro_batches)
        self.all_saved = (self.in_flight + 1) * saved + buffers
        self.saved_before_loops = self.in_flight * saved + before_loops.total + buffers

    def _pipeline_buffers(self, micro_batches: int) -> float:
        """deepspeed/runtime/pipe/engine.py: what a stage received and what it sent, of each micro-batch in the
        pipeline; the buffer that messages arrive in, one for both directions if it is large enough. The last stage
        keeps the losses of its last two micro-batches, and so what the one before has received, and its gradient."""
        received, sent = self.boundaries
        arriving = received + (sent if sent > received else 0)
        done = 2 * received * (micro_batches > 1) if self.stage.is_last else 0
        return (self.in_flight + 1.0) * (received + sent) + arriving + done

    def _carries(self, groups: int, on_device: int) -> float:
        """Bytes of the inputs of recomputed groups; of those that go to host memory, of `on_device` groups."""
        offloaded = max(0, groups - on_device) if self.config.train.offload == "saved" else 0
        return self.layers.carry() * groups - sum(self.layers.moved()) * offloaded

    def host(self) -> float:
        """Bytes of saved hidden states in host memory (train.offload), of all micro-batches in the pipeline."""
        if self.config.train.offload == "none":
            return 0.0
        per_group = sum(pinned_bytes(round(size)) for size in self.layers.moved())
        return per_group * ceil(self.live / self.every) * (self.in_flight + 1)

    def _held_kv(self, loops: range) -> float:
        """Bytes of shared keys and values that these loops hold: once for each group of loops that shares them; with
        recomputation, which keeps inputs, only for those that are recomputed from the middle of such a group on.
        Later loops use one tensor for all layers: with several, a copy of the layers' own."""
        size = self.layers.c.kv_loops
        if self.recomputed:
            return self.layers.shared_kv() * len({t // size for t in loops[:: self.every] if t % size})
        computed, used = {t // size for t in loops if t % size == 0}, {t // size for t in loops if t % size}
        held = len(computed) + len(used) if self.layers.c.loop_layers > 1 else len(computed | used)
        return self.layers.shared_kv() * held

    def _gradients(self, prefix: str) -> float:
        """Bytes of the gradients of parameters whose name starts with `prefix`."""
        return self.layers.b * sum(p.numel for p in self.parameters if p.name.startswith(prefix))

    def all(self) -> Iterator[Memory]:
        yield self._reduction()
        yield {"workspace": muon_workspace(self.config, self.mesh, self.stage)}
        if self.stage.is_last:
            yield self._loss()
        for candidate in self._backward():
            yield candidate | {"communication": candidate.get("communication", 0.0) + self.bucket}

    def _backward(self) -> Iterator[Memory]:
        if len(self.stage.coda):
            yield self._dense_block(self.all_saved, self.readouts, residuals=1)
            if self.layers.selective:
                yield self._recomputed_attention()
            if self.mesh.context.size > 1:
                yield self._context_attention(self.all_saved, self.readouts, residuals=1)
        if self.live:
            yield from self._loops_in_chunks() if self.layers.in_chunks else self._loops()
        if len(self.stage.prelude):
            yield self._dense_block(self.saved_before_loops, 1, residuals=4)
            if self.mesh.context.size > 1:
                yield self._context_attention(self.saved_before_loops, 1, residuals=4)

    def _reduction(self) -> Memory:
        """After the last backward pass: deepspeed/runtime/engine.py, allreduce_bucket, concatenates the accumulators of
        a bucket (a single one is not copied) and casts them to the weights' dtype. zero/stage_1_and_2.py: in a pipeline
        `reduce_gradients` allocates the bucket again; ZeRO-2 copies this rank's part before it adds it to that of
        earlier micro-batches."""
        groups = plan_groups(self.parameters, self.mesh)
        if not uses_bf16_optimizer(self.config):
            part = 0.0
            if self.config.parallel.zero == 2:
                part = self.layers.b * kept_gradients(groups, self.mesh).elements
            return {"communication": self.bucket * (2 if self.mesh.pipe.size > 1 else 1), "gradients": part}
        buckets: list[list[int]] = [[]]
        for group in groups:
            if group.expert_sharded or sum(buckets[-1]) > LARGEST_BUCKET:
                buckets.append([])
            buckets[-1].append(group.numel)
        copies = [sum(bucket) * (2 + (4 if len(bucket) > 1 else 0)) for bucket in buckets]
        return {"workspace": max(copies)}

    def _loss(self) -> Memory:
        """parallel/tensor.py computes the head's gradients in the forward pass, a chunk of tokens at a time."""
        layers, c = self.layers, self.config.model
        vocab = ceil(c.vocab_size / layers.t)
        rows = layers.N * self.readouts
        chunk = max(256, rows * c.dim // max(1, vocab))
        chunk = min(chunk, self.config.chunk_size or chunk)
        # The last norm's input, its output and the gradient of that; of a chunk the logits, also in fp32, and their
        # gradient; with a teacher before that gradient its logits, also in fp32, and the difference of both in fp32.
        per_logit = 2 * layers.b + (12 if self.readouts > 1 and self.config.loops.teacher else 4)
        chunk = min(chunk, rows)
        head, gathered = (layers.residual + 2 * layers.x) * self.readouts, 0.0
        if layers.in_chunks and self.mesh.sequence:  # only the chunk's rows are gathered, and their gradient scattered
            head, gathered = 3 * layers.residual * self.readouts, 2 * chunk * c.dim * layers.b
        # What DeepSpeed holds until the forward pass ends: a copy of what was received, and of an earlier micro-batch,
        # whose loss this one replaces, what that has received, and its gradient.
        received = 3 * self.boundaries[0]
        activations = self.all_saved + received + head + gathered + chunk * vocab * per_logit
        return {"activations": activations, "gradients": self.new_head_gradient}

    def _dense_block(self, saved: float, readouts: int, residuals: int) -> Memory:
        """The backward pass of the FFN in the last block of coda or prelude."""
        layers = self.layers
        weight = self.config.model.dim * layers.ffn_hidden * layers.b
        if layers.in_chunks:  # the last chunk's, with gate and up again, after gradients of the others' inputs
            hidden = 5 * layers.chunk_size * layers.ffn_hidden * layers.b
            weights, workspace = 4 * weight, hidden + (residuals + 1) * layers.residual * readouts
            gathered = 2 * layers.chunk_size * self.config.model.dim * layers.b
        else:
            hidden = 3 * layers.N * layers.ffn_hidden * layers.b
            weights, workspace = weight, (hidden + residuals * layers.residual) * readouts
            gathered = layers.x * readouts
        return {
            "activations": saved,
            "gradients": self.head_gradient + weights,
            "workspace": workspace,
            "communication": gathered if self.mesh.sequence else 0,
        }

    def _context_attention(self, saved: float, readouts: int, residuals: int) -> Memory:
        """The backward pass of attention over the context axis in the last block of coda or prelude."""
        layers = self.layers
        hidden = 0 if layers.selective or layers.in_chunks else 2 * layers.N * layers.ffn_hidden * layers.b
        ffn = layers.residual + (layers.residual if layers.in_chunks else layers.layer_input().total) + hidden
        again = layers.recomputed_attention() if layers.selective else 0.0
        gathered, other = self.exchange
        return {
            "activations": saved - ffn * readouts,
            "gradients": self.head_gradient,
            "workspace": (residuals * layers.residual + again + other) * readouts,
            "communication": gathered * readouts,
        }

    def _recomputed_attention(self) -> Memory:
        """The backward pass of attention in the last block of the coda, which has freed the FFN's inputs."""
        layers = self.layers
        ffn = (layers.residual + layers.layer_input().total) * self.readouts
        workspace = (layers.residual + layers.recomputed_attention()) * self.readouts
        return {"activations": self.all_saved - ffn, "gradients": self.head_gradient, "workspace": workspace}

    @property
    def _done(self) -> list[int]:
        """Loops whose backward pass is done at the points that can be the peak: none; the last one; all of the last
        group that is recomputed together."""
        first_of_last_group = (self.live - 1) // self.every * self.every
        return sorted({0, 1, self.live - first_of_last_group} & set(range(self.live)))

    def _loop_candidates(self) -> Iterator[tuple[bool, _LoopCandidate]]:
        """Points in the backward pass of loops, each with whether other loops are done. In the backward pass of the
        first, gradients of weights grow from layer to layer while saved tensors are freed; in others only the latter.
        """
        for done in self._done:
            for layers_done in range(1 if done else self.layers.c.loop_layers):
                yield done > 0, self._loop(done, layers_done)

    def _loops_in_chunks(self) -> Iterator[Memory]:
        """In the backward pass of a loop: of the MoE layer's last chunk, whose hidden rows are recomputed, and of
        attention. From the second chunk on, sums of the MoE layer's gradients exist."""
        layers = self.layers
        b, D, P, rows = layers.b, layers.c.dim, layers.chunk_size, layers.chunk_rows
        gate, x = P * layers.shared_hidden * b, P * D * b
        shared, expert = D * layers.shared_hidden * b, layers.local_experts * D * layers.expert_hidden * b
        hidden, experts = rows.pairs * layers.expert_hidden * b, layers.chunk_experts()
        in_sequence = x if self.mesh.sequence else 0.0
        received = rows.received * D * b if self.mesh.expert.size > 1 else in_sequence
        freed = Saved(2 * layers.residual + layers.output_so_far)
        for done, candidate in self._loop_candidates():
            sums = 0.0 if done else 3 * (shared + expert)
            others = layers.residual + experts.work  # gradients of other chunks' inputs
            gathered = 2 * in_sequence + experts.gathered
            yield candidate.memory(sums + shared, others + 5 * gate, gathered, freed)
            yield candidate.memory(sums + shared, others + x + gate, gathered, freed)
            gathered += received - in_sequence
            yield candidate.memory(sums + expert, others + x + rows.pairs * D * b + 3 * hidden, gathered, freed)
            yield candidate.memory(sums + 3 * expert, others + x + 2 * rows.pairs * D * b + 2 * hidden, gathered, freed)
            again = layers.recomputed_attention() if layers.selective else 0.0
            if self.mesh.context.size > 1:
                entries, workspace = self.exchange
                yield candidate.memory(sums, again + workspace, entries, freed + layers.moe())
            else:
                attention = again or layers.attention_gradients()
                yield candidate.memory(sums, attention, in_sequence and layers.x, freed + layers.moe())

    def _loops(self) -> Iterator[Memory]:
        """In the backward pass of the last loop, where no gradient sum exists yet, and of those before it."""
        layers, selective = self.layers, self.layers.selective
        b, D, M = layers.b, layers.c.dim, layers.rows.pairs
        gate = layers.shared_gate()
        shared = D * layers.shared_hidden * b  # one weight of three
        expert = layers.local_experts * D * layers.expert_hidden * b  # one weight of three
        gates = 0 if selective else 2 * gate
        freed = 2 * layers.residual + layers.output_so_far  # the end of the loop: its output twice, and in fp32
        exchanged = self.mesh.expert.size > 1
        gathered = layers.x if self.mesh.sequence else 0.0  # the gradient of the MoE layer's output
        for done, candidate in self._loop_candidates():
            # model/swiglu.py: hidden rows and their gradients; the gradient of `down` comes last.
            yield candidate.memory(shared, (5 if selective else 3) * gate, gathered, Saved(freed))
            if done:  # the gradient of `gate` or `up` and, once, its sum
                yield candidate.memory(2 * shared, gate + layers.x, gathered, Saved(freed + gates))
            # model/grouped.py: first the gradient of `down`, then with all three of them rows twice.
            rows, hidden = M * D * b, M * layers.expert_hidden * b
            received = layers.rows.received * D * b if exchanged else gathered
            other = layers.x + (2 * hidden if selective else 0.0)
            freed_before_experts = Saved(freed + gates) + (layers.layer_input() if exchanged else Saved())
            yield candidate.memory(expert, other + rows + 3 * hidden, received, freed_before_experts)
            yield candidate.memory(3 * expert, other + 2 * rows + 2 * hidden, received, freed_before_experts)
            if self.mesh.context.size > 1:
                again = layers.recomputed_attention() if selective else 0.0
                entries, workspace = self.exchange
                before_attention = Saved(freed) + layers.moe()
                # In the last loop the gradients of experts are there; later ones are added to their sums at once.
                new_gradients = 0.0 if done else 3 * (expert + shared)
                yield candidate.memory(new_gradients, again + workspace, entries, before_attention)
        if uses_bf16_optimizer(self.config):
            # The first loop comes last: the gradient of `down` is copied to fp32 and added to its accumulator.
            first = self._loop(self.live - 1)
            yield first.memory(4 / b * shared, 2 * gate, gathered, Saved(freed + gates))

    def _loop(self, done: int, layers_done: int = 0) -> _LoopCandidate:
        """The backward pass of the loop after `done` others, and in it after `layers_done` layers."""
        layers = self.layers
        gradients = self.head_gradient + (self.recurrent_gradients if done else 0.0)
        if layers_done and self.live > 1:  # of a single loop they go to the accumulators at once
            gradients += layers_done * self.layer_gradients
        group, in_group = divmod(self.live - 1 - done, self.every)
        left, size = self.trained[: self.live - done], layers.c.kv_loops
        fetched = 0.0
        if self.recomputed:
            computed_kv = sum(t % size == 0 for t in left[group * self.every :])
            # In host memory: all but the newest; this group's and the one before it are back on the device.
            newest = int(group == (self.live - 1) // self.every)
            saved = self._carries(group + 1, on_device=newest)
            if self.config.train.offload == "saved":
                fetched = sum(layers.moved()) * (min(2, group + 1) - newest)
            recomputed = layers.loop() * (in_group + 1) + Saved(layers.shared_kv() * computed_kv)
            recomputed += layers.loop_layer() * -layers_done
        else:
            saved = layers.loop().total * (group + 1) - layers.loop_layer().total * layers_done
            recomputed = None
        saved += self._held_kv(left)
        # The gradient of keys and values that the next loop has used, too.
        kv_gradient = layers.shared_kv() if done and left.stop % size else 0.0
        # Gradients of h, injected(e) and inside of the block; from the second loop on also of e, if that is another.
        # Without injection, of h and inside of the block; with that of differences from the second loop on also of e.
        states = {"none": 2, "difference": 2 + (done > 0), "parcae": 3 + (done > 0)}.get(layers.c.injection, 3)
        if self.readouts > 1:  # and those of the coda's inputs, one tensor for all readouts
            states += self.readouts
        state_gradients = states * layers.residual + kv_gradient + fetched
        return _LoopCandidate(layers, self.saved_before_loops + saved, recomputed, gradients, state_gradients)


@dataclass(frozen=True)
class _LoopCandidate:
    """A point in the backward pass of a loop."""

    layers: LayerActivations
    saved: float  # bytes, by the forward pass
    recomputed: Saved | None  # None: nothing is recomputed
    gradients: float
    states: float  # bytes of gradients of h, e, and shared keys and values; and of hidden states back from the host

    def memory(self, new_gradients: float, other: float, gathered: float, freed: Saved) -> Memory:
        """With these bytes of new weight gradients, of other tensors, and of outputs of collectives; less `freed`."""
        state_gradients = self.states + self.layers.output_so_far
        memory = {
            "activations": self.saved,
            "gradients": self.gradients + new_gradients,
            "workspace": state_gradients + other,
            "communication": gathered,
        }
        if self.recomputed is None:
            memory["activations"] -= freed.total
        else:
            memory["workspace"] += self.recomputed.work - freed.work
            memory["communication"] += self.recomputed.gathered - freed.gathered
        return memory
