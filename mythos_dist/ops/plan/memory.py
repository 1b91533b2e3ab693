"""Bytes that a rank holds when most is live, by formula and by part; `plan.meter` measures the same parts.

Between steps there are weights, gradient accumulators and the optimizer. On top of that comes the largest of a few
moments of a step: in the loss, and in the backward passes of a looped block and of prelude and coda, there where their
widest tensors are. Each term names the code that makes the tensors; what is as small as a norm's scale is left out.
The trap: a weight that every loop uses has its gradient summed up by autograd, so from the second loop on the sum lies
beside the product of the loop at hand; and the first sum of a transposed product is a third tensor.
"""

# B batch, S sequence, N = B * S tokens, n of them in norms and residuals (N / tensor with sequence parallelism),
# D model, V vocabulary, H heads here, d and v channels of a query and a value head, F hidden width here, k experts per
# token, R rows received over the expert axis, M (row, expert) pairs received, b bytes of a number.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from mythos_dist.config.schema import Config
from mythos_dist.ops.plan.parameters import Weight, group_sizes, weights_of
from mythos_dist.ops.plan.routing import Routed
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import StageSpec, loops_with_grad

Memory = dict[str, float]  # bytes by part

# parameters: weights as they compute. gradients: accumulators, and tensors shaped as weights in a backward pass.
# optimizer: master weights and moments. activations: made in a forward pass, still there. communication: what
# collectives of a backward pass or of the optimizer have written. workspace: everything else.
PARTS = ("parameters", "gradients", "optimizer", "activations", "workspace", "communication")

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_BUCKET = 500_000_000  # numbers in DeepSpeed's reduce_bucket_size
REUSED = 1_000_000_000  # ZeRO-3 lets go of a weight whose next use is more numbers away: max_reuse_distance


@dataclass(frozen=True)
class Saved:
    """What autograd keeps of some layers: what collectives have written, and the rest."""

    work: float = 0
    gathered: float = 0

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.work + other.work, self.gathered + other.gathered)

    def __mul__(self, times: float) -> Saved:
        return Saved(self.work * times, self.gathered * times)

    @property
    def all(self) -> float:
        return self.work + self.gathered


class Tensors:
    """Sizes of the tensors that layers make, in bytes, for one micro-batch."""

    def __init__(self, config: Config, mesh: Mesh, routed: Routed):
        c, t = config.model, mesh.tensor.size
        self.config, self.c, self.t, self.mesh = config, c, t, mesh
        self.b = b = _BYTES[config.train.dtype]
        self.N = config.train.micro_batch * config.train.seq_len
        self.n = self.N // t if mesh.sequence else self.N
        self.x = self.N * c.dim * b  # whole
        self.residual = self.n * c.dim * b
        self.heads = c.n_heads // t
        self.shared = ceil(c.shared_dim / t)
        self.ffn = ceil(c.ffn_dim / t)
        self.routed = routed
        self.expert = ceil(c.expert_dim / t)
        self.local = c.n_experts // mesh.expert.size

    def entered(self) -> Saved:
        """A normed x, whole: model/block.py; gathered with sequence parallelism."""
        return Saved(gathered=self.x) if self.mesh.sequence else Saved(self.x)

    def attention(self) -> Saved:
        """model/attention.py, from the normed x to the input of `wo`."""
        c, N, b, H = self.c, self.N, self.b, self.heads
        if c.attn_type == "gqa":
            keys = H if c.n_kv_heads % self.t else c.n_kv_heads // self.t
            normed = (H + keys) * (c.head_dim * b + 4) * c.qk_norm
            return self.entered() + Saved(N * ((3 * H + 2 * keys) * c.head_dim * b + 4 * H + normed))
        d, v = c.head_dim, c.v_head_dim

        def cut(width: int) -> int:
            return ceil(width / self.t) * self.t

        latents = cut(c.q_lora_rank) + cut(c.kv_lora_rank + c.qk_rope_head_dim)
        if self.selective:
            return self.entered() + Saved(N * latents * b + N * H * v * b)
        normed = c.q_lora_rank + c.kv_lora_rank
        values = d if v < d else c.qk_nope_head_dim + v  # padded, or a view of the product
        heads = H * (2 * max(d, v) + values + max(d, v) + v) * b + 4 * H  # queries, keys, values, output twice, lse
        heads += 2 * H * (d * b + 4) * c.qk_norm  # queries and keys before their norms
        return self.entered() + Saved(N * ((latents + normed) * b + heads + 8))

    @property
    def selective(self) -> bool:
        return self.config.train.recompute == "selective"

    def dense_block(self) -> Saved:
        """model/block.py: both norms' inputs, attention, an FFN's input and its gate and up."""
        hidden = 0 if self.selective else 2 * self.N * self.ffn * self.b
        return Saved(2 * self.residual) + self.attention() + self.entered() + Saved(hidden)

    def gate(self) -> float:
        """One of the hidden tensors of the shared experts."""
        return self.N * self.shared * self.b

    def rows(self) -> Saved:
        """parallel/expert.py: the rows that came; nothing if no row travels."""
        axis, R = self.mesh.expert, self.routed.received
        if axis.size == 1:
            return Saved()
        slots = min(self.c.n_experts_per_tok, self.local)
        return Saved(gathered=R * (self.c.dim + (2 * slots if self.t == 1 else 0)) * self.b)

    def experts(self) -> Saved:
        """model/grouped.py: rows, gate and up of every pair, and where rows lie."""
        M, R = self.routed.pairs, self.routed.received
        hidden = 0 if self.selective else 2 * M * self.expert * self.b
        # Numbers of rows and pairs, 8 bytes each; of rows that travelled, also each slot's order, place and weight.
        slots = min(self.c.n_experts_per_tok, self.local)
        return self.rows() + Saved(hidden + M * (16 + self.b) + R * (24 + 21 * slots))

    def mixture(self) -> Saved:
        """model/moe.py: the router works in fp32; then routed and shared experts."""
        c = self.c
        router = 4 * (self.n * (c.dim + c.n_experts) + c.n_experts * c.dim)
        shared = 0 if self.selective else 2 * self.gate()
        return Saved(router) + self.entered() + self.experts() + Saved(shared)

    def loop(self) -> Saved:
        """model/recurrence.py: h + e, norms' inputs, the block's output, the new h, and h in fp32 for the mean."""
        around = 5 * self.residual + self.mixed
        lora = 2 * ceil(self.c.lora_rank / self.t) * self.t * (self.c.dim + self.n) * self.b
        return Saved(around + lora) + self.attention() + self.mixture()

    def injection(self) -> Saved:
        """model/injection.py, once for all loops: what e's norm got, this rank's channels of e, and their product."""
        if self.c.injection == "reference":
            return Saved()
        return Saved(2 * self.residual + self.N * ceil(self.c.dim / self.t) * self.b)

    @property
    def mixed(self) -> float:
        """Of each loop, the mixed states in fp32: none are mixed with act.mode=off."""
        return 0 if self.config.act.mode_of(self.c) == "off" else 4 * self.n * self.c.dim

    def carry(self) -> float:
        """What goes into a loop: h, the mixed states in fp32, the halting mass."""
        return self.residual + self.mixed + 8 * self.n


def static_memory(config: Config, mesh: Mesh, weights: list[Weight]) -> Memory:
    """What stays: DeepSpeed's optimizers (Rajbhandari et al. 2020), runtime/bf16_optimizer.py, zero/stage*.py.

    bf16 with ZeRO-1 adds gradients up in fp32 on every rank. Otherwise they are numbers of the weights' dtype: whole
    with ZeRO-1, a replica's share with 2 and 3. ZeRO-3 makes weights whole for a pass and keeps them (if a loop has
    fewer than `REUSED` numbers).
    """
    b, zero = _BYTES[config.train.dtype], config.parallel.zero
    parameters = gradients = optimizer = 0.0
    for spread in (False, True):
        numbers = sum(weight.numel for weight in weights if weight.spread == spread)
        replicas = (mesh.expert_data if spread else mesh.data).size
        parameters += numbers * b * (1 + 1 / replicas if zero == 3 else 1)
        optimizer += numbers * 12 / replicas  # fp32 weights and both moments
        gradients += numbers * (b / replicas if zero > 1 else 4 if config.train.dtype == "bf16" else b)
    held = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}
    # Those optimizers collect gradients in a bucket of a fixed size, however small the model is.
    return held | ({} if accumulates_at_once(config) else {"communication": float(_BUCKET * b)})


def peak_memory(config: Config, mesh: Mesh, part: StageSpec, turns: range, frozen: int, routed: Routed) -> Memory:
    """Bytes by part when their sum is largest, of a rank whose stage `part` runs the loops `turns`; those of them below
    `frozen` have no gradient."""
    weights = weights_of(config.model, mesh.tensor.size, mesh.expert.size, part)
    static = static_memory(config, mesh, weights)
    best: Memory = {}
    for moment in _moments(config, mesh, part, turns, frozen, routed, weights):
        total = {name: static.get(name, 0.0) + moment.get(name, 0.0) for name in {*static, *moment}}
        if sum(total.values()) > sum(best.values()):
            best = total
    return best


def _moments(
    config: Config, mesh: Mesh, part: StageSpec, turns: range, frozen: int, routed: Routed, weights: list[Weight]
) -> Iterator[Memory]:
    """What is live besides the static parts at the moments that can be the peak."""
    s = Tensors(config, mesh, routed)
    live = len(loops_with_grad(turns, frozen))
    every = config.train.recompute_every if config.train.recompute == "loop" else 1
    recomputed = config.train.recompute == "loop"
    b, c = s.b, config.model

    def gradients(prefix: str) -> float:
        return b * sum(weight.numel for weight in weights if weight.name.startswith(prefix))

    head = gradients("embed") if part.last else 0.0  # pending until the embedding's backward
    recurrent = gradients("recurrent")
    in_flight = min(mesh.pipe.size - mesh.pipe.rank, _accumulation(config, mesh)) - 1
    before = s.dense_block() * len(part.prelude) + (s.injection() if part.has_loops else Saved())
    readouts = config.loops.readouts(config.loops.mean_of(c), frozen)  # the coda and the head run on all at once
    behind = s.dense_block() * (len(part.coda) * readouts) + Saved(s.residual * (readouts - 1) * 2)
    kept = s.loop() if not recomputed else Saved()
    carries = s.carry() * ceil(live / every) if recomputed else 0.0
    whole = before.all + behind.all + kept.all * live + carries
    others = in_flight * whole

    yield _reduction(config, mesh, weights)
    # The loss: model/tensor.py makes its gradients on the way forward.
    if part.last:
        logits = max(256, s.N * readouts * c.dim // max(1, ceil(c.vocab_size / s.t))) * ceil(c.vocab_size / s.t)
        yield {
            "activations": others + whole + s.x * 2 * readouts,
            "gradients": head,
            "workspace": min(logits, s.N * readouts * ceil(c.vocab_size / s.t)) * (2 * b + 4),
        }
    # Coda, its last block first.
    ffn = s.N * s.ffn * b
    if len(part.coda):
        yield {
            "activations": others + whole,
            "gradients": head + c.dim * s.ffn * b,
            "workspace": (3 * ffn + 3 * s.residual) * readouts,
            "communication": s.x * readouts if mesh.sequence else 0,
        }
    if live:
        yield from _loop_moments(s, others + before.all, live, every, recomputed, head, recurrent)
    if len(part.prelude):
        yield {
            "activations": others + before.all,
            "gradients": head + c.dim * s.ffn * b,
            "workspace": 3 * ffn + 4 * s.residual,
            "communication": s.x if mesh.sequence else 0,
        }


def accumulates_at_once(config: Config) -> bool:
    """DeepSpeed's BF16_Optimizer, as config/deepspeed.py sets it: gradients go into fp32 accumulators, and away."""
    return config.train.dtype == "bf16" and config.parallel.zero == 1


def _reduction(config: Config, mesh: Mesh, weights: list[Weight]) -> Memory:
    """Behind the last backward pass: deepspeed/runtime/engine.py, allreduce_bucket, lays the accumulators of a bucket
    end to end (one alone is not copied) and casts them to the weights' dtype."""
    if not accumulates_at_once(config):
        return {}
    groups = group_sizes(weights, mesh)
    buckets: list[list[int]] = [[]]
    for group in groups:
        if group.spread or sum(buckets[-1]) > _BUCKET:
            buckets.append([])
        buckets[-1].append(group.numel)
    copies = [sum(bucket) * (2 + 4 * (len(bucket) > 1)) for bucket in buckets]
    return {"workspace": max(copies)}


@dataclass(frozen=True)
class _Loop:
    """A moment in the backward pass of a loop, but for what is made at the moment itself."""

    kept: float  # bytes made in the forward pass
    made: Saved  # by recomputation
    gradients: float
    around: float  # gradients of h, e, the mixed states and inside of the block
    recomputed: bool

    def at(self, new: float, more: float, gathered: float, freed: Saved) -> Memory:
        """With so many bytes of new weight gradients, of other tensors, and of what collectives wrote; less `freed`."""
        again, before = (freed, 0.0) if self.recomputed else (Saved(), freed.all)
        return {
            "activations": self.kept - before,
            "gradients": self.gradients + new,
            "workspace": self.made.work + self.around + more - again.work,
            "communication": self.made.gathered + gathered - again.gathered,
        }


def _loop_moments(
    s: Tensors, below: float, live: int, every: int, recomputed: bool, grads: float, recurrent: float
) -> Iterator[Memory]:
    """In the backward pass of the last loop, where no gradient has been summed up, and of the one before it."""
    b, D, M, selective = s.b, s.c.dim, s.routed.pairs, s.selective
    shared, expert = D * s.shared * b, s.local * D * s.expert * b  # one weight of three
    loop, gates = s.loop(), 0 if selective else 2 * s.gate()
    tail = 2 * s.residual + s.mixed  # what the end of the loop has let go of: its output twice, and in fp32
    around = 3 * s.residual + s.mixed
    spread = s.mesh.expert.size > 1
    back = s.x if s.mesh.sequence else 0.0  # the gradient of the mixture's output, gathered
    for behind in range(min(2, live)):  # loops whose backward is done
        kept, made = below + loop.all * (live - behind), Saved()
        if recomputed:
            group, inside = divmod(behind, every)
            kept = below + s.carry() * (ceil(live / every) - group)
            made = loop * (min(every, live) - inside)
        moment = _Loop(kept, made, grads + (recurrent if behind else 0.0), around, recomputed)
        # model/swiglu.py: hidden rows and their gradients; the gradient of `down` is made last.
        yield moment.at(shared, (5 if selective else 3) * s.gate(), back, Saved(tail))
        if behind:  # the gradient of `gate` or `up` and, once, its sum
            yield moment.at(2 * shared, s.gate() + s.x, back, Saved(tail + gates))
        # model/grouped.py: first the gradient of `down`, then with all three of them rows twice.
        rows, wide = M * D * b, M * s.expert * b
        there = s.routed.received * D * b if spread else back
        more = s.x + (2 * wide if selective else 0.0)
        freed = Saved(tail + gates) + (s.entered() if spread else Saved())
        yield moment.at(expert, more + rows + 3 * wide, there, freed)
        yield moment.at(3 * expert, more + 2 * rows + 2 * wide, there, freed)
    if accumulates_at_once(s.config) and live:
        # The first loop comes last: the whole gradient of `down` goes to its accumulator, by way of a copy in fp32.
        kept, made = (below + s.carry(), loop * min(every, live)) if recomputed else (below + loop.all, Saved())
        moment = _Loop(kept, made, grads + recurrent, around, recomputed)
        yield moment.at(4 / b * shared, 2 * s.gate(), back, Saved(tail + gates))


def _accumulation(config: Config, mesh: Mesh) -> int:
    return max(1, config.train.global_batch // (config.train.micro_batch * mesh.data.size))
