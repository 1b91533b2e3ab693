"""`restarts.jsonl`: a line for each start of a run after the first: why, from which step, and what it cost."""

import contextlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_dist.checkpoint import fence as fences
from mythos_dist.checkpoint.fence import Fence, newest_start
from mythos_dist.files import get_number, read_json_lines
from mythos_dist.train.line_file import LineFile
from mythos_dist.units import format_duration

log = logging.getLogger(__name__)
FILE = "restarts.jsonl"
_UNKNOWN = "the previous run was killed or its node failed"


@dataclass(frozen=True)
class PreviousStart:
    """The previous start, as read by rank 0."""

    record: dict[str, Any] = field(default_factory=dict)  # its writer.json; empty: there was none
    last_active: float | None = None  # unix seconds: its last sign of life, or the end of its last step
    step_ended: float | None = None  # unix seconds: the end of the step that this start resumes after
    last_step: int = 0  # in metrics.jsonl

    @staticmethod
    def read(run_dir: Path, step: int) -> "PreviousStart":
        """Read it before the lines after `step`, which this start resumes after, are removed."""
        record = newest_start(run_dir)
        if not record:
            return PreviousStart()
        lines = read_json_lines(run_dir / "metrics.jsonl")
        times = {get_number(line, "step"): get_number(line, "time") for line in lines}
        active = [time for time in (*times.values(), get_number(record, "time")) if time is not None]
        if record.get("state") == "running":  # it was killed; of one that ended, a copy of the folder has a later mtime
            with contextlib.suppress(OSError):
                active.append((run_dir / fences.FILE).stat().st_mtime)
        last_step = max((int(step) for step in times if step is not None), default=0)
        return PreviousStart(record, max(active, default=None), times.get(step), last_step)

    @property
    def reason(self) -> str:
        """Why there is another start."""
        if self.record.get("state") == "completed":
            return "the run was complete, and train.steps was raised"
        return _UNKNOWN if self.record.get("state") == "running" else self.record.get("why") or _UNKNOWN

    def cost(self, now: float, startup: float) -> tuple[float | None, float | None]:
        """Seconds (lost, idle) until `now`, when this start has taken `startup` seconds.

        Lost: the steps of the previous start that are repeated, and this start's own startup. Idle: between the two
        starts, when nothing ran, be it a scheduler's queue or a week-end.
        """
        if self.last_active is None:
            return None, None
        # What even earlier starts have lost is in their own lines.
        since = [time for time in (self.step_ended, get_number(self.record, "began")) if time is not None]
        repeated = self.last_active - max(since, default=self.last_active)
        return max(0.0, repeated) + startup, max(0.0, now - startup - self.last_active)


def record_restart(
    previous: PreviousStart, fence: Fence, step: int, startup_seconds: dict[str, float]
) -> dict[str, Any]:
    """Append the line of this start, which resumes after `step`, and return it. On rank 0.

    startup_seconds: of each phase. If the line cannot be written, a warning is logged.
    """
    now = time.time()
    lost, idle = previous.cost(now, sum(startup_seconds.values()))
    line = {
        "start": fence.start,
        "time": now,
        "why": previous.reason,
        "from_step": step,
        "last_step": previous.record.get("step"),  # as the previous start recorded it
        "seconds_lost": None if lost is None else round(lost, 1),
        "seconds_idle": None if idle is None else round(idle, 1),
        "startup_seconds": {phase: round(seconds, 2) for phase, seconds in startup_seconds.items()},
    }
    file = LineFile(fence.run_dir / FILE, fence)
    try:
        file.rewind(lambda line: True)
    except OSError as error:
        log.warning("%s cannot be written (%s)", file.file, error.strerror)
    else:
        file.append(line)
    file.close()
    return line


def describe_restart(line: dict[str, Any]) -> str:
    """A line of `restarts.jsonl` for the console."""
    lost, idle = line["seconds_lost"], line["seconds_idle"]
    cost = "" if lost is None else f"{lost:.0f} s lost; "
    if idle is not None and idle >= 60:
        cost = f"{lost:.0f} s lost, {format_duration(idle)} idle; "
    return f"restart {line['start']}: resuming after step {line['from_step']} ({cost}{line['why']})"
