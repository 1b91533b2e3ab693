"""This process as a rank: its accelerator, its device, the process group that it joins, errors shared by all ranks.

The launcher sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without a launcher the world size is 1.

Decisions: PARALLEL-13.
"""

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.errors import NodeError, UserError

T = TypeVar("T")


def choose_accelerator() -> None:
    """Set DeepSpeed's accelerator, before it is imported: its own detection warns when there is no GPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def disable_cpu_op_builder() -> None:
    """On CPUs, keep DeepSpeed from compiling its shared-memory all-reduce: 40 to 120 s per process, under one lock.

    DeepSpeed looks up only that op in this table; filling the table would import setuptools and run the C compiler.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]


def join_process_group(store: dist.Store | None = None, seconds: float = 600) -> None:
    """Initialize DeepSpeed's process group, NCCL on GPUs and gloo on CPUs; collectives time out after `seconds`.

    `store`: a store that all ranks share; None: the one at the launcher's MASTER_ADDR and MASTER_PORT.
    """
    choose_accelerator()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and store is None:
        # A single process needs no launcher's store, and the launcher's variables may be stale.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    import deepspeed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        disable_cpu_op_builder()
    backend, timeout = "nccl" if cuda else "gloo", timedelta(seconds=seconds)
    if store is not None:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def on_cpu(x: Tensor) -> bool:
    """Whether to run the code that is faster on CPUs. A dry run uses GPU code with fake tensors on the CPU."""
    return x.device.type == "cpu" and not _gpu_code_on_cpu


@contextlib.contextmanager
def use_gpu_code() -> Iterator[None]:
    """Within it GPU code runs on CPU tensors, as far as the CPU has the operations."""
    global _gpu_code_on_cpu
    before, _gpu_code_on_cpu = _gpu_code_on_cpu, True
    try:
        yield
    finally:
        _gpu_code_on_cpu = before


_gpu_code_on_cpu = False


def held_memory() -> int:
    """Bytes that this process holds now: on a GPU torch's allocator, what it keeps for reuse included; on a CPU the
    resident memory of the process."""
    if device().type == "cuda":
        return torch.cuda.memory_reserved()
    return psutil.Process().memory_info().rss


def keep_freed_memory() -> None:
    """On a CPU with glibc, keep freed memory in the process, so that the next step reuses its pages.

    By default glibc returns large blocks to the kernel, which zeroes the pages again (`benchmarks/README.md`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device().type == "cpu" and mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # /usr/include/malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of `train.dtype`


def check_dtype(dtype: str) -> None:
    """UserError if DeepSpeed does not support `train.dtype` on this machine."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    runs = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not runs[dtype]:
        others = " or ".join(name for name, supported in runs.items() if supported)
        raise UserError(f"train.dtype={dtype} is not supported on this {accelerator.device_name()}; set it to {others}")


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. A collective call: an all-reduce of one element."""
    return any_ranks(flag)[0]


def any_ranks(*flags: bool) -> list[bool]:
    """As `any_rank`, for several flags in one all-reduce."""
    return [bool(value) for value in _largest([float(flag) for flag in flags])]


def _largest(values: Sequence[float]) -> list[float]:
    """The largest of each value over all ranks. A collective call."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def raise_on_all_ranks(check: Callable[[], T], nodes: Sequence[str] = ()) -> T:
    """Run `check()` on every rank; a UserError on any rank is raised on all, so that all exit with the same code.

    `nodes`: the node name of each rank. If only some nodes have a problem, a NodeError that names them is raised.
    Without a problem this costs one all-reduce of a few elements, cheap enough for every step.
    """
    return measured_on_all_ranks(check, nodes)[0]


def measured_on_all_ranks(
    check: Callable[[], T], nodes: Sequence[str] = (), value: float = 0.0
) -> tuple[T, float, float]:
    """As `raise_on_all_ranks`; returns also the seconds of the slowest rank, and the largest `value` of any rank."""
    result, problem, began = None, None, time.perf_counter()
    try:
        result = check()
    except UserError as error:
        problem = str(error)
    failed, seconds, largest = _largest([float(problem is not None), time.perf_counter() - began, value])
    if not failed:
        return cast(T, result), seconds, largest
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    by_rank = {rank: text for rank, text in enumerate(problems) if text}
    by_node = {nodes[rank]: text for rank, text in by_rank.items()} if nodes else {}
    if 0 < len(by_node) < len(set(nodes)):
        raise NodeError([f"{node}: {text}" for node, text in by_node.items()], list(by_node))
    rank, text = next(iter(by_rank.items()))
    raise UserError(text if rank == 0 else f"rank {rank}: {text}")


def on_rank_0(function: Callable[[], T]) -> T | None:
    """`function()` on rank 0, None on the others; a UserError is raised on all ranks. Every rank calls this."""
    return raise_on_all_ranks(lambda: function() if dist.get_rank() == 0 else None)


def from_rank_0(function: Callable[[], T]) -> T:
    """`function()` of rank 0, on every rank; a UserError is raised on all ranks. Every rank calls this."""
    result: list[Any] = [on_rank_0(function)]
    dist.broadcast_object_list(result)
    return result[0]


def free_port() -> int:
    """A TCP port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
