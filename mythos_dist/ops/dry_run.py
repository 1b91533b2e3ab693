"""One real rank of a run of any size on one machine: the trainer's own engine, fake tensors, a fake process group.

Model, shards, optimizer and DeepSpeed's engine are built as in training and take one training step. Fake tensors have
shapes and no values, so a step of a rank of 1t takes a minute and hardly any memory; messages are discarded. What
depends on values is supplied: `FakeRouting` says how many rows go to each rank's experts. Code with one path for CPUs
and one for GPUs takes the GPU path.

Decisions: PLAN-1, PLAN-2, PLAN-6.
"""

import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.manifest import AVERAGE
from mythos_dist.config.schema import Config, LoopsConfig
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model import context_attention, recompute
from mythos_dist.ops.fake_world import fake_tensors, fake_world, quiet, replaced
from mythos_dist.ops.plan.chunks import expected_rows
from mythos_dist.ops.plan.memory import PARTS, micro_batches_at_peak
from mythos_dist.ops.plan.meter import Meter
from mythos_dist.parallel import expert
from mythos_dist.parallel.context import ContextShard, KeyTile
from mythos_dist.parallel.mesh import Axis, build_mesh
from mythos_dist.parallel.process import use_gpu_code
from mythos_dist.parallel.traffic import Totals, Traffic


@dataclass(frozen=True)
class DryRun:
    """What one rank does in one step of `micro_batches` micro-batches per replica."""

    micro_batches: int
    parameters: int  # that the rank holds
    memory: dict[str, int]  # bytes by part at the peak
    peak_phase: str
    host_memory: int  # bytes of hidden states that are offloaded at once (train.offload)
    static: dict[str, int]  # bytes by part between steps
    build_peak: int  # bytes, while model and optimizer are built
    flops: float
    communication: Totals  # bytes by axis and kind
    operations: int
    seconds: float


# What `parallel.expert` exchanges before it sends rows: how many go to each rank, how many come from each, and how many
# (row, expert) pairs come.
RowCounts = tuple[list[int], list[int], int]


class FakeRouting:
    """The number of rows over the expert axis, instead of a router's choices.

    recorded: the counts of a real step, call by call; a recomputed loop has two calls. Without it each rank sends every
    expert the same number of rows, and receives `imbalance` times that.
    """

    def __init__(self, k: int, n_experts: int, imbalance: float = 1.0, recorded: Sequence[RowCounts] | None = None):
        self.k, self.n_experts, self.imbalance, self.recorded = k, n_experts, imbalance, recorded
        self._left: Iterator[RowCounts] = iter(())

    def start_step(self) -> None:
        """The next call is the first of a step."""
        self._left = iter(self.recorded or ())

    def __call__(self, owner: Tensor, goes: Tensor, axis: Axis) -> RowCounts:
        """Replaces `parallel.expert.exchange_counts`: the same message, other counts."""
        here = torch.stack([goes.sum(1), goes.sum(1)], dim=1)
        dist.all_to_all_single(torch.empty_like(here), here, group=axis.group)
        if self.recorded is not None:
            return next(self._left)
        rows = expected_rows(owner.shape[0], self.k, self.n_experts, axis.size, self.imbalance)
        sent, received = rows.sent // axis.size, rows.received // axis.size
        return [sent] * axis.size, [received] * axis.size, rows.pairs


class UncountedCopy:
    """Replaces `model.recompute.HostCopy`: its bytes are those of host memory, not of the rank's device."""

    live, peak = 0, 0  # bytes of all copies

    def __init__(self, x: Tensor):
        self.shape, self.dtype, size = x.shape, x.dtype, recompute.pinned_bytes(x.nbytes)
        UncountedCopy.live += size
        UncountedCopy.peak = max(UncountedCopy.peak, UncountedCopy.live)
        weakref.finalize(self, self._freed, size).atexit = False

    @classmethod
    def _freed(cls, size: int) -> None:
        cls.live -= size

    def begin(self) -> tuple[Tensor, None]:
        """See `HostCopy`."""
        return torch.empty(self.shape, dtype=self.dtype), None


def first_tiles(meter: Meter) -> Callable[[ContextShard], Iterator[KeyTile]]:
    """Replaces `model.context_attention.each_tile`, for a sequence of a million tokens has 64 of them (PLAN-6).

    Of consecutive tiles of the same shapes the first two are visited: the second begins with the tensors that the
    first leaves, as all later ones do, so no later one needs more memory. Each has the FLOPs of the second.
    """

    def shapes(tile: KeyTile) -> list[tuple[int, int, bool]]:
        blocks = [(b.queries.stop - b.queries.start, b.keys.stop - b.keys.start, b.causal) for b in tile.blocks]
        return [(tile.tokens.stop - tile.tokens.start, 0, False), *blocks]

    def visit(shard: ContextShard) -> Iterator[KeyTile]:
        for _, group in itertools.groupby(shard.tiles, shapes):
            tiles, flops, operations = list(group), 0.0, 0
            for tile in tiles[:2]:
                flops, operations = meter.flops, meter.operations
                yield tile
            skipped = len(tiles[2:])
            meter.flops += skipped * (meter.flops - flops)
            meter.operations += skipped * (meter.operations - operations)

    return visit


class LocalTraffic(Traffic):
    """Counts this rank's messages only, without a collective."""

    def total_over_ranks(self) -> Totals:
        totals, self.totals = self.totals, {}
        return {axis: dict(sorted(kinds.items())) for axis, kinds in sorted(totals.items())}


def dry_run(
    config: Config,
    world_size: int,
    rank: int = 0,
    imbalance: float = 1.0,
    *,
    micro_batches: int | None = None,
    routing: Sequence[RowCounts] | None = None,
    on_flops: Callable[[float], object] = lambda flops: None,
) -> DryRun:
    """Build `rank` of `world_size` and take a step; the process must not be in a process group.

    imbalance: rows that this rank's experts receive over those that it sends. micro_batches: per replica; None: the
    fewest that show all memory that a step needs. routing: see `FakeRouting`. on_flops: called with the FLOPs
    of each operation that was run, those of a step before the measured one included.
    """
    begin = time.monotonic()
    replicas = world_size // config.parallel.ranks_per_replica
    sequences = config.train.micro_batch * replicas
    if micro_batches is None:
        micro_batches = min(config.train.global_batch // sequences, micro_batches_at_peak(config))
    config = replace(
        config,
        train=replace(config.train, global_batch=sequences * micro_batches, batch_ramp=()),
        data=replace(config.data, document_mask=False),
        # A plan is for a step with the mean number of loops; `routing` is that of a real step, which drew its own.
        loops=config.loops if routing is not None else fixed(config),
        run=replace(config.run, count_communication=False),
    )
    c = config.model
    fake_routing = FakeRouting(c.n_experts_per_tok, c.n_experts, imbalance, routing)
    meter = Meter(on_flops=on_flops)
    no_router = replaced(expert, "exchange_counts", fake_routing)
    no_copies = replaced(recompute, "HostCopy", UncountedCopy)
    UncountedCopy.live = UncountedCopy.peak = 0
    tiles = replaced(context_attention, "each_tile", first_tiles(meter))
    with quiet(), fake_world(world_size, rank), use_gpu_code(), fake_tensors(), meter, no_router, no_copies, tiles:
        return _measure_step(config, micro_batches, meter, fake_routing, begin)


def _measure_step(config: Config, micro_batches: int, meter: Meter, routing: FakeRouting, begin: float) -> DryRun:
    from mythos_dist.train.engine import Engine

    parallel = config.parallel
    mesh = build_mesh(parallel)
    engine = Engine(config, mesh)
    engine.traffic = LocalTraffic(mesh)
    mark_static(meter, engine)
    build_peak, static = meter.peak, dict(meter.live)
    work = _micro_batches(config, micro_batches)
    meter.phase = "passes"
    if parallel.zero == 3 or parallel.pipe > 1:
        # The first step differs: ZeRO-3 traces which parameters are needed when. Stages of a pipeline send shapes and
        # allocate receive buffers, for which one loop is enough.
        engine.config = config if parallel.zero == 3 else replace(config, loops=LoopsConfig(mean=1))
        routing.start_step()
        engine.train_step(work, 1)
        engine.config = config
    meter.reset()
    routing.start_step()
    result = engine.train_step(work, 2)
    assert result.communication is not None
    return DryRun(
        micro_batches=micro_batches,
        parameters=sum(parameter.numel() for parameter in engine.model.parameters()),
        memory={part: meter.at_peak.get(part, 0) for part in PARTS},
        peak_phase=meter.peak_phase,
        host_memory=UncountedCopy.peak,
        static=static,
        build_peak=build_peak,
        flops=meter.flops,
        communication=result.communication,
        operations=meter.operations,
        seconds=time.monotonic() - begin,
    )


def fixed(config: Config) -> LoopsConfig:
    """The mean number of loops in every step."""
    mean = config.loops.mean_of(config.model)
    return replace(config.loops, distribution="fixed", mean=mean, set=(), per="step", curriculum="none")


def _micro_batches(config: Config, count: int) -> list[MicroBatch]:
    B, S = config.train.micro_batch, config.train.seq_len
    tokens = torch.zeros(B, S, dtype=torch.int64)
    return [MicroBatch(tokens, tokens, tokens, torch.zeros(B, dtype=torch.int64)) for _ in range(count)]


def mark_static(meter: Meter, engine: Any) -> None:
    """Assign the tensors that stay between steps to their parts."""
    optimizer = engine.ds_engine.optimizer
    parameters = list(engine.model.parameters())
    meter.weight_shapes = {parameter.shape for parameter in parameters if parameter.dim() > 1}
    meter.bucket = int(getattr(optimizer, "reduce_bucket_size", 0))  # BF16_Optimizer has none
    if engine.config.parallel.zero == 2:
        meter.partition = sum(parameter.numel() for group in optimizer.params_in_partition for parameter in group)
    for flat, state in optimizer.optimizer.state.items():
        meter.mark([flat, *(value for value in state.values() if isinstance(value, Tensor))], "optimizer")
    shards = engine.local_shards.values()
    meter.mark((shard.values[AVERAGE] for shard in shards if AVERAGE in shard.values), "optimizer")
    meter.mark(getattr(optimizer, "fp32_groups_gradients_flat", []), "gradients")
    meter.mark([parameter.data for parameter in parameters], "parameters")
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # ZeRO-3
        meter.mark([optimizer.grad_partitions_flat_buffer], "gradients")
        meter.mark([bucket.buffer for bucket in optimizer.ipg_buckets.values()], "communication")
        meter.mark([parameter.ds_tensor.data for parameter in parameters], "parameters")
        groups = (engine.mesh.data_context.group, engine.mesh.expert_data.group)
        meter.gather_parameters = {group.group_name for group in groups if group is not None}
    meter.mark(list(engine.model.buffers()), "parameters")
