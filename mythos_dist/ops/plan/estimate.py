"""What a run needs on a cluster and how long a step takes, before anything runs: memory, FLOPs, bytes and seconds.

Memory, FLOPs and bytes are those of the real code (a dry run measures the same). Seconds are modeled: matrix
multiplications at the cluster's `matmul_efficiency`, passes over memory at its bandwidth, messages at its links' rates.
Nothing overlaps, as nothing does in the trainer: a loop waits for each of its messages.

Decisions: PLAN-1, PLAN-4.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from mythos_dist.config.schema import Config
from mythos_dist.model.flops import executed_flops, stage_loops, stage_specs, train_flops_per_token
from mythos_dist.model.parameter_table import local_parameters
from mythos_dist.ops.plan.activations import LayerActivations
from mythos_dist.ops.plan.chunks import ExpertRows, chunk_sizes, rows_of_chunks
from mythos_dist.ops.plan.clusters import Cluster
from mythos_dist.ops.plan.communication import stage_communication
from mythos_dist.ops.plan.memory import Memory
from mythos_dist.ops.plan.muon import muon_flops
from mythos_dist.ops.plan.peak_memory import peak_memory
from mythos_dist.parallel.mesh import Mesh, mesh_coordinates
from mythos_dist.parallel.pipeline import StageSpec, loops_with_grad

SecondsByPart = dict[str, float]

# Passes over what a loop saves: it is written and read forward; backward reads it, and writes and reads gradients.
_FORWARD_PASSES, _BACKWARD_PASSES = 3, 5
# Of one layer's forward pass in a loop; the backward has as many, less one all-to-all.
_MESSAGES = {"tensor": 10, "expert": 3}
_CONTEXT_MESSAGES = (1, 2)  # of any layer, forward and backward: keys are gathered in both, gradients reduced
_BLOCK_MESSAGES = 8  # over the tensor axis, of a dense block forward and backward
_STEP_BYTES = 30  # per element that Adam steps: fp32 weights and moments read and written, gradient, weight
_PER_MICRO_BATCH = ("matmuls", "router", "memory", "tensor", "context", "expert", "pipe", "offload")
_MOE_MESSAGES = 6  # of those over the tensor axis: each chunk has its own


@dataclass(frozen=True)
class Stage:
    """A rank of one pipeline stage."""

    mesh: Mesh
    spec: StageSpec
    loops: range  # that it runs in a step
    no_grad: int  # first loops of the step, without gradient
    rows: ExpertRows  # of all chunks in a loop
    chunk_rows: ExpertRows  # of the largest
    memory: Memory  # bytes by part at the peak
    host: float  # bytes of saved hidden states in host memory (train.offload)

    @property
    def bytes(self) -> float:
        """Peak memory."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """One layout on one cluster: memory in bytes, time in seconds, for the settings of `config`.

    >>> from mythos_dist import Estimate, load_cluster, load_config
    >>> config = load_config("configs/1b.yaml", ["parallel.tensor=2"])
    >>> estimate = Estimate(config, world_size=16, cluster=load_cluster("configs/clusters/h100_80gb.yaml"))
    >>> estimate.fits, estimate.replicas, estimate.largest_stage.bytes < 80e9, estimate.step_seconds > 0
    (True, 8, True, True)
    """

    config: Config
    world_size: int
    cluster: Cluster
    imbalance: float = 1.0  # rows that the busiest rank of the expert axis receives, over the mean

    @cached_property
    def stages(self) -> list[Stage]:
        """A rank of each pipeline stage; all ranks of a stage have the same sizes."""
        config = self.config
        n_loops, no_grad = self.loops
        ranges = stage_loops(config, n_loops, no_grad)
        parallel, stages = config.parallel, []
        for i, (spec, loops) in enumerate(zip(stage_specs(config), ranges, strict=True)):
            mesh = mesh_coordinates(parallel, self.world_size, i * parallel.context * parallel.tensor)
            rows, chunk = rows_of_chunks(config, mesh, self.imbalance)
            memory, host = peak_memory(config, mesh, spec, loops, no_grad, rows, chunk)
            stages.append(Stage(mesh, spec, loops, no_grad, rows, chunk, memory, host))
        return stages

    @property
    def loops(self) -> tuple[int, int]:
        """Loops of a mean step, and how many of them have no gradient."""
        n_loops = self.config.loops.mean_of(self.config.model)
        backprop = self.config.loops.backprop
        return n_loops, 0 if backprop is None else max(0, n_loops - backprop)

    @property
    def largest_stage(self) -> Stage:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def fits(self) -> bool:
        """In the memory of GPUs and, with train.offload, of their nodes."""
        return self.largest_stage.bytes <= self.cluster.usable and self.host <= self.cluster.usable_on_host

    @property
    def host(self) -> float:
        """Bytes of saved hidden states in host memory, per GPU (train.offload)."""
        return max(stage.host for stage in self.stages)

    @property
    def replicas(self) -> int:
        return self.world_size // self.config.parallel.ranks_per_replica

    @property
    def micro_batches(self) -> int:
        """Per replica and step."""
        return self.config.train.global_batch // (self.config.train.micro_batch * self.replicas)

    @property
    def parameters(self) -> int:
        """Parameters that a rank of the largest stage holds."""
        p = self.config.parallel
        held = local_parameters(self.config.model, p.tensor, p.expert, self.largest_stage.spec)
        return sum(parameter.numel for parameter in held)

    def communication(self, stage: Stage, micro_batches: int | None = None) -> dict[str, dict[str, int]]:
        """Bytes by axis and kind that a rank of `stage` sends in a step that is not the first."""
        rows = (stage.rows.sent, stage.rows.received)
        if micro_batches is None:
            micro_batches = self.micro_batches
        n_loops, no_grad = self.loops
        return stage_communication(
            self.config, stage.mesh, stage.loops, n_loops, no_grad, rows, first_send=False, micro_batches=micro_batches
        )

    def flops(self, stage: Stage, micro_batches: int | None = None) -> float:
        """FLOPs that a rank of `stage` executes in a step."""
        if micro_batches is None:
            micro_batches = self.micro_batches
        return micro_batches * self._pass_flops(stage) + muon_flops(self.config, stage.mesh, stage.spec)

    def _pass_flops(self, stage: Stage) -> float:
        """FLOPs of one micro-batch on a rank of `stage`."""
        return executed_flops(self.config, stage.mesh, stage.spec, stage.loops, stage.no_grad, stage.rows.pairs)

    @cached_property
    def seconds(self) -> SecondsByPart:
        """A step's exposed seconds by part, on the slowest stage."""
        times = [self._stage_seconds(stage) for stage in self.stages]
        slowest = max(times, key=_micro_batch_seconds)
        per_micro_batch = _micro_batch_seconds(slowest) / self.micro_batches
        return {**slowest, "bubble": (self.config.parallel.pipe - 1) * per_micro_batch}

    def _stage_seconds(self, stage: Stage) -> SecondsByPart:
        cluster = self.cluster
        seconds = self._compute_seconds(stage)
        for name, value in self._message_seconds(stage).items():
            seconds[name] = seconds.get(name, 0.0) + value
        stepped = stage.memory["optimizer"] / 12  # elements, if Adam steps them; Muon has less to read
        seconds["optimizer"] = stepped * _STEP_BYTES / (cluster.memory_gb_per_s * 1e9)
        seconds["offload"] = self._offload_seconds(stage, sum(seconds.get(name, 0.0) for name in _PER_MICRO_BATCH))
        muon = muon_flops(self.config, stage.mesh, stage.spec)
        seconds["optimizer"] += muon / (cluster.peak_flops(self.config.train.dtype) * cluster.matmul_efficiency)
        return {name: seconds.get(name, 0.0) for name in (*_PER_MICRO_BATCH, "data", "optimizer")}

    def _offload_seconds(self, stage: Stage, work: float) -> float:
        """What copies to and from host memory take longer than the work beside them: a quarter of it is forward, the
        rest recomputation and backward. The only overlap in a plan: these copies wait for nothing but their stream."""
        in_pipeline = min(self.config.parallel.pipe - stage.mesh.pipe.rank, self.micro_batches)
        copied = self.cluster.host_seconds(stage.host / max(1, in_pipeline)) * self.micro_batches
        return max(0.0, copied - work / 4) + max(0.0, copied - 3 * work / 4)

    def _passes(self, stage: Stage) -> tuple[int, int]:
        """Forward passes of loops per micro-batch, recomputed ones included, and backward passes."""
        with_grad = len(loops_with_grad(stage.loops, stage.no_grad))
        recomputed = with_grad if self.config.train.recompute == "loop" else 0
        return len(stage.loops) + recomputed, with_grad

    def _compute_seconds(self, stage: Stage) -> SecondsByPart:
        config, cluster, m = self.config, self.cluster, self.micro_batches
        c, train = config.model, config.train
        forwards, backwards = self._passes(stage)
        # Chunks save less, but read and write as much, and once more what they recompute.
        layers = LayerActivations(with_layout(config, chunk_tokens=None), stage.mesh, stage.rows, stage.rows)
        blocks = len(stage.spec.prelude) + len(stage.spec.coda)
        read = layers.loop().total * (forwards * _FORWARD_PASSES + backwards * _BACKWARD_PASSES)
        read += blocks * layers.dense_block().total * (_FORWARD_PASSES + _BACKWARD_PASSES)
        if config.chunk_size:
            read += layers.moe().total * c.loop_layers * backwards * _FORWARD_PASSES
        router = 2.0 * layers.n * c.dim * c.n_experts * c.loop_layers * (forwards + 2 * backwards)  # in fp32
        matmuls = self._pass_flops(stage) - router
        efficiency = cluster.matmul_efficiency
        return {
            "matmuls": m * matmuls / (cluster.peak_flops(train.dtype) * efficiency),
            "router": m * router / (cluster.peak_flops("fp32") * efficiency),
            "memory": m * read / (cluster.memory_gb_per_s * 1e9),
        }

    def _message_seconds(self, stage: Stage) -> SecondsByPart:
        mesh, m = stage.mesh, self.micro_batches
        forwards, backwards = self._passes(stage)
        chunks = len(chunk_sizes(self.config, stage.mesh))
        tensor = _MESSAGES["tensor"] + _MOE_MESSAGES * (chunks - 1)
        per_layer = {"tensor": tensor, "expert": _MESSAGES["expert"] * chunks}
        passes = m * (forwards + backwards) * self.config.model.loop_layers
        counts = {axis: passes * messages for axis, messages in per_layer.items()}
        blocks = len(stage.spec.prelude) + len(stage.spec.coda)
        counts["tensor"] += m * _BLOCK_MESSAGES * blocks
        forward, backward = _CONTEXT_MESSAGES
        in_loops = (forwards * forward + backwards * backward) * self.config.model.loop_layers
        counts["context"] = m * (in_loops + (forward + backward) * blocks)
        counts["pipe"] = 2 * m
        seconds: SecondsByPart = {}
        for axis, kinds in self.communication(stage).items():
            # Axes of DeepSpeed's own ("tied", "replica") are not of the mesh.
            ranks = getattr(mesh, axis).size if hasattr(mesh, axis) else mesh.pipe.size * mesh.data_context.size
            name = axis if axis in ("tensor", "context", "expert", "pipe") else "data"
            stride = self._stride(mesh, axis)
            if axis.startswith("tensor_"):  # of Muon: almost all of it within a replica
                ranks, stride = mesh.tensor.size, 1
            for kind, size in kinds.items():
                messages = counts.get(axis, 2) / len(kinds)
                took = self.cluster.seconds(kind, size, ranks, stride, messages)
                seconds[name] = seconds.get(name, 0.0) + took
        return seconds

    def _stride(self, mesh: Mesh, axis: str) -> int:
        """The distance between the global ranks of neighbors on an axis; of data x context, where they vary, that
        from one replica to the next."""
        if axis in ("tensor", "context"):
            return 1 if axis == "tensor" else mesh.tensor.size
        if axis == "pipe":
            return mesh.context.size * mesh.tensor.size
        if axis == "expert" and mesh.expert.size <= mesh.context.size:
            return mesh.tensor.size
        return self.config.parallel.ranks_per_replica * (mesh.expert.size if axis == "expert_data" else 1)

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
        """The model's FLOPs in a step of all ranks: three forward passes, of no-grad loops one."""
        return train_flops_per_token(self.config.model, self.config.train.seq_len, *self.loops) * self.tokens_per_step

    @property
    def mfu(self) -> float:
        """Model FLOPs over what all GPUs could do in the time of the step."""
        peak = self.cluster.peak_flops(self.config.train.dtype) * self.world_size
        return self.model_flops / self.step_seconds / peak

    def gpu_hours(self, tokens: float) -> float:
        """GPU-hours to train on a number of tokens."""
        return tokens / self.tokens_per_second * self.world_size / 3600


def _micro_batch_seconds(seconds: SecondsByPart) -> float:
    return sum(seconds[name] for name in _PER_MICRO_BATCH)


def with_layout(config: Config, **layout: object) -> Config:
    """The config with other values of tensor, context, expert, pipe, zero, sequence, and of settings of `train`."""
    settings = ("micro_batch", "recompute", "chunk_tokens", "offload", "global_batch", "seq_len")
    train = {key: layout[key] for key in settings if key in layout}
    axes = ("tensor", "context", "expert", "pipe", "zero", "sequence")
    parallel = {key: layout[key] for key in axes if key in layout}
    return replace(
        config,
        train=replace(config.train, **train),  # pyright: ignore[reportArgumentType]
        parallel=replace(config.parallel, **parallel),  # pyright: ignore[reportArgumentType]
    )
