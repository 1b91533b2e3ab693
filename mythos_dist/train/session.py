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

from mythos_dist.cluster.fabric import choose_interface
from mythos_dist.cluster.place import Place, tell_libraries
from mythos_dist.cluster.recorder import Recorder
from mythos_dist.cluster.rollcall import call, open_store
from mythos_dist.cluster.stop import Stop
from mythos_dist.cluster.watchdog import Limits, Watchdog
from mythos_dist.config.schema import Config
from mythos_dist.parallel.process import free_port, join_process_group

log = logging.getLogger(__name__)


@dataclass
class Session:
    """This process among the ranks, while the run lasts."""

    place: Place
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
        self.watchdog.leave()
        dist.barrier()


def join(config: Config, place: Place, stop: Stop) -> Session:
    """Meet the other ranks. Raises UserError or NodeError if some are missing, or run other code or another config."""
    imported = time.time() - psutil.Process().create_time()
    if place.world == 1:
        place = replace(place, master="127.0.0.1", port=free_port())
    choose_interface(place)
    tell_libraries(place)
    faults = config.faults
    recorder = Recorder()
    session = Session(place, stop, Watchdog(place, Limits(faults.hang_after, faults.lost_after), recorder))
    session.phases["import"] = imported
    store = open_store(place, faults.join_within)
    cards = call(store, place, card(config), faults.join_within)
    session.nodes = [card["node"] for card in cards]
    if place.rank == 0:
        store.set("watchdog", session.watchdog.serve(session.nodes))
    session.watchdog.start(place.master, store.get("watchdog").decode())
    session.timed("roll call")
    # The watchdog comes first and says more.
    join_process_group(dist.PrefixStore("group", store), seconds=faults.hang_after + 120)
    recorder.install()
    stop.listen(signal.SIGTERM)
    session.timed("process group")
    return session


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
