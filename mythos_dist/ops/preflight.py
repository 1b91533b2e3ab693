"""Preflight: a test of a few seconds that every node can train, before anything is built or written.

Every rank inspects its node and the results are gathered; then the ranks exchange tensors of known content. A problem
of some nodes only is theirs (NodeError, exit code 3: the launcher restarts without them), a problem of all nodes is
the user's (UserError, exit code 2).

Decisions: CLUSTER-1, CLUSTER-5.
"""

import contextlib
import logging
import secrets
import shutil
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from mythos_dist.checkpoint.reader import checkpoints_of
from mythos_dist.config.schema import Config
from mythos_dist.data.remote import MAX_INDEX
from mythos_dist.errors import NodeError, UserError, first_line
from mythos_dist.files import existing_folder
from mythos_dist.model.parameter_table import checkpoint_bytes
from mythos_dist.ops.cluster.fabric import infiniband_ports
from mythos_dist.ops.cluster.inject import FaultInjector
from mythos_dist.parallel.launcher import RankInfo
from mythos_dist.parallel.process import device
from mythos_dist.store.fetch import START_PATIENCE, read_object
from mythos_dist.store.write import put, remove
from mythos_dist.train.run_folder import probe_prefix
from mythos_dist.units import count, short_bytes
from mythos_dist.urls import is_url, join_url

log = logging.getLogger(__name__)

_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}  # of a rank's tensor in the exchange; fp32
_ROUNDS = 3  # of the exchange; the first one opens connections
_UPLOAD_BYTES = 4 << 20
_SHARED_FOLDER_SECONDS = 10.0  # within which a file of rank 0 must be visible on all nodes


@dataclass(frozen=True)
class PreflightResult:
    """What preflight measured."""

    nodes: list[str]  # of every rank
    all_reduce: float  # bytes per second and rank, by NCCL's convention: 2 (n - 1) / n of the tensor
    all_to_all: float  # (n - 1) / n of it
    skew: float  # largest difference between two clocks, in seconds
    seconds: float
    slowest_store: tuple[float, str] | None = None  # bytes per second, node; None: all shards are local
    slowest_upload: tuple[float, str] | None = None  # the same to `checkpoint.remote`

    def __str__(self) -> str:
        ranks, nodes = len(self.nodes), len(set(self.nodes))
        text = f"preflight: {count(ranks, 'rank')} on {count(nodes, 'node')}"
        if ranks > 1:
            text += f", all-reduce {self.all_reduce / 1e9:.2g} GB/s, all-to-all {self.all_to_all / 1e9:.2g} GB/s"
        if self.slowest_store:
            rate, node = self.slowest_store
            text += f", store at least {short_bytes(rate)}/s ({node} is the slowest)"
        if self.slowest_upload:
            rate, node = self.slowest_upload
            text += f", uploads at least {short_bytes(rate)}/s ({node} is the slowest)"
        return text + f", clock skew {self.skew * 1000:.0f} ms ({self.seconds:.1f} s)"


class NodeReport(NamedTuple):
    """What one rank found on its node."""

    node: str
    clock: float  # Unix time
    problems: list[str]
    sees_probe: bool  # whether the file of rank 0 in the run's folder is visible
    gpus: str
    infiniband: str
    store_rate: float = 0.0  # bytes per second; 0: not measured by this rank
    upload_rate: float = 0.0


class _Exchange(NamedTuple):
    """What one rank received and measured in the exchange."""

    corrupt_from: list[int]  # ranks whose all-to-all chunk was wrong
    sum_is_right: bool
    seconds: list[tuple[float, float]]  # (all-reduce, all-to-all) of each round


def preflight(config: Config, rank_info: RankInfo, faults: FaultInjector) -> PreflightResult:
    """Every rank calls this. Raises NodeError or UserError, the same on every rank, with all problems."""
    begin = time.perf_counter()
    dist.barrier()
    run_dir = Path(config.run.dir)
    probe = existing_folder(run_dir) / _probe_name(run_dir)
    reports: list[NodeReport] = [None] * rank_info.world_size  # type: ignore[list-item]
    dist.all_gather_object(reports, inspect_node(config, rank_info, probe))
    if rank_info.rank == 0:  # by now every rank has looked for the probe
        with contextlib.suppress(OSError):  # `inspect_node` has reported a folder that is not writable
            probe.unlink(missing_ok=True)
    raise_problems(find_problems(reports, config.faults.clock_skew), reports)
    rates, corrupt = _exchange(rank_info, corrupt=any(fault.kind == "bad_link" for fault in faults.pending))
    raise_problems([(reports[rank].node, problem) for rank, problem in corrupt.items()], reports)
    clocks = [report.clock for report in reports]
    nodes = [report.node for report in reports]
    slowest = min(((report.store_rate, report.node) for report in reports if report.store_rate), default=None)
    upload = min(((report.upload_rate, report.node) for report in reports if report.upload_rate), default=None)
    return PreflightResult(nodes, *rates, max(clocks) - min(clocks), time.perf_counter() - begin, slowest, upload)


def _probe_name(run_dir: Path) -> str:
    """A file name that is new on every start: file systems cache for seconds that a file does not exist."""
    name = [f"{probe_prefix(run_dir)}{secrets.token_hex(8)}"]
    dist.broadcast_object_list(name)
    return name[0]


def inspect_node(config: Config, rank_info: RankInfo, probe: Path) -> NodeReport:
    """This rank's report; the clock is read first, while all ranks have just left a barrier.

    probe: a file that rank 0 creates in run.dir, or in the nearest parent folder that exists.
    """
    clock, folder = time.time(), probe.parent
    sees_probe, problems = _find_probe(probe, rank_info)
    need = checkpoint_bytes(config)
    free = shutil.disk_usage(folder).free
    if free < need:
        problems.append(
            f"{folder} has {free / 1e9:,.3g} GB free, and a checkpoint takes {need / 1e9:,.3g} GB; free some space, or "
            "set another run.dir"
        )
    store_rate, upload_rate = 0.0, 0.0
    if rank_info.local_rank == 0:
        try:
            store_rate = measure_store(config)
            upload_rate = measure_upload(config, rank_info.node)
        except UserError as error:
            problems.append(str(error))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    active_ports = sum(port.startswith("ACTIVE") for port in infiniband_ports().values())
    return NodeReport(
        node=rank_info.node,
        clock=clock,
        problems=problems,
        sees_probe=sees_probe,
        gpus=f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "no GPU",
        infiniband=f"{active_ports} active InfiniBand ports",
        store_rate=store_rate,
        upload_rate=upload_rate,
    )


def measure_store(config: Config) -> float:
    """Bytes per second at which this node reads the index of the first folder of shards that is a URL; 0 if none is.

    A small index measures the latency instead, so the value is a lower bound. Raises UserError if it cannot be read.
    """
    url = next((name for name in config.data.folders if is_url(name)), "")
    if not url:
        return 0.0
    begin = time.perf_counter()
    size = len(read_object(join_url(url, "train", "index.json"), MAX_INDEX))
    return size / (time.perf_counter() - begin)


def measure_upload(config: Config, node: str) -> float:
    """Bytes per second at which one connection of this node writes a small file to `checkpoint.remote`, which is then
    removed; 0 without it, and if the store fails while the run has local checkpoints: it trains, and uploads later.

    Raises UserError if the store cannot be written.
    """
    folder = config.checkpoint.remote
    if folder is None:
        return 0.0
    url = join_url(folder, f"preflight-{node}-{secrets.token_hex(8)}")
    try:
        begin = time.perf_counter()
        put(url, bytes(_UPLOAD_BYTES), START_PATIENCE)
        seconds = time.perf_counter() - begin
        remove([url], START_PATIENCE)
    except UserError as error:
        if checkpoints_of(Path(config.run.dir) / "checkpoints"):
            log.warning("checkpoint.remote: %s; training begins without it", first_line(error))
            return 0.0
        raise
    return _UPLOAD_BYTES / seconds


def _find_probe(probe: Path, rank_info: RankInfo) -> tuple[bool, list[str]]:
    """Create the file on rank 0, look for it on the others. Returns whether it is visible, and problems."""
    problems = []
    if rank_info.rank == 0:
        try:
            probe.touch()
        except OSError as error:
            problems = [f"{probe.parent} is not writable ({error.strerror}); set another run.dir"]
    dist.barrier()
    begin = time.monotonic()
    while rank_info.rank and not probe.exists() and time.monotonic() - begin < _SHARED_FOLDER_SECONDS:
        time.sleep(0.1)
    return rank_info.rank == 0 or probe.exists(), problems


def find_problems(reports: list[NodeReport], clock_skew: float) -> list[tuple[str, str]]:
    """(node, problem), without duplicates. `reports`: of every rank; clock_skew: allowed seconds from the median."""
    problems = [(report.node, problem) for report in reports for problem in report.problems]
    median = statistics.median(report.clock for report in reports)
    for report in reports:
        skew = report.clock - median
        if abs(skew) > clock_skew:
            problems.append((report.node, f"its clock is off by {skew:+.1f} s; start its time service (chronyd)"))
        if not report.sees_probe:
            writer = reports[0].node
            problem = f"files that {writer} writes in run.dir are not visible; set run.dir to a shared folder"
            problems.append((report.node, problem))
    by_node = {report.node: report for report in reports}
    for hardware in ("gpus", "infiniband"):
        (usual, number), *others = Counter(getattr(report, hardware) for report in by_node.values()).most_common()
        if not others or number <= others[0][1]:
            continue  # all nodes are alike, or there is no majority
        for node, report in by_node.items():
            here = getattr(report, hardware)
            if here != usual:
                problem = f"it has {here}, other nodes have {usual}; check `nvidia-smi` and `ibstat` there"
                problems.append((node, problem))
    return list(dict.fromkeys(problems))


def raise_problems(problems: list[tuple[str, str]], reports: list[NodeReport]) -> None:
    """Raise NodeError if some nodes have problems (node, problem), UserError if all have."""
    if not problems:
        return
    bad, nodes = {node for node, _ in problems}, {report.node for report in reports}
    first = reports[0].node
    only_first_sees = not any(report.sees_probe for report in reports[1:] if report.node != first)
    if only_first_sees and len(bad) == len(nodes) - 1:
        bad = nodes  # run.dir is on a disk of the first node: no node is at fault
    lines = [f"{node}: {problem}" for node, problem in problems]
    if bad == nodes:
        raise UserError(lines)
    raise NodeError(lines, sorted(bad))


def _exchange(rank_info: RankInfo, corrupt: bool) -> tuple[tuple[float, float], dict[int, str]]:
    """An all-reduce and an all-to-all of values that every rank knows.

    Returns bytes per second and rank of (all-reduce, all-to-all), and problems by rank.
    """
    world, rank, here = rank_info.world_size, rank_info.rank, device()
    size = max(1, _ELEMENTS[here.type] // world) * world
    base = torch.arange(size, device=here, dtype=torch.float32) % 251  # sums of such values are exact in fp32
    sent = base + rank + (1.0 if corrupt else 0.0)
    received, total = torch.empty_like(sent), torch.empty_like(sent)
    seconds = []
    for _ in range(_ROUNDS):
        total.copy_(sent)
        dist.barrier()
        begin = _now()
        dist.all_reduce(total)
        middle = _now()
        dist.all_to_all_single(received, sent)
        seconds.append((middle - begin, _now() - middle))
    chunks, expected = received.view(world, -1), base.view(world, -1)[rank]
    corrupt_from = [other for other in range(world) if not torch.equal(chunks[other], expected + other)]
    sum_is_right = torch.equal(total, base * world + world * (world - 1) // 2)
    results: list[_Exchange] = [None] * world  # type: ignore[list-item]
    dist.all_gather_object(results, _Exchange(corrupt_from, sum_is_right, seconds))
    # The best round of the slowest rank.
    all_reduce = max(min(times[0] for times in result.seconds) for result in results)
    all_to_all = max(min(times[1] for times in result.seconds) for result in results)
    moved = 4 * size * (world - 1) / world
    return (2 * moved / max(all_reduce, 1e-9), moved / max(all_to_all, 1e-9)), _corrupt_ranks(results)


def _corrupt_ranks(results: list[_Exchange]) -> dict[int, str]:
    """The ranks with most corrupt messages, sent or received; a rank that receives nothing right is itself at fault."""
    corrupt: Counter[int] = Counter()
    for rank, result in enumerate(results):
        corrupt.update(result.corrupt_from)
        corrupt[rank] += len(result.corrupt_from)
    most = max(corrupt.values())
    if most:
        problem = "sent or received wrong values in an all-to-all; check its link and its memory"
        return {rank: f"rank {rank} {problem}" for rank, number in corrupt.items() if number == most}
    problem = "received wrong values from an all-reduce; check its link and its memory"
    return {rank: f"rank {rank} {problem}" for rank, result in enumerate(results) if not result.sum_is_right}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
