"""What a run on a cluster needs and how long a step takes, before anything runs: memory, FLOPs, bytes and seconds.

Memory, FLOPs and bytes are those of the real code (a dry run measures the same). Seconds are modelled: products at the
cluster's `product_efficiency`, passes over memory at its bandwidth, messages at its links' rates. Nothing overlaps, as
nothing does in the trainer: every message of a loop is waited for.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.model.flops import stage_costs, train_flops_per_token
from mythos_dist.ops.plan.clusters import Cluster
from mythos_dist.ops.plan.communication import stage_communication
from mythos_dist.ops.plan.cost import parts_of
from mythos_dist.ops.plan.flops import executed_flops
from mythos_dist.ops.plan.memory import Memory, Tensors, peak_memory
from mythos_dist.ops.plan.parameters import weights_of
from mythos_dist.ops.plan.routing import Routed, expected_rows
from mythos_dist.parallel.mesh import Mesh, mesh_coordinates
from mythos_dist.parallel.pipeline import StageSpec, loops_with_grad, plan_loops

Seconds = dict[str, float]

# Passes over what a loop saves: it is written and read forward; backward reads it, and writes and reads gradients.
_FORWARD_PASSES, _BACKWARD_PASSES = 3, 5
_MESSAGES = {"tensor": 10, "expert": 3}  # of one loop's forward pass; the backward has as many, less one exchange
_STEP_BYTES = 30  # per number that Adam steps: fp32 weights and moments read and written, gradient, weight


@dataclass(frozen=True)
class Stage:
    """One pipeline stage's rank: the layers, the loops that it runs in a step, and what it holds and does."""

    mesh: Mesh
    part: StageSpec
    turns: range
    frozen: int
    routed: Routed
    memory: Memory  # bytes by part at the peak

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """One layout on one cluster."""

    config: Config
    world_size: int
    cluster: Cluster
    imbalance: float = 1.0  # rows that the busiest rank of the expert axis gets, over the mean

    @cached_property
    def stages(self) -> list[Stage]:
        """A rank of each pipeline stage; all ranks of a stage hold as much."""
        config = self.config
        costs = stage_costs(config)
        n_loops, frozen = self.loops
        parts = parts_of(config.model, config.loops.mean_of(config.model), config.parallel.pipe, costs)
        turns = plan_loops(parts, n_loops, frozen, costs)
        found = []
        for i, part in enumerate(parts):
            mesh = mesh_coordinates(config.parallel, self.world_size, i * config.parallel.tensor)
            c, tokens = config.model, config.train.micro_batch * config.train.seq_len
            routed = expected_rows(tokens, c.n_experts_per_tok, c.n_experts, mesh.expert.size, self.imbalance)
            memory = peak_memory(config, mesh, part, turns[i], frozen, routed)
            found.append(Stage(mesh, part, turns[i], frozen, routed, memory))
        return found

    @property
    def loops(self) -> tuple[int, int]:
        """Loops of a mean step, and how many of them have no gradient."""
        n_loops = self.config.loops.mean_of(self.config.model)
        backprop = self.config.loops.backprop
        return n_loops, 0 if backprop is None else max(0, n_loops - backprop)

    @property
    def fullest(self) -> Stage:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def fits(self) -> bool:
        return self.fullest.bytes <= self.cluster.usable

    @property
    def replicas(self) -> int:
        return self.world_size // (self.config.parallel.pipe * self.config.parallel.tensor)

    @property
    def micro_batches(self) -> int:
        """Per replica and step."""
        return self.config.train.global_batch // (self.config.train.micro_batch * self.replicas)

    @property
    def parameters(self) -> int:
        """Numbers in the fullest rank's weights."""
        p, part = self.config.parallel, self.fullest.part
        return sum(weight.numel for weight in weights_of(self.config.model, p.tensor, p.expert, part))

    def communication(self, stage: Stage, micro_batches: int | None = None) -> dict[str, dict[str, int]]:
        """Bytes by axis and kind that a rank of `stage` sends in a step that is not the first."""
        parts = [other.part for other in self.stages]
        rows = (stage.routed.sent, stage.routed.received)
        m = self.micro_batches if micro_batches is None else micro_batches
        n_loops, frozen = self.loops
        return stage_communication(self.config, stage.mesh, parts, stage.turns, n_loops, frozen, rows, False, m)

    def flops(self, stage: Stage, micro_batches: int | None = None) -> float:
        """FLOPs that a rank of `stage` executes in a step."""
        m = self.micro_batches if micro_batches is None else micro_batches
        return m * executed_flops(self.config, stage.mesh, stage.part, stage.turns, stage.frozen, stage.routed)

    @cached_property
    def seconds(self) -> Seconds:
        """A step's exposed seconds by part, on the stage that takes longest."""
        times = [self._stage_seconds(stage) for stage in self.stages]
        slowest = max(times, key=lambda seconds: sum(seconds[name] for name in _PER_PASS))
        per_pass = sum(slowest[name] for name in _PER_PASS) / self.micro_batches
        return {**slowest, "bubble": (self.config.parallel.pipe - 1) * per_pass}

    def _stage_seconds(self, stage: Stage) -> Seconds:
        config, cluster, m = self.config, self.cluster, self.micro_batches
        c, train, mesh = config.model, config.train, stage.mesh
        live = len(loops_with_grad(stage.turns, stage.frozen))
        forwards = len(stage.turns) + live * (train.recompute == "loop")
        tensors = Tensors(config, mesh, stage.routed)
        blocks = len(stage.part.prelude) + len(stage.part.coda)
        read = tensors.loop().all * (forwards * _FORWARD_PASSES + live * _BACKWARD_PASSES)
        read += blocks * tensors.dense_block().all * (_FORWARD_PASSES + _BACKWARD_PASSES)
        router = 2.0 * tensors.n * c.dim * c.n_experts * (forwards + 2 * live)  # in fp32
        products = self.flops(stage, 1) - router
        efficiency = cluster.product_efficiency
        seconds: Seconds = {
            "products": m * products / (cluster.peak_flops(train.dtype) * efficiency),
            "router": m * router / (cluster.peak_flops("fp32") * efficiency),
            "memory": m * read / (cluster.memory_gb_per_s * 1e9),
        }
        turns = forwards + live
        messages = {name: m * turns * per_loop for name, per_loop in _MESSAGES.items()}
        messages["tensor"] += m * 8 * blocks
        messages["pipe"] = 2 * m
        stride = {"tensor": 1, "pipe": mesh.tensor.size}
        for axis, kinds in self.communication(stage).items():
            ranks = getattr(mesh, axis).size if hasattr(mesh, axis) else mesh.pipe.size * mesh.data.size
            name = axis if axis in ("tensor", "expert", "pipe") else "data"
            step = stride.get(axis, mesh.tensor.size * mesh.pipe.size)
            step *= mesh.expert.size if axis == "expert_data" else 1
            for kind, size in kinds.items():
                count = messages.get(axis, 2) / len(kinds)
                seconds[name] = seconds.get(name, 0.0) + cluster.seconds(kind, size, ranks, step, count)
        numbers = stage.memory["optimizer"] / 12
        seconds["optimizer"] = numbers * _STEP_BYTES / (cluster.memory_gb_per_s * 1e9)
        return {name: seconds.get(name, 0.0) for name in (*_PER_PASS, "data", "optimizer")}

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch * self.config.train.seq_len

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def model_flops(self) -> float:
        """Of a step on all ranks: three forward passes for every loop with a gradient, one for the others."""
        return model_flops_per_token(self.config.model, self.config.train.seq_len, *self.loops) * self.tokens_per_step

    @property
    def mfu(self) -> float:
        """Model FLOPs over what all GPUs could do in the time of the step."""
        peak = self.cluster.peak_flops(self.config.train.dtype) * self.world_size
        return self.model_flops / self.step_seconds / peak

    def gpu_hours(self, tokens: float) -> float:
        """GPU-hours for a number of tokens."""
        return tokens / self.tokens_per_second * self.world_size / 3600


_PER_PASS = ("products", "router", "memory", "tensor", "expert", "pipe")


@lru_cache(maxsize=64)
def model_flops_per_token(model: MythosConfig, seq_len: int, n_loops: int, frozen: int) -> float:
    """`train_flops_per_token` in which loops without gradient count their forward pass only."""
    whole, without = (train_flops_per_token(model, seq_len, loops) for loops in (n_loops, n_loops - frozen))
    return without + (whole - without) / 3


def with_layout(config: Config, **layout: object) -> Config:
    """The config with other values of tensor, expert, pipe, zero, sequence, micro_batch, recompute."""
    train = {key: layout[key] for key in ("micro_batch", "recompute", "global_batch", "seq_len") if key in layout}
    parallel = {key: layout[key] for key in ("tensor", "expert", "pipe", "zero", "sequence") if key in layout}
    return replace(
        config,
        train=replace(config.train, **train),  # pyright: ignore[reportArgumentType]
        parallel=replace(config.parallel, **parallel),  # pyright: ignore[reportArgumentType]
    )
