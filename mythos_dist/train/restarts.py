"""`restarts.jsonl`: a line for each start of a run that is not its first: why, from which step, what it cost."""

import contextlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_dist.checkpoint import fence as fences
from mythos_dist.checkpoint.fence import Fence, newest_start
from mythos_dist.files import get_number, read_json_lines
from mythos_dist.ops.cluster.status import format_duration
from mythos_dist.train.line_file import LineFile

log = logging.getLogger(__name__)
FILE = "restarts.jsonl"
_UNSAID = "the start before left no word: it was killed, or its node was lost"


@dataclass(frozen=True)
class Previous:
    """The start before this one, as rank 0 finds it before it takes the folder over."""

    about: dict[str, Any] = field(default_factory=dict)  # what it has written of itself; empty: there was none
    last_active: float | None = None  # unix seconds: its last sign of life, or the end of its last step
    step_ended: float | None = None  # unix seconds: when the step ended that this start resumes after
    last_step: int = 0  # in metrics.jsonl

    @staticmethod
    def find(run_dir: Path, step: int) -> "Previous":
        """Before lines after `step`, which this start resumes after, are cut off."""
        about = newest_start(run_dir)
        if not about:
            return Previous()
        lines = read_json_lines(run_dir / "metrics.jsonl")
        times = {get_number(line, "step"): get_number(line, "time") for line in lines}
        active = [time for time in (*times.values(), get_number(about, "time")) if time is not None]
        with contextlib.suppress(OSError):
            active.append((run_dir / fences.FILE).stat().st_mtime)
        last = max((int(number) for number in times if number is not None), default=0)
        return Previous(about, max(active, default=None), times.get(step), last)

    @property
    def why(self) -> str:
        """Why there is another start."""
        if self.about.get("state") == "completed":
            return "the run was done, and train.steps was raised"
        return _UNSAID if self.about.get("state") == "running" else self.about.get("why") or _UNSAID

    def seconds(self, now: float, startup: float) -> tuple[float | None, float | None]:
        """(lost, idle) until `now`, when this start has taken `startup` seconds.

        Lost is what the start before computed after the step that is resumed from, and this start's own way there.
        Nobody computed anything in between: that is idle, be it a scheduler's queue or a week-end.
        """
        if self.last_active is None:
            return None, None
        since = [self.step_ended, get_number(self.about, "began")]  # not what starts before that one have lost
        again = self.last_active - max((time for time in since if time is not None), default=self.last_active)
        return max(0.0, again) + startup, max(0.0, now - startup - self.last_active)


def note_restart(previous: Previous, fence: Fence, step: int, phases: dict[str, float]) -> dict[str, Any]:
    """Append the line of this start, which goes on behind `step`, and return it. On rank 0.

    phases: seconds that the parts of this start took. A line that cannot be written costs a warning.
    """
    now = time.time()
    lost, idle = previous.seconds(now, sum(phases.values()))
    line = {
        "start": fence.start,
        "time": now,
        "why": previous.why,
        "from_step": step,
        "last_step": previous.about.get("step"),  # that the start before has told
        "seconds_lost": None if lost is None else round(lost, 1),
        "seconds_idle": None if idle is None else round(idle, 1),
        "startup_seconds": {name: round(seconds, 2) for name, seconds in phases.items()},
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


def cost(line: dict[str, Any]) -> str:
    """Of a line of `restarts.jsonl`, for the console: what was lost, and how long nothing ran before."""
    lost, idle = line.get("seconds_lost"), line.get("seconds_idle") or 0
    if lost is None:
        return ""
    return f"; {lost:.0f} s were lost" + (f" (nothing ran for {format_duration(idle)})" if idle >= 60 else "")
