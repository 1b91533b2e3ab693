"""Does the layout fit, and was the plan right? The first is asked before anything is built, the second at step 10.

planned: `plan.estimate`, tensors only. Measured: on a GPU the most that torch had allocated; on a CPU the most that the
process held, which is also the interpreter and libraries.
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

# Of a GPU's memory; the rest is for CUDA, NCCL and holes between allocations. A guess on the generous side, to refuse
# nothing that runs: configs/clusters/h100_80gb.yaml has figures with sources, and run.cluster makes them count.
_USABLE_OF_GPU = 0.9
COMPARED_AT = 10  # steps after a start
_SETTLED = 3  # first steps that are not timed: kernels are chosen, and allocators and links warm up


def check_memory(config: Config, world_size: int, ranks_here: int) -> Estimate:
    """The plan of this run; `ranks_here`: on this node. UserError if a rank cannot hold what it will need."""
    run = config.run
    if run.cluster is not None:
        cluster = load_cluster(run.cluster)
        there = f"run.cluster={run.cluster} leaves {_gb(cluster.usable)} of {cluster.memory_gb:g} GB to a rank"
    else:
        size, there = _room(ranks_here)
        cluster = _unknown_cluster(size)
    estimate = Estimate(config, world_size, cluster)
    needed = estimate.largest_stage.bytes
    if run.cluster is None and device().type == "cpu":
        # DeepSpeed's bucket of 500 million numbers is the whole need of a small run, but a CPU has only those of its
        # pages that are written to.
        needed -= estimate.largest_stage.memory.get("communication", 0.0)
    if run.check_memory and needed > cluster.usable:
        raise UserError(_problem(estimate, there))
    return estimate


def _room(ranks_here: int) -> tuple[float, str]:
    """Bytes that this rank may hold, and how to say so."""
    if device().type == "cuda":
        size = _USABLE_OF_GPU * torch.cuda.get_device_properties(device()).total_memory
        return size, f"{100 * _USABLE_OF_GPU:.0f} % of this GPU's memory are {_gb(size)}"
    _, available = node_memory()
    size = available / ranks_here
    return (
        size,
        f"each of {count(ranks_here, 'rank')} on this node can have {_gb(size)} of the memory that is available",
    )


def _unknown_cluster(size: float) -> Cluster:
    """One of which only a rank's memory, in bytes, is known: of all else an estimate of memory asks nothing."""
    return Cluster(
        name="this machine",
        gpus_per_node=1,
        nvlink_domain=1,
        memory_gb=size / 1e9,
        reserved_gb=0.0,
        bf16_tflops=1.0,
        fp32_tflops=1.0,
        product_efficiency=1.0,
        memory_gb_per_s=1.0,
        fast_gb_per_s=1.0,
        slow_gb_per_s=1.0,
        fast_latency_us=0.0,
        slow_latency_us=0.0,
        link_efficiency=1.0,
        dollars_per_gpu_hour=0.0,
    )


def _problem(estimate: Estimate, there: str) -> str:
    """One line: what is needed, what is there, what to do."""
    config, memory = estimate.config, estimate.largest_stage.memory
    largest = max(memory, key=lambda part: memory[part])
    changes = [] if config.train.recompute == "loop" else ["set train.recompute=loop"]
    changes.append("raise parallel.tensor or parallel.expert")
    if config.train.micro_batch > 1:
        changes.append(f"lower train.micro_batch={config.train.micro_batch}")
    return (
        f"the layout does not fit: a rank needs {_gb(estimate.largest_stage.bytes)} by plan (most of it "
        f"{largest}, {_gb(memory[largest])}), but {there}; {', '.join(changes)}, or use more ranks: "
        f"`python tools/plan.py CONFIG --gpus {estimate.world_size} --cluster {config.run.cluster or 'FILE'}` says "
        "what fits; run.check_memory=false starts all the same"
    )


@dataclass(frozen=True)
class Compared:
    """What was planned and what was measured; GB are 1e9 bytes."""

    memory_gb: float  # of the fullest rank
    step_seconds: float | None  # None: nobody has named a cluster
    measured_memory_gb: float
    measured_step_seconds: float
    rank: int  # that was the fullest

    def __str__(self) -> str:
        memory = f"memory {_number(self.memory_gb)} and {_number(self.measured_memory_gb)} GB (rank {self.rank}"
        memory += ")" if device().type == "cuda" else "; on a CPU with the interpreter and libraries)"
        measured = _number(self.measured_step_seconds)
        if self.step_seconds is None:
            return f"planned and measured: {memory}, step {measured} s (none planned: run.cluster is not set)"
        return f"planned and measured: {memory}, step {_number(self.step_seconds)} and {measured} s"

    @property
    def line(self) -> dict[str, float | None]:
        """`planned` in metrics.jsonl."""
        return {name: value for name, value in vars(self).items() if name != "rank"}


class Comparison:
    """Times a start's steps, and once, at its step 10 or at the run's last one before that, compares."""

    def __init__(self, estimate: Estimate):
        config = estimate.config
        self.memory_gb = estimate.largest_stage.bytes / 1e9
        self.step_seconds = None if config.run.cluster is None else estimate.step_seconds
        self._measured: list[float] = []
        self._compared = False

    def step(self, seconds: float, last: bool) -> Compared | None:
        """A step is done, the run's `last` or not. Every rank calls this: where it compares, it holds a collective."""
        if self._compared:
            return None
        self._measured.append(seconds)
        self._compared = last or len(self._measured) == COMPARED_AT
        if not self._compared:
            return None
        rank, size = fullest_rank()
        seconds = statistics.median(self._measured[_SETTLED:] or self._measured[-1:])
        return Compared(self.memory_gb, self.step_seconds, size / 1e9, seconds, rank)


def fullest_rank() -> tuple[int, float]:
    """The rank that has held most, and its bytes. Every rank calls this."""
    peaks = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device())
    peaks[dist.get_rank()] = peak_memory()
    dist.all_reduce(peaks)
    return int(peaks.argmax()), float(peaks.max())


def peak_memory() -> int:
    """The most bytes that this process has held since it began: on a GPU in torch's tensors, on a CPU altogether."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its peak is handed on from the parent through fork and exec. VmHWM begins anew with exec; in a
    # process that only forks it begins with what the parent holds then, and so does the process.
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss  # a kernel that keeps no peak: what is held now


def _gb(size: float) -> str:
    return f"{_number(size / 1e9)} GB"


def _number(value: float) -> str:
    """61.4, 1,234.5, 0.0123."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
