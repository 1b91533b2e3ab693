"""Errors that ranks share, and what a process sets up before it trains."""

import platform
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from helpers.launch import launch, run_ranks

from mythos_dist.errors import NodeError, UserError
from mythos_dist.parallel.process import (
    any_rank,
    check_dtype,
    free_port,
    from_rank_0,
    join_process_group,
    keep_freed_memory,
    on_rank_0,
    raise_on_all_ranks,
)

WORLD = 3
ON_TWO_NODES = ["first", "first", "second"]
# The ranks whose check fails, the node of each rank, the error that every rank raises: its type, its text, its nodes.
CASES: list[tuple[tuple[int, ...], list[str], tuple]] = [
    ((), [], ()),
    ((), ON_TWO_NODES, ()),
    ((0,), [], (UserError, "broken 0")),
    ((0, 2), [], (UserError, "broken 0")),
    ((2,), [], (UserError, "rank 2: broken 2")),
    ((1, 2), [], (UserError, "rank 1: broken 1")),
    ((0,), ON_TWO_NODES, (NodeError, "first: broken 0", ["first"])),
    ((2,), ON_TWO_NODES, (NodeError, "second: broken 2", ["second"])),
    ((1, 2), ON_TWO_NODES, (UserError, "rank 1: broken 1")),  # every node has it: a node is not the cause
    ((0, 1, 2), ["a", "b", "c"], (UserError, "broken 0")),
    ((1,), ["only"] * 3, (UserError, "rank 1: broken 1")),
]


def caught(call: Any) -> tuple:
    """The error of `call()` as a tuple of its type's name, its text and its nodes; else its result."""
    try:
        return ("", call())
    except NodeError as error:
        return ("NodeError", sorted(error.problems), sorted(error.nodes))
    except UserError as error:
        return (type(error).__name__, str(error))


def shared_errors() -> dict[str, list]:
    """What this rank gets from each of the collective helpers."""
    rank = dist.get_rank()

    def check(failing: tuple[int, ...]) -> int:
        if rank in failing:
            raise UserError(f"broken {rank}")
        return 10 * rank

    several = raise_on_all_ranks
    return {
        "checks": [caught(lambda: several(lambda: check(failing), nodes)) for failing, nodes, _ in CASES],  # noqa: B023
        "two nodes": [caught(lambda: several(lambda: check((0, 2)), ["a", "b", "c"]))],
        "any": [any_rank(rank in true) for true in ((), (0,), (2,), (0, 1, 2))],
        "on rank 0": [caught(lambda: on_rank_0(lambda: rank + 7)), caught(lambda: on_rank_0(lambda: check((0,))))],
        "from rank 0": [
            caught(lambda: from_rank_0(lambda: {"rank": rank})),
            caught(lambda: from_rank_0(lambda: check((0,)))),
            caught(lambda: from_rank_0(lambda: check((1, 2)))),  # they do not call it
        ],
    }


@pytest.mark.launch
def test_an_error_on_one_rank_is_raised_on_all():
    """The lowest failing rank's message, the same on every rank, or the unfit nodes where others are fit; otherwise
    each rank gets its own result."""
    for rank, found in enumerate(run_ranks(WORLD, shared_errors)):
        for (failing, nodes, expected), got in zip(CASES, found["checks"], strict=True):
            if not expected:
                assert got == ("", 10 * rank)
            elif expected[0] is NodeError:
                assert got == ("NodeError", [expected[1]], expected[2]), (failing, nodes)
            else:
                assert got == ("UserError", expected[1]), (failing, nodes)
        assert found["two nodes"] == [("NodeError", ["a: broken 0", "c: broken 2"], ["a", "c"])]
        assert found["any"] == [False, True, True, True]
        assert found["on rank 0"] == [("", 7 if rank == 0 else None), ("UserError", "broken 0")]
        assert found["from rank 0"] == [("", {"rank": 0}), ("UserError", "broken 0"), ("", 0)]


def join_with_leftovers() -> tuple[int, str]:
    """Join alone where the variables name a master that does not exist."""
    join_process_group(seconds=77)
    value = torch.tensor(3)
    dist.all_reduce(value)
    group: Any = dist.group.WORLD
    return int(value), str(group._get_backend(torch.device("cpu")).options._timeout)


@pytest.mark.launch
def test_a_single_process_joins_despite_leftover_variables():
    """MASTER_ADDR of an earlier job, and torchrun's store; collectives time out after the seconds that were given."""
    leftovers = {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    result = launch(1, join_with_leftovers, env=leftovers)
    assert result.codes == [0], result.err
    assert result.values == [(3, "0:01:17")]


def join_by_a_store(file: str) -> tuple[int, int, str]:
    """Join at a store of all ranks; the sum of their ranks, this one's rank, and the timeout."""
    join_process_group(dist.FileStore(file, 2), seconds=55)
    value = torch.tensor(dist.get_rank())
    dist.all_reduce(value)
    group: Any = dist.group.WORLD
    return int(value), dist.get_rank(), str(group._get_backend(torch.device("cpu")).options._timeout)


@pytest.mark.launch
def test_ranks_join_at_the_store_that_is_given(tmp_path):
    """And not at MASTER_ADDR, where a launcher may have a store of its own."""
    result = launch(2, join_by_a_store, str(tmp_path / "store"), env={"MASTER_ADDR": "nowhere.invalid"})
    assert result.codes == [0, 0], result.err
    assert result.values == [(1, 0, "0:00:55"), (1, 1, "0:00:55")]


def kept_after_free() -> list[int]:
    """MiB by which this process is larger after a tensor of 64 MiB is freed, before and after `keep_freed_memory`."""

    def kept() -> int:
        before = process.memory_info().rss
        torch.ones(64 << 18)
        return (process.memory_info().rss - before) >> 20

    process = psutil.Process()
    first = kept()
    keep_freed_memory()
    return [first, kept()]


@pytest.mark.launch
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_stays_in_the_process():
    """Resident memory, as the kernel counts it."""
    before, after = launch(1, kept_after_free).values[0]
    assert before < 16 and after > 48


def test_a_free_port_can_be_bound():
    import socket

    ports = [free_port() for _ in range(3)]
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            assert 1024 <= listener.getsockname()[1] == port


def refuse_half_precision() -> list[str]:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    messages = []
    for supported in ({"fp32"}, {"fp32", "bf16"}, {"fp32", "fp16"}, {"fp32", "bf16", "fp16"}):
        accelerator.is_bf16_supported = lambda: "bf16" in supported  # noqa: B023
        accelerator.is_fp16_supported = lambda: "fp16" in supported  # noqa: B023
        for dtype in ("fp32", "bf16", "fp16"):
            refused = caught(lambda: check_dtype(dtype))  # noqa: B023
            assert (refused == ("", None)) == (dtype in supported), (dtype, supported, refused)
            messages += refused[1:] if refused[0] else ()
    return messages


@pytest.mark.launch
def test_a_dtype_that_the_machine_lacks_is_refused_with_those_it_has():
    """For every combination of what DeepSpeed's accelerator supports."""
    assert run_ranks(1, refuse_half_precision)[0] == [
        "train.dtype=bf16 is not supported on this cpu; set it to fp32",
        "train.dtype=fp16 is not supported on this cpu; set it to fp32",
        "train.dtype=fp16 is not supported on this cpu; set it to fp32 or bf16",
        "train.dtype=bf16 is not supported on this cpu; set it to fp32 or fp16",
    ]
