"""Collectives of the model's layers, forward and backward, on one rank; see communication.py."""

# B batch, S sequence (S' of it on this rank: S / tensor with sequence parallelism, else S), D model, k experts per
# token, n ranks of an axis, N = B * S tokens.

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mythos_dist.config.schema import Config
from mythos_dist.model.activations import has_auxiliary_losses, num_bytes, stage_input_shapes
from mythos_dist.model.attention_sizes import AttentionSizes, attention_sizes
from mythos_dist.model.parameter_table import LocalParameter
from mythos_dist.model.shared_kv import shared_kv_shape
from mythos_dist.ops.plan.activations import ITEM_BYTES
from mythos_dist.ops.plan.chunks import chunk_sizes
from mythos_dist.parallel.context import local_tokens
from mythos_dist.parallel.mesh import Axis, Mesh
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.parallel.process import DTYPES

Messages = Counter[tuple[str, str]]  # bytes by axis and kind

FP32, FP64, INT32, INT64 = 4, 8, 4, 8


def message(axis: Axis, kind: str, size: int) -> Messages:
    """`size` bytes over an axis; nothing over an axis of one rank."""
    return Counter({(axis.name, kind): size}) if axis.size > 1 else Counter()


def scaled(messages: Messages, times: int) -> Messages:
    return Counter({key: times * size for key, size in messages.items()})


class Pass(NamedTuple):
    """What a layer sends forward and backward."""

    forward: Messages
    backward: Messages

    def then(self, *others: Pass) -> Pass:
        """This layer and others."""
        forward, backward = self.forward.copy(), self.backward.copy()
        for other in others:
            forward += other.forward
            backward += other.backward
        return Pass(forward, backward)


NOTHING = Pass(Counter(), Counter())


@dataclass(frozen=True)
class LayerMessages:
    """Layers as one rank of `mesh` runs them; each method is one of model/ or parallel/."""

    config: Config
    mesh: Mesh
    readouts: int = 1  # that the coda and the head run on together

    @property
    def per_loop(self) -> bool:
        """Whether every loop has a readout, so that stages send each other more with every loop."""
        return self.config.loops.objective == "per_loop"

    @property
    def item(self) -> int:
        """Bytes of an element of a parameter or an activation."""
        return ITEM_BYTES[self.config.train.dtype]

    @functools.cached_property
    def sizes(self) -> AttentionSizes:
        return attention_sizes(self.config.model, self.mesh.tensor.size)

    @property
    def tokens(self) -> int:
        """On this rank of the context axis."""
        return self.config.train.micro_batch * local_tokens(self.config.train.seq_len, self.mesh)

    @property
    def x(self) -> int:
        """Bytes of a full residual stream (B, S, D)."""
        return self.tokens * self.config.model.dim * self.item

    def enter(self, size: int) -> Pass:
        """parallel/collectives.py: Megatron-LM's f (Shoeybi et al. 2019); g (Korthikanti et al. 2022) with sequence."""
        tensor = self.mesh.tensor
        if self.mesh.sequence:
            return Pass(message(tensor, "all_gather", size), message(tensor, "reduce_scatter", size))
        return Pass(Counter(), message(tensor, "all_reduce", size))

    def leave(self, size: int) -> Pass:
        """Their conjugates."""
        tensor = self.mesh.tensor
        if self.mesh.sequence:
            return Pass(message(tensor, "reduce_scatter", size), message(tensor, "all_gather", size))
        return Pass(message(tensor, "all_reduce", size), Counter())

    def gather(self, size: int, partial: bool = True) -> Pass:
        """An all-gather of shards; partial: their gradients are partial sums."""
        tensor = self.mesh.tensor
        backward = message(tensor, "reduce_scatter", size) if partial else Counter()
        return Pass(message(tensor, "all_gather", size), backward)

    def attention(self) -> Pass:
        """model/attention.py, with shared keys and values."""
        queries = self.gather(self.tokens * self.sizes.gathered_queries * self.item)
        return self.enter(self.x).then(queries, self.exchange(), self.leave(self.x))

    def exchange(self) -> Pass:
        """model/context_attention.py: what keys and values are computed from, of all ranks of the context axis; ranks
        with fewer tokens send as many as the others. The backward pass gathers it again, and so does recomputation."""
        train, context = self.config.train, self.mesh.context
        longest = local_tokens(train.seq_len, replace(self.mesh, context=replace(context, rank=0)))
        rows = context.size * train.micro_batch * longest
        size = rows * self.sizes.kv_width * self.item
        gathered = message(context, "all_gather", size)
        backward = gathered + message(context, "reduce_scatter", size)
        return Pass(gathered, backward + gathered if train.recompute == "selective" else backward)

    def keys_values(self) -> Pass:
        """model/attention.py, where they are computed."""
        return self.gather(self.tokens * self.sizes.gathered_kv * self.item)

    def repeated(self, layer: Pass) -> Pass:
        """Messages that a layer which works in chunks repeats in its backward pass (model/chunks.py), once more."""
        return Pass(Counter(), layer.forward) if self.config.chunk_size else NOTHING

    def dense_block(self) -> Pass:
        """model/block.py: attention and an FFN."""
        enter = self.enter(self.x)
        return self.attention().then(self.keys_values(), enter, self.leave(self.x), self.repeated(enter))

    def routing(self) -> Pass:
        """model/moe.py: weights and indices of the chosen experts."""
        c, tensor = self.config.model, self.mesh.tensor
        chosen = self.tokens * c.n_experts_per_tok
        weights = self.enter(chosen * FP32)
        if not self.mesh.sequence:
            return weights
        return weights.then(Pass(message(tensor, "all_gather", chosen * INT32), Counter()))

    def balance_loss(self) -> Pass:
        """model/moe.py: the shares of the sequence-wise balance loss."""
        if not self.config.experts.sequence_balance_loss:
            return NOTHING
        share = self.config.train.micro_batch * self.config.model.n_experts * FP32
        messages = message(self.mesh.context, "all_reduce", share)
        if self.mesh.sequence:
            messages += message(self.mesh.tensor, "all_reduce", share)
        return Pass(messages, Counter())

    def experts(self, calls: int, sent: int, received: int) -> Pass:
        """parallel/expert.py, all `calls` of MoE layers together: counts, for each chunk; then channels, weights and
        experts of the rows sent, and the channels of the rows that come back."""
        c, expert, tensor = self.config.model, self.mesh.expert, self.mesh.tensor
        if expert.size == 1:
            return NOTHING
        slots = min(c.n_experts_per_tok, c.n_experts // expert.size)
        width = c.dim // tensor.size
        dispatched, combined = (width + 2 * slots) * self.item, width * self.item

        def all_to_all(size: int) -> Messages:
            return message(expert, "all_to_all", size)

        counts = all_to_all(calls * len(chunk_sizes(self.config, self.mesh)) * expert.size * 2 * INT64)
        full_rows = self.gather(received * c.dim * self.item)  # channels of the received rows over the tensor axis
        out = Pass(counts + all_to_all(sent * dispatched), all_to_all(received * dispatched)).then(full_rows)
        back = Pass(all_to_all(received * combined), all_to_all(sent * combined))
        return out.then(back, Pass(full_rows.backward, full_rows.forward), self.repeated(out))

    def depth_lora(self) -> Pass:
        """model/recurrence.py: weights are gathered; their gradients are partial with sequence parallelism only."""
        c = self.config.model
        if c.lora == "none":
            return NOTHING
        elements = self.sizes.padded(c.lora_rank) * (2 * c.dim + (c.lora == "shared"))
        return self.gather(elements * self.item, partial=self.mesh.sequence)

    def loops(self, loops: int, compute_kv: int, sent: int, received: int) -> Pass:
        """model/recurrence.py: `loops` loops, of which `compute_kv` compute keys and values, and in which `sent` and
        `received` rows are exchanged altogether."""
        layers = self.config.model.loop_layers
        enter = self.routing().then(self.enter(self.x))
        layer = self.attention().then(enter, self.balance_loss(), self.leave(self.x), self.repeated(enter))
        parts = (layer, loops * layers), (self.keys_values(), compute_kv * layers), (self.depth_lora(), loops)
        all_loops = NOTHING.then(
            *(Pass(scaled(part.forward, times), scaled(part.backward, times)) for part, times in parts)
        )
        return all_loops.then(self.experts(loops * layers, sent, received))

    def head(self) -> Pass:
        """parallel/tensor.py: the output embedding, and three values per position for the cross entropy: the highest
        logit first, then the sum of exponentials and the label's logit; with a teacher as many more for the student
        readouts. model/mythos.py: the auxiliary losses' sum, and the numbers of labels."""
        tensor, experts, act = self.mesh.tensor, self.config.experts, self.config.act
        size = self.tokens * self.readouts * FP32
        students = self.tokens * (self.readouts - 1) * FP32 if self.config.loops.teacher else 0
        loss = message(tensor, "all_reduce", size + students) + message(tensor, "all_reduce", 2 * (size + students))
        loss += message(self.mesh.context, "all_reduce", self.readouts * INT64)
        if self.mesh.sequence and has_auxiliary_losses(experts, act, self.config.loops.fixed_point):
            loss += message(tensor, "all_reduce", FP32)
        if self.mesh.sequence and self.per_loop:  # the readouts' weights
            loss += message(tensor, "all_gather", size)
        return self.enter(self.x * self.readouts).then(Pass(loss, Counter()))

    def injection(self) -> Pass:
        """model/injection.py: Parcae's matrix, once for all loops."""
        if self.config.model.injection != "parcae":
            return NOTHING
        return self.enter(self.x).then(self.leave(self.x))

    def replicated_gradients(self, parameters: Sequence[LocalParameter]) -> Messages:
        """parallel/tensor.py: replicated, once per backward pass."""
        elements = 0
        for parameter in parameters:
            if parameter.gradient_sum == "always" or (parameter.gradient_sum == "sequence" and self.mesh.sequence):
                elements += parameter.numel
        return message(self.mesh.tensor, "all_reduce", elements * self.item)

    def stage_activations(self, stages: Sequence[StageSpec], loops: range, no_grad: int) -> Messages:
        """deepspeed/runtime/pipe/engine.py: activations go to the next stage, their gradient to the previous one."""
        return message(self.mesh.pipe, "send", sum(self.stage_boundaries(stages, loops, no_grad)))

    def stage_boundaries(self, stages: Sequence[StageSpec], loops: range, no_grad: int) -> tuple[int, int]:
        """Bytes of the packed activations that this stage receives, and of those that it sends."""
        i, received, sent = self.mesh.pipe.rank, 0, 0
        if not stages[i].is_first:
            received = self._activation_bytes(stages[i], max(0, loops.start - no_grad))
        if not stages[i].is_last:
            sent = self._activation_bytes(stages[i + 1], max(0, loops.stop - no_grad))
        return received, sent

    def _activation_bytes(self, stage: StageSpec, earlier_loops: int) -> int:
        """The packed input of a stage, after `earlier_loops` loops with gradient."""
        train = self.config.train
        tokens = local_tokens(train.seq_len, self.mesh)
        seq_len = tokens // self.mesh.tensor.size if self.mesh.sequence else tokens
        readouts = (self.readouts if stage.after_loops else earlier_loops) if self.per_loop else 0
        shape = torch.Size([train.micro_batch, seq_len, self.config.model.dim])
        kv_shape = shared_kv_shape(self.config.model, train.micro_batch, tokens, self.mesh.tensor.size)
        return num_bytes(stage_input_shapes(stage, shape, DTYPES[train.dtype], readouts, kv_shape))
