"""This process among the ranks: its accelerator, its device, the process group that it joins.

The launcher says who we are in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without a launcher the
process is alone.
"""

import ctypes
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mythos_dist.errors import NodeError, UserError

T = TypeVar("T")


def choose_accelerator() -> None:
    """Tell DeepSpeed what to run on before it is imported: left to itself it warns when it finds no GPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def disable_cpu_op_builder() -> None:
    """On CPUs: else every process would first compile a shared-memory all-reduce, 40 to 120 s under one file lock.

    No op is compatible: the first read of DeepSpeed's own table would import setuptools and run the C compiler. Only
    the all-reduce is looked up there.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]


def join_process_group(store: dist.Store | None = None, seconds: float = 600) -> None:
    """Start DeepSpeed's process group, NCCL on GPUs and gloo on CPUs; a message may take so many `seconds`.

    `store`: one that all ranks share; None: the one that the launcher's variables lead to.
    """
    choose_accelerator()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and store is None:
        # A launcher's variables may be left over, and its store is nothing that one process needs.
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
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def keep_freed_memory() -> None:
    """On a CPU with glibc, let freed memory stay in the process: the next step's tensors find pages that are in use.

    By default the largest are given back and come anew, filled with zeros by the kernel (`benchmarks/README.md`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device().type == "cpu" and mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # /usr/include/malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of `train.dtype`


def check_dtype(dtype: str) -> None:
    """UserError if DeepSpeed does not compute in `train.dtype` on this machine."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    runs = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not runs[dtype]:
        others = " or ".join(name for name, supported in runs.items() if supported)
        raise UserError(f"train.dtype={dtype} is not supported on this {accelerator.device_name()}; set it to {others}")


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank: an all-reduce of one number. Every rank calls this."""
    number = torch.tensor(int(flag), device=device())
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return bool(number)


def raise_on_all_ranks(check: Callable[[], T], nodes: Sequence[str] = ()) -> T:
    """`check()` on every rank; a UserError on any of them becomes one on all, so that all leave with its exit code.

    With the `nodes` of all ranks it becomes a NodeError if other nodes have no such problem. While there is none this
    costs an all-reduce of one number, so every step can afford it.
    """
    result, problem = None, None
    try:
        result = check()
    except UserError as error:
        problem = str(error)
    if any_rank(problem is not None):
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        of_node = {nodes[rank]: text for rank, text in enumerate(problems) if text and nodes}
        if 0 < len(of_node) < len(set(nodes)):
            raise NodeError([f"{node}: {text}" for node, text in of_node.items()], list(of_node))
        rank, text = next((rank, text) for rank, text in enumerate(problems) if text)
        raise UserError(text if rank == 0 else f"rank {rank}: {text}")
    return cast(T, result)


def on_rank_0(function: Callable[[], T]) -> T | None:
    """`function()` on rank 0, None on the others; a UserError is raised on all ranks. Every rank calls this."""
    return raise_on_all_ranks(lambda: function() if dist.get_rank() == 0 else None)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
