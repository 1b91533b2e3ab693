"""A run that is killed over and over, at random moments and at every call that changes its folder, and resumed.

Rule: whenever it was killed, in the end its metrics, its evaluations and the bytes of its last checkpoint are those of
a run to which nothing happened, and nothing that it had begun to write is left.
"""

import contextlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.kill_points import labels
from helpers.launch import Launch, train

STEPS = 10
# Gradients of batches 3 and 4 are not finite: in step 5 the run goes back to the checkpoint of step 2.
SETTINGS = [
    *(
        f"train.steps={STEPS}",
        "train.global_batch=2",
        "train.eval_every=4",
        "checkpoint.every=2",
        "checkpoint.keep=2",
        "checkpoint.pin=[4]",
    ),
    *("faults.inject=bad_batch@3:0,bad_batch@4:0", "faults.roll_back_after=2", "loops.distribution=poisson"),
]
EXACT = (
    *("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "expert_load_max", "skipped", "decision"),
)


class Soak:
    """Kills runs of `settings` in `folder`; all that is random comes from `seed`."""

    def __init__(self, settings: list[str], folder: Path, seed: int, on_kill: Callable[[], object] = lambda: None):
        self.on_kill = on_kill
        self.settings, self.folder, self.draw = [*settings, *SETTINGS], folder, random.Random(seed)
        self.log = folder / "calls"
        self.kills: list[str] = []  # where each was
        self.runs = 0  # killed ones that were then completed and compared
        self.tried: set[tuple[str, str]] = set()
        begin = time.monotonic()
        self.whole = folder / "whole"
        result = self._start(self.whole)
        assert result.codes == [0], result.tails
        self.seconds = time.monotonic() - begin  # of a whole run
        self.expected = outcome(self.whole)

    def run(self, kills: int, seconds: float, at_random: float = 0.3) -> None:
        """Until so many kills have happened, or so many seconds are over; then the last run is completed.

        at_random: share of the kills that come at a random moment. Raises AssertionError with what differs.
        """
        deadline, run_dir = time.monotonic() + seconds, self.folder / "run"
        while len(self.kills) < kills and time.monotonic() < deadline:
            if self.draw.random() < at_random or not (points := self._untried()):
                where, environment = "at random", {"KILL_IN": str(self.draw.random() * self.seconds)}
            else:
                label, when = self.draw.choice(points)
                where, environment = f"{when} {label}", {"KILL_POINT": f"{when}:{label}"}
                self.tried.add((label, when))
            result = self._start(run_dir, environment)
            if result.codes == [0]:  # this start did not get there
                self._compare(run_dir)
            else:
                assert result.codes == [-signal.SIGKILL], (where, result.codes, result.tails)
                self.kills.append(where)
                self.on_kill()
        result = self._start(run_dir)
        assert result.codes == [0], (self.kills[-3:], result.tails)
        self._compare(run_dir)

    def _untried(self) -> list[tuple[str, str]]:
        """(label, when) of all calls that were seen in any start so far and at which none was killed."""
        seen = sorted(set(labels(self.log)))
        found = [(label, when) for label in seen for when in ("before", "after")]
        found += [(label, "half") for label in seen if label.startswith("append")]
        return [point for point in found if point not in self.tried]

    def _start(self, run_dir: Path, environment: dict[str, str] | None = None) -> Launch:
        environment = {"KILL_POINTS_IN": str(run_dir), "KILL_POINTS_LOG": str(self.log), **(environment or {})}
        return train(1, *self.settings, f"run.dir={run_dir}", env=environment, seconds=900)  # also on a busy machine

    def _compare(self, run_dir: Path) -> None:
        """A completed run with the undisturbed one; the next starts in an empty folder."""
        found = outcome(run_dir)
        for name, value in self.expected.items():
            assert found[name] == value, f"{name} differs after {self.kills[-5:]}: {run_dir}"
        self.runs += 1
        shutil.rmtree(run_dir)


def outcome(run_dir: Path) -> dict[str, Any]:
    """What must be the same whatever happened: lines, the bytes of the last checkpoint, and the names of files."""
    last = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    return {
        "metrics.jsonl": [tuple(line.get(key) for key in EXACT) for line in lines(run_dir / "metrics.jsonl")],
        "eval.jsonl": list(lines(run_dir / "eval.jsonl")),
        "rollbacks.json": (run_dir / "rollbacks.json").read_text(),
        "checkpoint": {file.name: file.read_bytes() for file in last.glob("*.safetensors")},
        "settings": (run_dir / "config.yaml").read_text().replace(str(run_dir), ""),
        "names": sorted(path.name for path in run_dir.iterdir() if path.name != "restarts.jsonl"),
        "checkpoints": sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
    }


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Every line of a file must be JSON."""
    for text in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(text)


def leftovers_in_shared_memory(folder: Path) -> None:
    """Remove what killed runs with shards below `folder` have left in /dev/shm; streaming would open all of it."""
    for names in Path("/dev/shm").glob("??????_locals"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in names.read_bytes():
                for segment in names.parent.glob(names.name.removesuffix("locals") + "*"):
                    segment.unlink(missing_ok=True)
