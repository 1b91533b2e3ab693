"""Preflight: seconds in which every node shows that it can train, before anything is built or written.

Each rank looks at its node and all tell all; then messages of known content go round. A problem that some nodes have
and others have not is theirs (exit code 3: start again without them), one that all have is the user's (2).
"""

import contextlib
import secrets
import shutil
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mythos_dist.config.schema import Config
from mythos_dist.errors import NodeError, UserError
from mythos_dist.model.parameter_table import CHECKPOINT_BYTES_PER_PARAMETER, count_parameters
from mythos_dist.ops.cluster.fabric import infiniband_ports
from mythos_dist.ops.cluster.inject import FaultInjector
from mythos_dist.parallel.launcher import RankInfo
from mythos_dist.parallel.process import device
from mythos_dist.train.run_folder import probe_prefix
from mythos_dist.units import count

_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 25}  # per rank in a message; fp32
_SHARED_WITHIN = 10.0  # seconds in which a file that rank 0 has made must be seen elsewhere


@dataclass(frozen=True)
class Found:
    """What preflight has measured."""

    nodes: list[str]  # of every rank
    all_reduce: float  # bytes per second and rank, by NCCL's convention: 2 (n - 1) / n of the tensor
    all_to_all: float  # (n - 1) / n of it
    skew: float  # seconds between the clocks furthest apart
    seconds: float

    def __str__(self) -> str:
        ranks, nodes = len(self.nodes), len(set(self.nodes))
        text = f"preflight: {count(ranks, 'rank')} on {count(nodes, 'node')}"
        if ranks > 1:
            text += f", all-reduce {self.all_reduce / 1e9:.2g} GB/s, all-to-all {self.all_to_all / 1e9:.2g} GB/s"
        return text + f", clocks within {self.skew * 1000:.0f} ms ({self.seconds:.1f} s)"


def preflight(config: Config, rank_info: RankInfo, faults: FaultInjector) -> Found:
    """Every rank calls this. Raises NodeError or UserError, the same on every rank, with all problems."""
    begin = time.perf_counter()
    dist.barrier()
    run_dir = Path(config.run.dir)
    above = next(folder for folder in [run_dir, *run_dir.parents] if folder.is_dir())
    token = above / _shared_name(run_dir)
    about = look(config, rank_info, token)
    everyone: list[dict[str, Any]] = [{} for _ in range(rank_info.world_size)]
    dist.all_gather_object(everyone, about)
    if rank_info.rank == 0:
        with contextlib.suppress(OSError):  # where nothing can be written `look` has said so
            token.unlink(missing_ok=True)  # all have looked
    refuse(judge(everyone, config.faults.clock_skew), everyone)
    nodes = [one["node"] for one in everyone]
    rates, wrong = exchange(rank_info, corrupt=any(fault.kind == "bad_link" for fault in faults.pending))
    refuse([(nodes[rank], text) for rank, text in wrong.items()], everyone)
    clocks = [one["clock"] for one in everyone]
    return Found(nodes, *rates, max(clocks) - min(clocks), time.perf_counter() - begin)


def _shared_name(run_dir: Path) -> str:
    """A file name that nobody has looked for before: file systems remember for seconds what was not there."""
    name = [f"{probe_prefix(run_dir)}{secrets.token_hex(8)}"]
    dist.broadcast_object_list(name)
    return name[0]


def look(config: Config, rank_info: RankInfo, token: Path) -> dict[str, Any]:
    """What this rank finds on its node; the clock first, while all ranks have just left a barrier.

    token: a file that rank 0 makes in run.dir, or in the nearest folder above it that is there.
    """
    clock, above = time.time(), token.parent
    sees, problems = _sees(token, rank_info)
    need = CHECKPOINT_BYTES_PER_PARAMETER * count_parameters(config.model)
    if (free := shutil.disk_usage(above).free) < need:
        problems.append(
            f"{free / 1e9:,.3g} GB are free in {above}, and a checkpoint takes {need / 1e9:,.3g} GB; make room, or "
            "give another run.dir"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "node": rank_info.node,
        "clock": clock,
        "problems": problems,
        "sees": sees,
        "GPUs": f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "no GPU",
        "InfiniBand": f"{sum(port.startswith('ACTIVE') for port in infiniband_ports().values())} active ports",
    }


def _sees(file: Path, rank_info: RankInfo) -> tuple[bool, list[str]]:
    """Whether what rank 0 makes in the run's folder is seen here; what went wrong with making it."""
    problems = []
    if rank_info.rank == 0:
        try:
            file.touch()
        except OSError as error:
            problems = [f"nothing can be written in {file.parent} ({error.strerror}); give another run.dir"]
    dist.barrier()
    begin = time.monotonic()
    while rank_info.rank and not file.exists() and time.monotonic() - begin < _SHARED_WITHIN:
        time.sleep(0.1)
    return rank_info.rank == 0 or file.exists(), problems


def judge(everyone: list[dict[str, Any]], clock_skew: float) -> list[tuple[str, str]]:
    """(node, what is wrong with it), each once. `everyone`: what `look` found on each rank."""
    found = [(one["node"], problem) for one in everyone for problem in one["problems"]]
    middle = statistics.median(one["clock"] for one in everyone)
    for one in everyone:
        node, off = one["node"], one["clock"] - middle
        if abs(off) > clock_skew:
            found.append((node, f"its clock is {off:+.1f} s off the others; start its time service (chronyd)"))
        if not one["sees"]:
            found.append(
                (
                    node,
                    f"it does not see what {everyone[0]['node']} writes in run.dir; give a folder that all share",
                )
            )
    of_node = {one["node"]: one for one in everyone}
    for what in ("GPUs", "InfiniBand"):
        (usual, number), *others = Counter(one[what] for one in of_node.values()).most_common()
        if others and number > others[0][1]:
            found += [
                (node, f"it has {one[what]}, and other nodes have {usual}; look at `nvidia-smi` and `ibstat` there")
                for node, one in of_node.items()
                if one[what] != usual
            ]
    return list(dict.fromkeys(found))


def refuse(found: list[tuple[str, str]], everyone: list[dict[str, Any]]) -> None:
    """Raise what `found` (node, problem) amounts to, if anything."""
    if not found:
        return
    bad, nodes = sorted({node for node, _ in found}), {one["node"] for one in everyone}
    if (
        not any(one["sees"] for one in everyone[1:] if one["node"] != everyone[0]["node"])
        and len(bad) == len(nodes) - 1
    ):
        bad = sorted(nodes)  # a folder that is one node's own: no node is at fault
    lines = [f"{node}: {problem}" for node, problem in found]
    if set(bad) == nodes:
        raise UserError(lines)
    raise NodeError(lines, bad)


def exchange(rank_info: RankInfo, corrupt: bool) -> tuple[tuple[float, float], dict[int, str]]:
    """An all-to-all and an all-reduce of numbers that every rank knows.

    Returns bytes per second and rank of (all-reduce, all-to-all), and by rank what came wrong from it.
    """
    world, rank, here = rank_info.world_size, rank_info.rank, device()
    size = max(1, _NUMBERS[here.type] // world) * world
    places = torch.arange(size, device=here, dtype=torch.float32) % 251  # sums of such numbers are exact in fp32
    sent = places + rank + (1.0 if corrupt else 0.0)
    got, total = torch.empty_like(sent), torch.empty_like(sent)
    seconds = []
    for _ in range(3):
        total.copy_(sent)
        dist.barrier()
        marks = [_now()]
        dist.all_reduce(total)
        marks.append(_now())
        dist.all_to_all_single(got, sent)
        marks.append(_now())
        seconds.append((marks[1] - marks[0], marks[2] - marks[1]))
    part = size // world
    expected = places.view(world, part)[rank]
    bad = [other for other in range(world) if not torch.equal(got.view(world, part)[other], expected + other)]
    sum_is_right = torch.equal(total, places * world + world * (world - 1) // 2)
    told: list[Any] = [None] * world
    dist.all_gather_object(told, (bad, sum_is_right, seconds))
    # The best of three rounds, as the slowest rank saw it: the first round makes connections.
    slowest = [max(min(times[i] for times in measured) for *_, measured in told) for i in (0, 1)]
    moved = 4 * size * (world - 1) / world
    rates = (2 * moved / max(slowest[0], 1e-9), moved / max(slowest[1], 1e-9))
    return rates, _wrong(told)


def _wrong(told: list[Any]) -> dict[int, str]:
    """Whose messages came wrong to most; of a rank to which nothing came right, its own receiving is at fault."""
    from_rank = Counter(other for bad, *_ in told for other in bad)
    to_rank = Counter({rank: len(bad) for rank, (bad, *_) in enumerate(told) if bad})
    suspects = from_rank + to_rank
    if suspects:
        worst = max(suspects.values())
        return {
            rank: f"rank {rank} sent or got wrong numbers in an all-to-all; look at its link and its memory"
            for rank, number in suspects.items()
            if number == worst
        }
    return {
        rank: "an all-reduce came out wrong here; look at its link and its memory"
        for rank, (_, right, _) in enumerate(told)
        if not right
    }


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
