"""One real rank of a run of any size on one machine: the trainer's own engine, fake tensors, a fake process group.

Model, cuts, optimizer and DeepSpeed's engine are built as training builds them and take one training step. Tensors have
shapes and no numbers, so the step of a rank of 1t takes a minute and no memory to speak of; messages go nowhere.
What depends on numbers comes from elsewhere: an `Oracle` says how many rows go to which expert's rank. Code that has
one way for CPUs and one for GPUs takes the GPUs'.
"""

import contextlib
import io
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mythos_dist.config.schema import Config, LoopsConfig
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model.kernels import as_on_gpus
from mythos_dist.ops.plan.memory import PARTS, uses_bf16_optimizer
from mythos_dist.ops.plan.meter import Meter
from mythos_dist.ops.plan.routing import expected_rows
from mythos_dist.parallel import expert
from mythos_dist.parallel.mesh import Axis, build_mesh
from mythos_dist.parallel.process import disable_cpu_op_builder
from mythos_dist.parallel.traffic import Totals, Traffic


@dataclass(frozen=True)
class DryRun:
    """What one rank does in one step of `micro_batches` micro-batches per replica."""

    micro_batches: int
    parameters: int  # numbers that the rank holds
    memory: dict[str, int]  # bytes by part, when most is live
    peak_phase: str
    static: dict[str, int]  # bytes by part between steps
    build_peak: int  # bytes, while model and optimizer are built
    flops: float
    communication: Totals  # bytes by axis and kind
    operations: int
    seconds: float


# What `parallel.expert` asks before it sends rows: how many go to each rank, how many come from each, and how many
# (row, expert) pairs come.
Answer = tuple[list[int], list[int], int]


class Oracle:
    """How many rows go over the expert axis, instead of a router's numbers.

    `routing`: the answers of a real step, call by call; a recomputed loop has asked twice. Without it each rank sends
    every expert as many, and what comes in is `imbalance` times that.
    """

    def __init__(self, k: int, n_experts: int, imbalance: float = 1.0, routing: Sequence[Answer] | None = None):
        self.k, self.n_experts, self.imbalance, self.routing = k, n_experts, imbalance, routing
        self._left: Iterator[Answer] = iter(())

    def start_step(self) -> None:
        """A step's first question comes next."""
        self._left = iter(self.routing or ())

    def __call__(self, owner: Tensor, goes: Tensor, axis: Axis) -> Answer:
        """Instead of `parallel.expert._exchange_counts`: the same message, other numbers."""
        here = torch.stack([goes.sum(1), goes.sum(1)], dim=1)
        dist.all_to_all_single(torch.empty_like(here), here, group=axis.group)
        if self.routing is not None:
            return next(self._left)
        sent, received, pairs = expected_rows(owner.shape[0], self.k, self.n_experts, axis.size, self.imbalance)
        return [sent // axis.size] * axis.size, [received // axis.size] * axis.size, pairs


class OwnTraffic(Traffic):
    """Counts this rank's messages only: nobody else is there."""

    def total_over_ranks(self) -> Totals:
        found, self.totals = self.totals, {}
        return {axis: dict(sorted(kinds.items())) for axis, kinds in sorted(found.items())}


def dry_run(
    config: Config,
    world_size: int,
    rank: int = 0,
    imbalance: float = 1.0,
    *,
    micro_batches: int | None = None,
    routing: Sequence[Answer] | None = None,
) -> DryRun:
    """Build `rank` of `world_size` and take a step; the process must not be in a process group.

    imbalance: rows that come to this rank's experts over those that it sends. micro_batches: how many to run; None: as
    many as show all that a step needs. routing: see `Oracle`.
    """
    begin = time.monotonic()
    parallel = config.parallel
    replicas = world_size // (parallel.pipe * parallel.tensor)
    per_pass = config.train.micro_batch * replicas
    if micro_batches is None:
        # A pipeline is full with one micro-batch per stage. Where gradients are not added up at once, one more meets
        # those of another. All that follow only take longer.
        micro_batches = min(config.train.global_batch // per_pass, parallel.pipe + (not uses_bf16_optimizer(config)))
    config = replace(
        config,
        train=replace(config.train, global_batch=per_pass * micro_batches),
        data=replace(config.data, document_mask=False),
        # A plan is for a step of the mean; `routing` is that of a real step, which drew its own number.
        loops=config.loops if routing is not None else fixed(config),
        run=replace(config.run, count_communication=False),
    )
    meter = Meter()
    with _quiet(), _fake_world(world_size, rank), as_on_gpus(), _fake_tensors(), meter:
        from mythos_dist.train.engine import Engine

        mesh = build_mesh(parallel)
        oracle = Oracle(config.model.n_experts_per_tok, config.model.n_experts, imbalance, routing)
        with mock.patch.object(expert, "_exchange_counts", oracle):
            engine = Engine(config, mesh)
            engine.traffic = OwnTraffic(mesh)
            _mark(meter, engine)
            build_peak = meter.peak
            static = dict(meter.live)
            work = _micro_batches(config, micro_batches)
            meter.phase = "passes"
            if parallel.zero == 3 or parallel.pipe > 1:
                # A first step differs: ZeRO-3 learns in it which parameters are needed when; a pipeline's stages send
                # shapes, and keep what they received until more comes, which takes no more than one loop to see.
                engine.config = config if parallel.zero == 3 else replace(config, loops=LoopsConfig(mean=1))
                oracle.start_step()
                engine.train_step(work, 1)
                engine.config = config
            meter.reset()
            oracle.start_step()
            result = engine.train_step(work, 2)
        parameters = sum(parameter.numel() for parameter in engine.model.parameters())
        assert result.communication is not None
        return DryRun(
            micro_batches=micro_batches,
            parameters=parameters,
            memory={part: meter.at_peak.get(part, 0) for part in PARTS},
            peak_phase=meter.peak_phase,
            static=static,
            build_peak=build_peak,
            flops=meter.flops,
            communication=result.communication,
            operations=meter.operations,
            seconds=time.monotonic() - begin,
        )


def fixed(config: Config) -> LoopsConfig:
    """As many loops in every step as there are on average."""
    mean = config.loops.mean_of(config.model)
    return replace(config.loops, distribution="fixed", mean=mean, set=(), per="step", curriculum="none")


def _micro_batches(config: Config, count: int) -> list[MicroBatch]:
    B, S = config.train.micro_batch, config.train.seq_len
    tokens = torch.zeros(B, S, dtype=torch.int64)
    return [MicroBatch(tokens, tokens, tokens, torch.zeros(B, dtype=torch.int64)) for _ in range(count)]


def _mark(meter: Meter, engine: Any) -> None:
    """Tell the meter what the tensors are that stay."""
    optimizer = engine.deepspeed.optimizer
    meter.weight_shapes = {p.shape for p in engine.model.parameters() if p.dim() > 1}
    for flat in optimizer.optimizer.state:
        meter.mark([flat, *(x for x in optimizer.optimizer.state[flat].values() if isinstance(x, Tensor))], "optimizer")
    meter.mark(getattr(optimizer, "fp32_groups_gradients_flat", []), "gradients")
    parameters = list(engine.model.parameters())
    meter.mark([parameter.data for parameter in parameters], "parameters")
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # ZeRO-3
        meter.mark([optimizer.grad_partitions_flat_buffer], "gradients")
        meter.mark([parameter.ds_tensor.data for parameter in parameters], "parameters")
        replicas = (engine.mesh.data.group, engine.mesh.expert_data.group)
        meter.gather_parameters = {group.group_name for group in replicas if group is not None}
    meter.mark(list(engine.model.buffers()), "parameters")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what DeepSpeed and torch say and print: a run has it in its log, a dry run has none."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _silent_children() -> Iterator[None]:
    """Programs that are started write their errors to nowhere."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _fake_world(world_size: int, rank: int) -> Iterator[None]:
    """A process group of `world_size` ranks of which only this one exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    place["DS_ACCELERATOR"] = "cpu"  # a machine with GPUs does not use them here
    with mock.patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
        with _silent_children():  # DeepSpeed tries a linker to learn what it could build
            import deepspeed

            disable_cpu_op_builder()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            deepspeed.init_distributed("gloo", verbose=False)
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _fake_tensors() -> Iterator[None]:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from torch._subclasses.fake_tensor import FakeTensorMode

    def without_gpus() -> bool:  # asked before every operation; and tensors of GPUs would want a driver
        return False

    patches = [
        mock.patch.object(torch.cuda, "is_available", without_gpus),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch("mythos_dist.model.mythos.init_parameters", lambda *_: None),
        mock.patch.object(PipelineEngine, "_recv_tensor_meta", _receive_shapes),
        # ZeRO-3's ranks compare what they are about to do.
        mock.patch("deepspeed.runtime.zero.partition_parameters.assert_ints_same_as_other_ranks", lambda numbers: None),
        mock.patch(
            "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks", lambda numbers: None
        ),
        mock.patch("torch._meta_registrations._meta_grouped_mm_common", _grouped_product),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def _grouped_product(a: Tensor, b: Tensor, *_: Any, offs: Tensor, **__: Any) -> Tensor:
    """What a grouped product gives. Torch's own answer refuses fp32 and fp16, which its real product takes."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])  # rows of groups, a matrix per group
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])  # columns of groups and rows of groups


def _receive_shapes(engine: Any, sender: int) -> Tensor:
    """The message that says what the stage before will send arrives with nothing in it; what it would say is known."""
    from deepspeed.runtime.pipe import engine as pipe

    pipe.p2p.recv(torch.empty(pipe.TENSOR_META_SIZE, dtype=torch.int32), sender)
    (stage,) = engine.module.forward_funcs
    specs = stage.model.input_shapes(*stage.work[0].input_ids.shape)
    dtype = next(stage.model.parameters()).dtype
    numbers = sum(shape.numel() * item.itemsize for shape, item in specs.values()) // dtype.itemsize
    return engine._allocate_or_extend_buffers(0, [numbers], dtype)


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that sets data. The original swaps fake tensors, which it may not where anybody refers to
    them, as the meter does."""
    for child in module.children():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = function(parameter.data)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
