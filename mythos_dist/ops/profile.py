"""Profiles of a run: a trace of some steps, then of one more step what holds memory (`run.profile`, or PROFILE).

Every rank counts the steps, the ranks of `run.profile.ranks` record. The trace is PyTorch's; the memory is measured in
a step of its own, because observing each operation from Python makes a step several times slower. On a GPU the history
of the allocator is saved as well.
The trap: nothing here may hold a collective, or fail a run. An error ends the profile with a warning.

Decisions: PROJECT-11.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mythos_dist.config.schema import Config, ProfileConfig
from mythos_dist.errors import UserError, first_line
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.parallel.ranges import recorded_ranges
from mythos_dist.train.run_folder import PROFILES
from mythos_dist.train.session import Session
from mythos_dist.units import count

if TYPE_CHECKING:
    from mythos_dist.ops.profile_memory import MemoryTimeline
    from mythos_dist.train.engine import Engine

log = logging.getLogger(__name__)

ON_REQUEST = 3  # steps of a trace that the file PROFILE asks for
_MAX_ALLOCATIONS = 1_000_000  # of the allocator's history


def check_profile(config: Config, world_size: int) -> None:
    """UserError if `run.profile.ranks` has ranks that do not exist."""
    missing = [rank for rank in config.run.profile.ranks if rank >= world_size] if config.run.profile else []
    if missing:
        raise UserError(
            f"run.profile.ranks: there is no rank {missing[0]} among {count(world_size, 'rank')}; set it to ranks from "
            f"0 to {world_size - 1}"
        )


class Profiler:
    """The profiles of one start. Every rank calls the same methods."""

    def __init__(self, config: Config, session: Session, estimate: Estimate):
        self.config, self.session, self.estimate = config, session, estimate
        self.settings, self.rank = config.run.profile, session.rank_info.rank
        self.folder = Path(config.run.dir) / PROFILES
        self.done = False  # what `run.profile.steps` asks for
        self._active: Profile | None = None

    def before_step(self, step: int, requested: bool) -> None:
        """Begin a profile if one is due. requested: PROFILE was found; ignored while one is being recorded."""
        if self._active is not None:
            return
        settings = self.settings
        if settings and not self.done and settings.steps[0] <= step <= settings.steps[1]:
            self.done = True
            self._begin(step, settings.steps[1] - step + 1, settings)
        elif requested:
            steps = (step, step + ON_REQUEST - 1)
            self._begin(step, ON_REQUEST, ProfileConfig(steps=steps) if settings is None else settings)

    def _begin(self, step: int, steps: int, settings: ProfileConfig) -> None:
        folder = self.folder / f"step-{step:08d}"
        self._active = Profile(folder, step, steps, settings, self)

    def during_step(self, engine: "Engine") -> contextlib.AbstractContextManager[None]:
        """Around the passes of a step and the optimizer."""
        return self._active.during_step(engine) if self._active else contextlib.nullcontext()

    def after_step(self) -> tuple[dict[str, Any], list[str]]:
        """The entry `profile` of the step's line, and lines for the console."""
        if self._active is None:
            return {}, []
        return {"profile": self._active.now}, self._after(*self._active.after_step())

    def finish(self) -> list[str]:
        """No step follows: write what there is. Lines for the console."""
        return self._after(True, self._active.end_trace()) if self._active else []

    def _after(self, done: bool, messages: list[str]) -> list[str]:
        if done:
            self._active = None
        return messages


class Profile:
    """One profile: `steps` steps of a trace, then with `settings.memory` one step of memory."""

    def __init__(self, folder: Path, first: int, steps: int, settings: ProfileConfig, profiler: Profiler):
        self.folder, self.first, self.left, self.settings = folder, first, steps, settings
        self.profiler = profiler
        self.session, self.rank = profiler.session, profiler.rank
        self.now = "trace"
        self.step = first - 1  # the last one that is done
        self.records = self.rank in settings.ranks
        self._contexts = contextlib.ExitStack()
        self._profile: torch.profiler.profile | None = None
        if self.records:
            with self._warned("cannot begin"):
                self._begin_trace()

    @property
    def prefix(self) -> Path:
        """The path of this rank's files without their endings."""
        return self.folder / f"rank-{self.rank:05d}"

    def _begin_trace(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.folder.mkdir(parents=True, exist_ok=True)
        profile = torch.profiler.profile(activities=activities, profile_memory=self.settings.memory)
        profile.start()
        self._profile = profile
        self._contexts.enter_context(recorded_ranges())

    @contextlib.contextmanager
    def during_step(self, engine: "Engine") -> Iterator[None]:
        """Name the step in a trace; measure it in the step of memory."""
        if self.now == "trace":
            with torch.profiler.record_function(f"step {self.step + 1}") if self._profile else contextlib.nullcontext():
                yield
            return
        timeline = None
        if self.records:
            with self._warned("of memory cannot begin"):
                timeline = self._begin_memory(engine)
        with timeline or contextlib.nullcontext():
            yield
        if self.records:
            with self._warned("of memory cannot be written"):
                self._write_memory(timeline)

    def after_step(self) -> tuple[bool, list[str]]:
        """Whether the profile is done, and lines for the console."""
        self.step += 1
        if self.now == "memory":
            return True, self._unless_failed([f"memory of step {self.step}: {self.folder}/*.memory.png"])
        self.left -= 1
        if self.left:
            return False, []
        messages = self.end_trace()
        self.now = "memory"
        return not self.settings.memory, messages

    def end_trace(self) -> list[str]:
        """Write the trace, if there is one. Lines for the console."""
        if self.now == "memory":
            return ["memory was not measured: no step followed the trace"]
        self._contexts.close()
        if self._profile is not None:
            self.session.enter_phase(f"writing the profile of step {self.step}")
            with self._warned("cannot be written"):
                self._profile.stop()
                self._write_trace(self._profile)
            self._profile = None
        steps = f"step {self.first}" if self.step == self.first else f"steps {self.first} to {self.step}"
        hint = "  open *.trace.json.gz at https://ui.perfetto.dev; *.kernels.txt has the slowest kernels by part"
        return self._unless_failed([f"profile of {steps}: {self.folder}", hint])

    def _unless_failed(self, lines: list[str]) -> list[str]:
        """`lines`; none of them if this rank could not write its files, which a warning says."""
        return [] if self.rank in self.settings.ranks and not self.records else lines

    def _write_trace(self, profile: torch.profiler.profile) -> None:
        from mythos_dist.ops.profile_table import kernel_table, kernels_by_part, read_trace

        trace = f"{self.prefix}.trace.json.gz"
        profile.export_chrome_trace(trace)
        self.session.heartbeat()
        rows = kernels_by_part(read_trace(trace))
        steps = self.step - self.first + 1
        title = f"rank {self.rank}, {count(steps, 'step')} from step {self.first}"
        Path(f"{self.prefix}.kernels.txt").write_text(kernel_table(rows, title, steps), encoding="utf-8")

    def _begin_memory(self, engine: "Engine") -> "MemoryTimeline | None":
        """The measurement of a step by category, and on a GPU the allocator's history."""
        from mythos_dist.ops.dry_run import mark_static
        from mythos_dist.ops.profile_memory import MemoryTimeline

        self.session.enter_phase(f"step {self.step + 1} (memory is measured)")
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)
        if engine.config.train.compile:  # PyTorch does not run compiled code while it shows each operation
            log.warning("memory by category is not measured: train.compile=true")
            return None
        timeline = MemoryTimeline()
        mark_static(timeline, engine)
        timeline.phase = "passes"
        timeline.reset()
        return timeline

    def _write_memory(self, timeline: "MemoryTimeline | None") -> None:
        from mythos_dist.ops.profile_memory import write_memory

        if torch.cuda.is_available():
            try:
                torch.cuda.memory._dump_snapshot(f"{self.prefix}.memory.pickle")
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
        if timeline is None:
            return
        estimate = self.profiler.estimate
        parallel = estimate.config.parallel
        stage = self.rank // (parallel.context * parallel.tensor) % parallel.pipe
        write_memory(self.prefix, timeline, estimate.stages[stage].memory, f"rank {self.rank}, step {self.step + 1}")

    @contextlib.contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        """An error is logged, and this rank records no more."""
        try:
            yield
        except Exception as error:
            self.records = False
            log.warning("the profile of rank %d %s: %s: %s", self.rank, what, type(error).__name__, first_line(error))
            log.info("the failure of the profile", exc_info=error)
