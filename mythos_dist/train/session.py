"""What the training loop needs of the processes around it, and its form for a single process without a watchdog.

`ops/session.py` joins the ranks of a launcher, watches them and ends the run when one is lost.
"""

import logging
import time
from collections.abc import Callable

from mythos_dist.config.schema import ParallelConfig
from mythos_dist.parallel.launcher import RankInfo
from mythos_dist.parallel.mesh import Mesh, build_mesh
from mythos_dist.train.stop import StopHandler

log = logging.getLogger(__name__)


def _ignore(reason: str) -> None:
    """No run is in progress."""


class Session:
    """This rank of a run. The process group exists when the loop gets it.

    Calls that have nothing to do in a single process do nothing.
    """

    def __init__(self, rank_info: RankInfo, stop: StopHandler):
        self.rank_info, self.stop = rank_info, stop
        self.nodes = [rank_info.node]  # of every rank
        self.startup_seconds: dict[str, float] = {}  # of each phase of the startup, in order
        self.on_failure: Callable[[str], None] = _ignore  # on rank 0, before the run ends by a failure
        self.keepalive: Callable[[], None] = lambda: None  # on rank 0, called every ten seconds
        self._phase_began = time.monotonic()
        self._meshes: dict[ParallelConfig, Mesh] = {}

    def mesh(self, parallel: ParallelConfig) -> Mesh:
        """This rank's mesh. Stages of the same layout share its process groups, which hold memory. Every rank calls
        this."""
        if parallel not in self._meshes:
            self._meshes[parallel] = build_mesh(parallel)
        return self._meshes[parallel]

    def enter_phase(self, phase: str) -> None:
        """A phase begins, such as "step 3"; the watchdog limits its time."""

    def heartbeat(self) -> None:
        """The phase makes progress: its time limit starts over."""

    def record_startup(self, phase: str) -> None:
        """A phase of the startup has ended."""
        now = time.monotonic()
        self.startup_seconds[phase] = now - self._phase_began
        self._phase_began = now

    def begin_stage(self) -> None:
        """Another stage of the run begins: its startup is measured again, and the last stage's run is released."""
        self.startup_seconds.clear()
        self._phase_began = time.monotonic()
        self.on_failure = self.stop.on_exit = _ignore

    def record_first_step(self) -> None:
        """A step has ended; after the first one, log how long each phase of the startup took."""
        if "first step" not in self.startup_seconds:
            self.record_startup("first step")
            times = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.startup_seconds.items())
            log.info("startup: %s", times)

    def close(self) -> None:
        """The run has ended on all ranks: wait for them."""

    def leave(self) -> None:
        """This rank exits with an error that all ranks have."""

    def fail(self, error: BaseException) -> None:
        """This rank exits with an error that other ranks do not have."""
