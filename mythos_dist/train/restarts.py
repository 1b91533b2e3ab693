"""`restarts.jsonl`: a line for each start of a run that is not its first: why, from which step, what it cost."""

import json
import time
from pathlib import Path
from typing import Any

from mythos_dist.cluster.status import last_lines

FILE = "restarts.jsonl"
_UNSAID = "the start before left no word: it was killed, or its node was lost"


def time_of_step(run_dir: Path, step: int) -> float | None:
    """When step `step` ended, in unix seconds, and None if metrics.jsonl does not say. To be asked before later lines
    are cut off."""
    lines = last_lines(run_dir / "metrics.jsonl", tail=None)
    return next((line.get("time") for line in lines if line.get("step") == step), None)


def note_restart(
    run_dir: Path, before: dict[str, Any], start: int, step: int, since: float | None, phases: dict[str, float]
) -> dict[str, Any]:
    """Append the line of start number `start`, which goes on behind `step`, and return it.

    before: what the start before has written of itself. since: when `step` ended: from then until now nothing has been
    won. phases: seconds that the parts of this start took.
    """
    now = time.time()
    why = before.get("why") or _UNSAID
    if before.get("state") == "completed":
        why = "the run was done, and train.steps was raised"
    elif before.get("state") == "running":
        why = _UNSAID
    line = {
        "start": start,
        "time": now,
        "why": why,
        "from_step": step,
        "last_step": before.get("step"),  # that the start before has told
        "seconds_lost": None if since is None else round(now - since, 1),
        "startup_seconds": {name: round(seconds, 2) for name, seconds in phases.items()},
    }
    with (run_dir / FILE).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    return line
