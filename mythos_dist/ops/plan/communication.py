"""Bytes that one rank hands to collectives in one optimizer step, by formula, per axis and kind.

Sizes follow the convention of `parallel.traffic`, which counts the same numbers. Every term names the code that it
is read from: ours, or DeepSpeed 0.19.8's. The trap: how many rows go to which expert's rank is data; who asks, says.
"""

# B batch, S sequence (S' of it on this rank: S / tensor with sequence parallelism, else S), D model, k experts per
# token, n ranks of an axis, N = B * S tokens.

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from mythos_dist.config.schema import Config
from mythos_dist.ops.plan.memory import accumulates_at_once
from mythos_dist.ops.plan.parameters import Weight, group_sizes, weights_of
from mythos_dist.parallel.mesh import Axis, Mesh
from mythos_dist.parallel.pipeline import StageSpec, loops_with_grad

Pair = tuple[int, int]  # rows sent and received over the expert axis
Rows = Sequence[Sequence[Pair]] | Pair  # [micro-batch][loop]; or those of every loop, if all are alike

_FP32, _FP64, _INT32, _INT64 = 4, 8, 4, 8
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_PERSISTS = 100_000  # DeepSpeed's stage3_param_persistence_threshold


def stage_communication(
    config: Config,
    mesh: Mesh,
    parts: Sequence[StageSpec],
    turns: range,
    n_loops: int,
    frozen: int,
    rows: Rows | None,
    first_send: bool,
    micro_batches: int,
) -> dict[str, dict[str, int]]:
    """`plan.cost.communication` of a rank whose stage, one of `parts`, runs the loops `turns` of `n_loops`."""
    part = parts[mesh.pipe.rank]
    weights = weights_of(config.model, mesh.tensor.size, mesh.expert.size, part)
    layers = _Layers(config, mesh, config.loops.readouts(n_loops, frozen))
    live = loops_with_grad(turns, frozen)

    total: Counter[tuple[str, str]] = Counter()
    for block in _once(layers, part):
        total += block.forward + block.backward
    total += _summed_gradients(weights, layers)
    total += _states(layers, parts, turns, frozen)
    total = _times(total, micro_batches)
    trained = layers.loops(micro_batches * len(live), *_sum_rows(rows, micro_batches, live))
    total += layers.loops(micro_batches * len(turns), *_sum_rows(rows, micro_batches, turns)).forward
    total += trained.backward
    if config.train.recompute == "loop":  # model/recompute.py; selective sends nothing twice
        total += trained.forward
    total += _tied(weights, parts, layers)
    if mesh.pipe.size > 1:
        shapes = micro_batches if layers.varies else int(first_send)
        total += _pipeline_scalars(mesh, shapes)
    total += _zero(weights, layers, micro_batches)
    out: dict[str, dict[str, int]] = {}
    for (axis, kind), size in total.items():
        out.setdefault(axis, {})[kind] = size
    return out


def _sum_rows(rows: Rows | None, micro_batches: int, turns: range) -> Pair:
    """Rows sent and received in the loops `turns` of all micro-batches: every size is proportional to them."""
    match rows:
        case None:
            return 0, 0
        case (int(sent), int(received)):
            return sent * micro_batches * len(turns), received * micro_batches * len(turns)
    pairs = [rows[micro_batch][t] for micro_batch in range(micro_batches) for t in turns]
    return sum(sent for sent, _ in pairs), sum(received for _, received in pairs)


def _sent(axis: Axis, kind: str, size: int) -> Counter[tuple[str, str]]:
    """One message; nothing goes over an axis of one rank."""
    return Counter({(axis.name, kind): size}) if axis.size > 1 else Counter()


def _times(sent: Counter[tuple[str, str]], times: int) -> Counter[tuple[str, str]]:
    return Counter({key: times * size for key, size in sent.items()})


class _Pass(NamedTuple):
    """What a layer sends forward and backward."""

    forward: Counter[tuple[str, str]]
    backward: Counter[tuple[str, str]]

    def and_(self, *others: _Pass) -> _Pass:
        return _Pass(
            sum((other.forward for other in others), self.forward),
            sum((other.backward for other in others), self.backward),
        )


@dataclass(frozen=True)
class _Layers:
    """Layers as one rank of `mesh` runs them; each method is one of model/ or parallel/."""

    config: Config
    mesh: Mesh
    readouts: int = 1  # which the coda and the head run on together

    @property
    def varies(self) -> bool:
        """Whether every loop is read out, so that stages send each other more with every loop."""
        return self.config.loops.objective == "per_loop"

    @property
    def item(self) -> int:
        """Bytes of a parameter or an activation."""
        return _BYTES[self.config.train.dtype]

    @property
    def tokens(self) -> int:
        return self.config.train.micro_batch * self.config.train.seq_len

    @property
    def x(self) -> int:
        """Bytes of a whole residual stream (B, S, D)."""
        return self.tokens * self.config.model.dim * self.item

    def enter(self, size: int) -> _Pass:
        """parallel/collectives.py: Megatron-LM's f (Shoeybi et al. 2019); g (Korthikanti et al. 2022) with sequence."""
        tensor = self.mesh.tensor
        if self.mesh.sequence:
            return _Pass(_sent(tensor, "all_gather", size), _sent(tensor, "reduce_scatter", size))
        return _Pass(Counter(), _sent(tensor, "all_reduce", size))

    def leave(self, size: int) -> _Pass:
        """Their conjugates."""
        tensor = self.mesh.tensor
        if self.mesh.sequence:
            return _Pass(_sent(tensor, "reduce_scatter", size), _sent(tensor, "all_gather", size))
        return _Pass(_sent(tensor, "all_reduce", size), Counter())

    def gather(self, size: int, partial: bool = True) -> _Pass:
        """A tensor of which each rank holds a part."""
        tensor = self.mesh.tensor
        return _Pass(_sent(tensor, "all_gather", size), _sent(tensor, "reduce_scatter", size) if partial else Counter())

    def cut(self, *widths: int) -> int:
        """Numbers in tensors of these widths after gathering: parts are rounded up, parallel/tensor.py: shard_range."""
        n = self.mesh.tensor.size
        return sum(n * ceil(width / n) for width in widths)

    def attention(self) -> _Pass:
        """model/attention.py: MLA gathers both latents; GQA keys and values, if their heads do not divide."""
        c = self.config.model
        if c.attn_type == "mla":
            width = self.cut(c.q_lora_rank, c.kv_lora_rank + c.qk_rope_head_dim)
        elif c.n_kv_heads % self.mesh.tensor.size:
            width = 2 * self.cut(c.n_kv_heads * c.head_dim)
        else:
            width = 0
        gathered = self.gather(self.tokens * width * self.item)
        return self.enter(self.x).and_(gathered, self.leave(self.x))

    def dense_block(self) -> _Pass:
        """model/block.py: attention and an FFN."""
        return self.attention().and_(self.enter(self.x), self.leave(self.x))

    def router(self) -> _Pass:
        """model/moe.py: weights and numbers of the chosen experts, and with them the balance loss's shares."""
        c, tensor = self.config.model, self.mesh.tensor
        chosen = self.tokens * c.n_experts_per_tok
        weights = self.enter(chosen * _FP32)
        if not self.mesh.sequence:
            return weights
        index = _Pass(_sent(tensor, "all_gather", chosen * _INT32), Counter())
        if not self.config.experts.sequence_balance_loss:
            return weights.and_(index)
        share = self.config.train.micro_batch * c.n_experts * _FP32
        return weights.and_(index, _Pass(_sent(tensor, "all_reduce", share), Counter()))

    def experts(self, loops: int, sent: int, received: int) -> _Pass:
        """parallel/expert.py: counts; a row's channels, weights and experts there; its channels back. So many rows in
        all of the loops."""
        c, expert, tensor = self.config.model, self.mesh.expert, self.mesh.tensor
        slots = min(c.n_experts_per_tok, c.n_experts // expert.size)
        width = c.dim // tensor.size
        there, back = (width + 2 * slots) * self.item, width * self.item

        def exchange(size: int) -> Counter[tuple[str, str]]:
            return _sent(expert, "all_to_all", size)

        if expert.size == 1:
            return _Pass(Counter(), Counter())
        whole = self.gather(received * c.dim * self.item)  # of the rows that came; and the sums that go back:
        scattered = _Pass(whole.backward, whole.forward)
        return _Pass(
            exchange(loops * expert.size * 2 * _INT64) + exchange(sent * there) + exchange(received * back),
            exchange(received * there) + exchange(sent * back),
        ).and_(whole, scattered)

    def depth_lora(self) -> _Pass:
        """model/recurrence.py: the weights are gathered; their gradients are parts with sequence parallelism only."""
        c = self.config.model
        if c.lora == "none":
            return _Pass(Counter(), Counter())
        numbers = self.cut(c.lora_rank) * (2 * c.dim + (c.lora == "shared"))
        return self.gather(numbers * self.item, partial=self.mesh.sequence)

    def loops(self, loops: int, sent: int, received: int) -> _Pass:
        """model/recurrence.py: so many turns, and the rows of all of them together."""
        once = self.attention().and_(self.router(), self.enter(self.x), self.leave(self.x), self.depth_lora())
        all_loops = _Pass(_times(once.forward, loops), _times(once.backward, loops))
        return all_loops.and_(self.experts(loops, sent, received))

    def head(self) -> _Pass:
        """parallel/tensor.py: the output embedding, and three numbers per position for the cross entropy: the highest
        logit first, then the sum of exponentials and the label's logit. model/mythos.py: the auxiliary losses' sum."""
        tensor, experts, act = self.mesh.tensor, self.config.experts, self.config.act
        size = self.tokens * self.readouts * _FP32
        loss = _sent(tensor, "all_reduce", size) + _sent(tensor, "all_reduce", 2 * size)
        if self.mesh.sequence and experts.z_loss + experts.sequence_balance_loss + act.ponder_cost + act.kl > 0:
            loss += _sent(tensor, "all_reduce", _FP32)
        if self.mesh.sequence and self.varies:  # the readouts' weights
            loss += _sent(tensor, "all_gather", size)
        return self.enter(self.x * self.readouts).and_(_Pass(loss, Counter()))

    def injection(self) -> _Pass:
        """model/injection.py: Parcae's matrix, once for all loops."""
        if self.config.model.injection == "reference":
            return _Pass(Counter(), Counter())
        return self.enter(self.x).and_(self.leave(self.x))


def _once(layers: _Layers, part: StageSpec) -> list[_Pass]:
    """What a stage runs once per micro-batch: everything but loops."""
    blocks = [layers.dense_block()] * (len(part.prelude) + len(part.coda) * layers.readouts)
    blocks += [layers.injection()] * part.has_loops
    return blocks + [layers.leave(layers.x)] * part.first + [layers.head()] * part.last  # first: the input embedding


def _summed_gradients(weights: Sequence[Weight], layers: _Layers) -> Counter[tuple[str, str]]:
    """parallel/tensor.py: replicated, once per backward pass. Uncut parameters: with sequence parallelism all
    of them, else the norms of MLA's latents, which work on this rank's heads."""
    inside = ("q_norm.weight", "kv_norm.weight", "qk_norm.weight")
    numbers = sum(w.numel for w in weights if not w.cut and (layers.mesh.sequence or w.name.endswith(inside)))
    return _sent(layers.mesh.tensor, "all_reduce", numbers * layers.item)


def _state_bytes(layers: _Layers, part: StageSpec, read: int) -> int:
    """model/mythos.py: what arrives at a stage, packed, behind so many loops with a gradient."""
    tokens = layers.tokens // (layers.mesh.tensor.size if layers.mesh.sequence else 1)
    x, loss = tokens * layers.config.model.dim, _FP32
    weights = layers.varies * tokens * _FP32
    if part.after_loops:
        return layers.readouts * (x * layers.item + weights) + loss
    if not part.has_loops or part.starts_loops:
        return x * layers.item
    carry = 2 * x * layers.item + (x + tokens) * _FP32 + loss  # h, e; the sum so far, halting mass
    return carry + layers.varies * read * (x * layers.item + weights)


def _states(layers: _Layers, parts: Sequence[StageSpec], turns: range, frozen: int) -> Counter[tuple[str, str]]:
    """deepspeed/runtime/pipe/engine.py: the state goes to the next stage, its gradient to the one before."""
    pipe, i = layers.mesh.pipe, layers.mesh.pipe.rank
    ahead = 0 if parts[i].last else _state_bytes(layers, parts[i + 1], max(0, turns.stop - frozen))
    behind = 0 if parts[i].first else _state_bytes(layers, parts[i], max(0, turns.start - frozen))
    return _sent(pipe, "send", ahead + behind)


def _tied(weights: Sequence[Weight], parts: Sequence[StageSpec], layers: _Layers) -> Counter[tuple[str, str]]:
    """train/deepspeed_seam.py: reduce_tied_weights_alike; BF16_Optimizer has its gradients in fp32."""
    item, pipe = _FP32 if layers.config.train.dtype == "bf16" else layers.item, layers.mesh.pipe
    held = [("embed.", [part.first or part.last for part in parts]), ("recurrent.", [part.has_loops for part in parts])]
    total: Counter[tuple[str, str]] = Counter()
    for name, holders in held:
        if sum(holders) > 1 and holders[pipe.rank]:
            for spread, replicas in ((False, layers.mesh.data), (True, layers.mesh.expert_data)):
                numbers = sum(w.numel for w in weights if w.spread == spread and w.name.startswith(name))
                over = Axis("tied", sum(holders) * replicas.size) if replicas.size > 1 else pipe
                total += _sent(over, "all_reduce", numbers * item)
    return total


def _pipeline_scalars(mesh: Mesh, shapes: int) -> Counter[tuple[str, str]]:
    """deepspeed/runtime/pipe/engine.py: the loss over replicas and to all stages; 256 numbers of shape, so often."""
    last = mesh.pipe.rank == mesh.pipe.size - 1
    loss = _sent(mesh.pipe, "broadcast", 2 * _FP32) + (_sent(mesh.data, "all_reduce", _FP32) if last else Counter())
    return loss + (_sent(mesh.pipe, "send", shapes * 256 * _INT32) if shapes and not last else Counter())


def _zero(weights: Sequence[Weight], layers: _Layers, micro_batches: int) -> Counter[tuple[str, str]]:
    """What DeepSpeed's optimizers send (Rajbhandari et al. 2020): gradients, parameters, and scalars of the norm.

    ZeRO-1 and 2 reduce gradients with all_reduce, ZeRO-2 after every micro-batch, and gather updated parameters.
    """
    mesh, item, dtype, zero = layers.mesh, layers.item, layers.config.train.dtype, layers.config.parallel.zero
    bf16_optimizer = accumulates_at_once(layers.config)  # runtime/bf16_optimizer.py; else runtime/zero/stage*.py
    replica = _replica(mesh)
    total: Counter[tuple[str, str]] = Counter()
    for experts, sizes, whole in group_sizes(weights, mesh):
        axis = mesh.expert_data if experts else mesh.data
        if zero == 3:
            total += _zero_3(sizes, axis, item, micro_batches)
            for norm_over in (axis, replica, *[mesh.expert] * experts):  # get_grad_norm_direct, as the seam mends it
                total += _sent(norm_over, "all_reduce", _FP64)
            continue
        padded = ceil(whole / (2 * axis.size)) * 2 * axis.size  # nccl_start_alignment_factor
        times = micro_batches if zero == 2 else 1
        total += _sent(axis, "all_reduce", times * (padded if bf16_optimizer else sum(sizes)) * item)
        total += _sent(axis, "all_gather", padded * item)
        if not bf16_optimizer:  # get_grad_norm_direct, of experts over all replicas too; _average_expert_grad_norms
            total += _sent(mesh.data, "all_reduce", _FP32) + _sent(replica, "all_reduce", _FP32)
            total += _sent(axis, "all_reduce", _FP32) if experts else Counter()
    if bf16_optimizer:  # runtime/utils.py: get_global_norm_of_tensors, once more for experts
        total += _sent(replica, "all_reduce", _FP32)
        if mesh.expert.size > 1:
            total += _sent(replica if mesh.tensor.size > 1 else mesh.pipe, "all_reduce", _FP32)
            total += _sent(mesh.expert, "all_reduce", _FP32)
    elif dtype == "fp16" or (dtype == "bf16" and zero == 2):  # has_overflow: one byte
        total += _sent(mesh.data, "all_reduce", 1) + _sent(replica, "all_reduce", 1)
    return total


def _zero_3(sizes: Sequence[int], axis: Axis, item: int, micro_batches: int) -> Counter[tuple[str, str]]:
    """Parameters are cut one by one, rounded up. Large ones are gathered when a micro-batch first needs them, small
    ones after the step (parameter_offload.py: mark_persistent_parameters). Holds once partitioned_param_coordinator.py
    has seen two micro-batches with this number of loops, and while its max_reuse_distance keeps all until their last
    use: in a micro-batch fewer than 1e9 numbers of parameters pass, each as often as it is used."""
    padded = [axis.size * ceil(size / axis.size) for size in sizes]
    small = sum(size for size, real in zip(padded, sizes, strict=True) if real <= _PERSISTS)
    gathered = small + micro_batches * (sum(padded) - small)
    reduced = micro_batches * sum(padded)
    return _sent(axis, "reduce_scatter", reduced * item) + _sent(axis, "all_gather", gathered * item)


def _replica(mesh: Mesh) -> Axis:
    """DeepSpeed's model-parallel group: pipe x tensor."""
    if mesh.pipe.size == 1 or mesh.tensor.size == 1:
        return max(mesh.pipe, mesh.tensor, key=lambda axis: axis.size)
    return Axis("replica", mesh.pipe.size * mesh.tensor.size)
