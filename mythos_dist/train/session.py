"""From a process to a rank among ranks: roll call, watchdog, process group; and the way out again.

The phases of a start are timed (`Session.phases`), because a run that is requeued often pays for each of them.
"""

import hashlib
import json
import logging
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import psutil
import torch.distributed as dist

from mythos_dist.config.schema import Config
from mythos_dist.errors import LostRankError, UserError, first_line
from mythos_dist.ops.cluster.authentication import launch_secret, sign, verify
from mythos_dist.ops.cluster.fabric import listen_address, set_network_interface
from mythos_dist.ops.cluster.recorder import CollectiveRecorder
from mythos_dist.ops.cluster.rendezvous import open_store, rendezvous
from mythos_dist.ops.cluster.watchdog import Watchdog
from mythos_dist.ops.cluster.watchdog_protocol import WatchdogLimits
from mythos_dist.parallel.launcher import RankInfo, export_rank_info
from mythos_dist.parallel.process import free_port, join_process_group, raise_on_all_ranks
from mythos_dist.private import check_compile_caches
from mythos_dist.train.stop import Stop

log = logging.getLogger(__name__)


@dataclass
class Session:
    """This process among the ranks, while the run lasts."""

    rank_info: RankInfo
    stop: Stop
    watchdog: Watchdog
    nodes: list[str] = field(default_factory=list)  # of every rank
    phases: dict[str, float] = field(default_factory=dict)  # seconds of each phase of the start, in order
    _since: float = field(default_factory=time.monotonic)

    def timed(self, phase: str) -> None:
        """A phase of the start has ended."""
        now = time.monotonic()
        self.phases[phase], self._since = now - self._since, now

    def started(self) -> None:
        """A step is done; if it is the first one, say where the time until then went."""
        if "first step" not in self.phases:
            self.timed("first step")
            log.info("start: %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.phases.items()))

    def close(self) -> None:
        """All ranks leave together."""
        self.watchdog.enter_phase("leaving")
        dist.barrier()
        self.watchdog.leave()


def join(config: Config, rank_info: RankInfo, stop: Stop) -> Session:
    """Meet the other ranks.

    Raises LostRankError if some are missing, UserError or NodeError if they run other code or another config.
    """
    imported = time.time() - psutil.Process().create_time()
    faults = config.faults
    store = open_store(rank_info, faults.join_within)
    if rank_info.world_size == 1:
        rank_info = replace(
            rank_info, master_addr="127.0.0.1", master_port=free_port()
        )  # for libraries that ask; nobody has to listen
    set_network_interface(rank_info)
    export_rank_info(rank_info)
    recorder = CollectiveRecorder()
    session = Session(
        rank_info, stop, Watchdog(rank_info, WatchdogLimits(faults.hang_after, faults.lost_after), recorder)
    )
    session.phases["import"] = imported
    cards, store = rendezvous(store, rank_info, card(config), faults.join_within)
    session.nodes = [card["node"] for card in cards]
    start_watchdog(session, store)
    session.timed("roll call")
    try:
        # The watchdog comes first and says more.
        join_process_group(dist.PrefixStore("group", store), seconds=faults.hang_after + 120)
        raise_on_all_ranks(lambda: check_compile_caches(config.train.compile), session.nodes)
    except UserError:
        session.watchdog.leave()
        raise
    except Exception as error:
        session.watchdog.fail(error)
        raise
    recorder.install()
    stop.listen(signal.SIGTERM)
    session.timed("process group")
    return session


def start_watchdog(session: Session, store: dist.Store) -> None:
    """Rank 0 listens and says where; all connect. Raises LostRankError."""
    rank_info, secret = session.rank_info, launch_secret()
    try:
        if rank_info.rank == 0:
            one_node = len(set(session.nodes)) == 1
            address = session.watchdog.serve(
                session.nodes, listen_address(rank_info.master_addr, rank_info.master_port, one_node)
            )
            store.set("watchdog", sign(secret, "watchdog", address))
        address = verify(secret, "watchdog", store.get("watchdog"))
    except (dist.DistError, ValueError) as error:
        raise LostRankError(
            f"{rank_info}: where rank 0 on {rank_info.master_addr} listens is not known: {first_line(error)}"
        ) from None
    session.watchdog.start(address)


def card(config: Config) -> dict[str, str]:
    """What must be the same on every rank."""
    text = json.dumps(asdict(config), sort_keys=True)
    return {
        "the code (mythos_dist)": code_hash(),
        "the config": hashlib.sha256(text.encode()).hexdigest()[:12],
        **{f"the version of {name}": metadata.version(name) for name in ("torch", "deepspeed", "mosaicml-streaming")},
    }


def code_hash() -> str:
    """Of all of the package's Python files, by name and content."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
