"""What operations add to a training run: memory check, preflight, fault injection, planned against measured values."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos_dist.config.schema import Config
from mythos_dist.errors import first_line
from mythos_dist.ops.cluster.inject import FaultInjector
from mythos_dist.ops.memory_check import Comparison, check_memory
from mythos_dist.ops.preflight import preflight
from mythos_dist.ops.profile import Profiler, check_profile
from mythos_dist.ops.report.command import FILE, write_report
from mythos_dist.train.hooks import Hooks
from mythos_dist.train.session import Session

if TYPE_CHECKING:  # a run without tasks does not import what they need
    from mythos_dist.evaluate.in_run import RunTasks
    from mythos_dist.ops.plan.estimate import Estimate
    from mythos_dist.train.engine import Engine

log = logging.getLogger(__name__)


class Operations(Hooks):
    """The hooks of `mythos train`."""

    def __init__(self, config: Config, session: Session):
        self.config, self.session = config, session
        self.tasks: RunTasks | None = None
        # check_config() sets:
        self.estimate: Estimate
        self.comparison: Comparison
        # begin_run() sets:
        self.faults: FaultInjector
        self.profiler: Profiler

    def check_config(self) -> None:
        """Raise UserError if a rank cannot hold what the plan says it needs, if tasks cannot be loaded, or if a profile
        is of ranks that do not exist."""
        ranks_on_node = self.session.nodes.count(self.session.rank_info.node)
        self.estimate = check_memory(self.config, self.session.rank_info.world_size, ranks_on_node)
        self.comparison = Comparison(self.estimate)
        check_profile(self.config, self.session.rank_info.world_size)
        if self.config.train.tasks:
            from mythos_dist.evaluate.in_run import RunTasks

            self.tasks = RunTasks(self.config)

    def preflight(self, only: bool) -> None:
        """Check every node and the links between them, if `faults.preflight` or `only` says so. Raises UserError.

        only: nothing follows, so the result is printed for a single node as well.
        """
        if not (self.config.faults.preflight or only):
            return
        self.session.enter_phase("preflight")
        rank_info = self.session.rank_info
        result = preflight(
            self.config, rank_info, FaultInjector.for_rank(self.config.faults.inject, rank_info.rank, start=0)
        )
        if rank_info.rank == 0 and (only or len(set(self.session.nodes)) > 1):
            print(result, flush=True)
        self.session.record_startup("preflight")

    def begin_run(self, start: int) -> None:
        self.faults = FaultInjector.for_rank(self.config.faults.inject, self.session.rank_info.rank, start)
        self.profiler = Profiler(self.config, self.session, self.estimate)

    def before_step(self, step: int, profile: bool) -> None:
        self.faults.before_step(step)
        self.profiler.before_step(step, profile)

    @contextlib.contextmanager
    def during_step(self, step: int, batch: int, engine: "Engine") -> Iterator[None]:
        with self.faults.during_step(step, batch, engine.model), self.profiler.during_step(engine):
            yield

    def evaluate_tasks(self, engine: "Engine", heartbeat: Callable[[], None]) -> dict[str, Any]:
        return self.tasks.evaluate(engine, heartbeat) if self.tasks else {}

    def after_step(self, seconds: float, is_last: bool) -> tuple[dict[str, Any], str]:
        entries, messages = self.profiler.after_step()
        if compared := self.comparison.step(seconds, is_last):
            entries["planned"] = compared.line
            messages.append(str(compared))
        return entries, "\n".join(messages)

    def end_steps(self) -> str:
        return "\n".join(self.profiler.finish())

    def end_run(self) -> None:
        """Write the report on rank 0. It is for people: an error does not make the run a failed one."""
        if self.session.rank_info.rank or not self.config.run.report:
            return
        out = Path(self.config.run.dir) / FILE
        try:
            write_report([out.parent], out)
            print(f"report: {out}", flush=True)
        except Exception as error:
            log.warning("%s cannot be written (%s)", out, first_line(error))
