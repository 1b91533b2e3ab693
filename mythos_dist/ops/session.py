"""Join the ranks of a launch: rendezvous, watchdog, process group.

Each phase of the startup is timed, because a run that is requeued often pays for each of them.
"""

import hashlib
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import psutil
import torch.distributed as dist

from mythos_dist.config.schema import Config
from mythos_dist.errors import LostRankError, UserError, first_line
from mythos_dist.ops.cluster.authentication import launch_secret, sign, verify_signature
from mythos_dist.ops.cluster.fabric import listen_address, set_network_interface
from mythos_dist.ops.cluster.recorder import CollectiveRecorder
from mythos_dist.ops.cluster.rendezvous import open_store, rendezvous
from mythos_dist.ops.cluster.watchdog import Watchdog
from mythos_dist.ops.cluster.watchdog_protocol import WatchdogLimits
from mythos_dist.parallel.launcher import RankInfo, export_rank_info
from mythos_dist.parallel.process import free_port, join_process_group, raise_on_all_ranks
from mythos_dist.private import check_compile_caches
from mythos_dist.train.session import Session
from mythos_dist.train.stop import StopHandler


class WatchedSession(Session):
    """A rank that the watchdog watches."""

    def __init__(self, rank_info: RankInfo, stop: StopHandler, limits: WatchdogLimits):
        super().__init__(rank_info, stop)
        self.recorder = CollectiveRecorder()
        self.watchdog = Watchdog(rank_info, limits, self.recorder)
        # The loop sets these two later.
        self.watchdog.on_failure = lambda reason: self.on_failure(reason)
        self.watchdog.keepalive = lambda: self.keepalive()

    def enter_phase(self, phase: str) -> None:
        self.watchdog.enter_phase(phase)

    def heartbeat(self) -> None:
        self.watchdog.heartbeat()

    def close(self) -> None:
        self.enter_phase("leaving")
        dist.barrier()
        self.leave()

    def leave(self) -> None:
        self.watchdog.leave()

    def fail(self, error: BaseException) -> None:
        self.watchdog.fail(error)


def join_ranks(stages: Sequence[Config], rank_info: RankInfo, stop: StopHandler) -> WatchedSession:
    """Meet the other ranks and initialize the process group. stages: of one run; `faults` is the same in all.

    Raises LostRankError if ranks are missing, UserError or NodeError if they run other code or another config.
    """
    import_seconds = time.time() - psutil.Process().create_time()
    faults = stages[0].faults
    store = open_store(rank_info, faults.join_within)
    if rank_info.world_size == 1:  # libraries require an address; nothing connects to it
        rank_info = replace(rank_info, master_addr="127.0.0.1", master_port=free_port())
    set_network_interface(rank_info)
    export_rank_info(rank_info)
    session = WatchedSession(rank_info, stop, WatchdogLimits(faults.hang_after, faults.lost_after))
    session.startup_seconds["import"] = import_seconds
    reports, store = rendezvous(store, rank_info, describe_rank(stages), faults.join_within)
    session.nodes = [report["node"] for report in reports]
    _start_watchdog(session, store)
    session.record_startup("rendezvous")
    try:
        # The watchdog's limit comes first, because its message says more.
        join_process_group(dist.PrefixStore("group", store), seconds=faults.hang_after + 120)
        raise_on_all_ranks(lambda: check_compile_caches(any(stage.train.compile for stage in stages)), session.nodes)
    except UserError:
        session.leave()
        raise
    except Exception as error:
        session.fail(error)
        raise
    session.recorder.install()
    stop.handle(signal.SIGTERM)
    session.record_startup("process group")
    return session


def _start_watchdog(session: WatchedSession, store: dist.Store) -> None:
    """Rank 0 listens and publishes its address in the store; every rank connects. Raises LostRankError."""
    rank_info, secret = session.rank_info, launch_secret()
    try:
        if rank_info.rank == 0:
            one_node = len(set(session.nodes)) == 1
            address = listen_address(rank_info.master_addr, rank_info.master_port, one_node)
            store.set("watchdog", sign(secret, "watchdog", session.watchdog.serve(session.nodes, address)))
        address = verify_signature(secret, "watchdog", store.get("watchdog"))
    except (dist.DistError, ValueError) as error:
        raise LostRankError(
            f"{rank_info} did not receive the address of rank 0 on {rank_info.master_addr}: {first_line(error)}"
        ) from None
    session.watchdog.start(address)


def describe_rank(stages: Sequence[Config]) -> dict[str, str]:
    """What must be the same on every rank."""
    text = json.dumps([asdict(stage) for stage in stages], sort_keys=True)
    return {
        "the code (mythos_dist)": _code_hash(),
        "the config": hashlib.sha256(text.encode()).hexdigest()[:12],
        **{f"the version of {name}": metadata.version(name) for name in ("torch", "deepspeed", "mosaicml-streaming")},
    }


def _code_hash() -> str:
    """Hash of the package's Python files, by name and content."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
