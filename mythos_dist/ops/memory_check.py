"""Refuse a layout that does not fit before anything is built; compare plan and measurement at step 10.

Planned is `ops.plan.estimate`, tensors only. Measured is on a GPU the peak of torch's allocator; on a CPU the peak of
the process, interpreter and libraries included.
The trap: the plan is for the mean number of loops, and without checkpoints' copies in host memory.
"""

import contextlib
import statistics
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.memory import node_memory
from mythos_dist.ops.plan.clusters import Cluster, load_cluster
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.parallel.process import device
from mythos_dist.units import count

# Fraction of a GPU's memory; the rest is for CUDA, NCCL and fragmentation. A high guess, so that no layout that runs is
# refused: configs/clusters/h100_80gb.yaml has figures with sources, which run.cluster applies.
_USABLE_OF_GPU = 0.9
_COMPARED_AT = 10  # steps after a start
_WARMUP_STEPS = 3  # not timed: kernels are chosen, allocators and links warm up


def check_memory(config: Config, world_size: int, ranks_here: int) -> Estimate:
    """The plan of this run. ranks_here: ranks on this node. Raises UserError if the layout does not fit in memory."""
    run = config.run
    if run.cluster is not None:
        cluster = load_cluster(run.cluster)
        limit = f"run.cluster={run.cluster} has {_gb(cluster.usable)} of {cluster.memory_gb:g} GB for a rank"
    else:
        size, limit = _available_memory(ranks_here)
        cluster = _unknown_cluster(size)
    estimate = Estimate(config, world_size, cluster)
    if run.check_memory and estimate.largest_stage.bytes > cluster.usable:
        raise UserError(_problem(estimate, limit))
    return estimate


def _available_memory(ranks_here: int) -> tuple[float, str]:
    """Bytes that this rank may use, and a phrase for the error."""
    if device().type == "cuda":
        size = _USABLE_OF_GPU * torch.cuda.get_device_properties(device()).total_memory
        return size, f"{100 * _USABLE_OF_GPU:.0f} % of this GPU's memory is {_gb(size)}"
    _, available = node_memory()
    size = available / ranks_here
    return size, f"each of {count(ranks_here, 'rank')} on this node can use {_gb(size)} of the available memory"


def _unknown_cluster(size: float) -> Cluster:
    """A cluster of which only a rank's memory, in bytes, is known: an estimate of memory uses nothing else."""
    return Cluster(
        name="this machine",
        gpus_per_node=1,
        nvlink_domain=1,
        memory_gb=size / 1e9,
        reserved_gb=0.0,
        bf16_tflops=1.0,
        fp32_tflops=1.0,
        matmul_efficiency=1.0,
        memory_gb_per_s=1.0,
        fast_gb_per_s=1.0,
        slow_gb_per_s=1.0,
        fast_latency_us=0.0,
        slow_latency_us=0.0,
        link_efficiency=1.0,
        dollars_per_gpu_hour=0.0,
    )


def _problem(estimate: Estimate, limit: str) -> str:
    """One line: needed memory, available memory, what to do."""
    config, memory = estimate.config, estimate.largest_stage.memory
    largest = max(memory, key=lambda part: memory[part])
    changes = []
    if config.train.recompute != "loop":
        changes.append("set train.recompute=loop")
    elif config.train.offload == "none" and largest == "activations":
        changes.append("set train.offload=saved")
    if not config.chunk_size and largest == "workspace":
        changes.append("set train.chunk_tokens=2048")
    changes.append("raise parallel.tensor or parallel.expert")
    if config.train.micro_batch > 1:
        changes.append(f"lower train.micro_batch={config.train.micro_batch}")
    return (
        f"the layout does not fit: a rank needs {_gb(estimate.largest_stage.bytes)} by plan (most of it "
        f"{largest}, {_gb(memory[largest])}), but {limit}; {', '.join(changes)}, or use more ranks: "
        f"`mythos plan CONFIG --gpus {estimate.world_size} --cluster {config.run.cluster or 'FILE'}` "
        "shows layouts that fit; run.check_memory=false starts the run anyway"
    )


@dataclass(frozen=True)
class PlanVsMeasured:
    """Planned and measured memory and step time; GB are 1e9 bytes."""

    memory_gb: float  # of the largest rank
    step_seconds: float | None  # None: run.cluster is not set, or with a ramp: plans are for train.global_batch
    measured_memory_gb: float
    measured_step_seconds: float
    rank: int  # with the highest measured memory
    has_ramp: bool = False  # train.batch_ramp

    def __str__(self) -> str:
        where = f"rank {self.rank}" if device().type == "cuda" else f"rank {self.rank}; CPU, whole process"
        memory = f"peak memory {_number(self.measured_memory_gb)} GB (planned {_number(self.memory_gb)} GB; {where})"
        step = f"step {_number(self.measured_step_seconds)} s"
        if self.has_ramp:
            return f"{memory}, {step} (step times are planned for train.global_batch, without train.batch_ramp)"
        if self.step_seconds is None:
            return f"{memory}, {step} (set run.cluster to plan step time)"
        return f"{memory}, {step} (planned {_number(self.step_seconds)} s)"

    @property
    def line(self) -> dict[str, float | None]:
        """`planned` in metrics.jsonl."""
        return {name: value for name, value in vars(self).items() if name not in ("rank", "has_ramp")}


class Comparison:
    """Times the steps of a start; compares once, at its step 10 or at the run's last step if that is earlier."""

    def __init__(self, estimate: Estimate):
        config = estimate.config
        self.memory_gb = estimate.largest_stage.bytes / 1e9
        self.has_ramp = bool(config.train.batch_ramp)
        self.step_seconds = None if config.run.cluster is None or self.has_ramp else estimate.step_seconds
        self._measured: list[float] = []
        self._done = False

    def step(self, seconds: float, is_last: bool) -> PlanVsMeasured | None:
        """After each step; `is_last`: of the run. Every rank calls this: the comparison holds a collective."""
        if self._done:
            return None
        self._measured.append(seconds)
        self._done = is_last or len(self._measured) == _COMPARED_AT
        if not self._done:
            return None
        rank, size = largest_rank()
        seconds = statistics.median(self._measured[_WARMUP_STEPS:] or self._measured[-1:])
        return PlanVsMeasured(self.memory_gb, self.step_seconds, size / 1e9, seconds, rank, self.has_ramp)


def largest_rank() -> tuple[int, float]:
    """The rank with the highest peak memory, and its bytes. Every rank calls this."""
    peaks = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device())
    peaks[dist.get_rank()] = process_peak_memory()
    dist.all_reduce(peaks)
    return int(peaks.argmax()), float(peaks.max())


def process_peak_memory() -> int:
    """Peak bytes of this process since it began: on a GPU in torch's allocator, on a CPU of the whole process."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its peak is inherited from the parent through fork and exec. VmHWM is reset by exec; in a process
    # that only forks it begins with the parent's memory, which the process then also has.
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss  # a kernel that keeps no peak: the current value


def _gb(size: float) -> str:
    return f"{_number(size / 1e9)} GB"


def _number(value: float) -> str:
    """61.4, 1,234.5, 0.0123."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
