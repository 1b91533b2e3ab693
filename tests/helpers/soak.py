"""A run that is killed repeatedly, at random times and at every call that changes its folder, and resumed.

Rule: wherever it was killed, the completed run has the metrics, the evaluations and the bytes of the last checkpoint of
an uninterrupted run, and no partially written files.
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
from helpers.launch import Launch, launch, train

STEPS = 10
# Gradients of batches 3 and 4 are not finite: in step 5 the run rolls back to the checkpoint of step 2.
SETTINGS = [
    f"train.steps={STEPS}",
    "train.global_batch=2",
    "train.eval_every=4",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "checkpoint.pin=[4]",
    "faults.inject=bad_batch@3:0,bad_batch@4:0",
    "faults.roll_back_after=2",
    "loops.distribution=poisson",
]
# Keys of metrics.jsonl that kills must not change.
EXACT = "step loss grad_norm n_loops batch_id lr tokens expert_load_max skipped decision".split()


class Soak:
    """Kills runs of `settings` in `folder`; `seed` sets all random choices."""

    def __init__(self, settings: list[str], folder: Path, seed: int, on_kill: Callable[[], object] = lambda: None):
        self.on_kill = on_kill
        self.settings = [*settings, *SETTINGS]
        self.folder = folder
        self.random = random.Random(seed)
        self.log = folder / "calls"
        self.kills: list[str] = []  # the point of each kill
        self.runs = 0  # runs that were completed after kills, and compared
        self.tried: set[tuple[str, str]] = set()
        launch(1, int)  # the imports of the server that ranks are forked from are not part of a run
        begin = time.monotonic()
        uninterrupted = folder / "uninterrupted"
        result = self._start(uninterrupted)
        assert result.codes == [0], result.tails
        self.seconds = time.monotonic() - begin  # duration of the uninterrupted run
        self.expected = results_of(uninterrupted)

    def run(self, kills: int, seconds: float, at_random: float = 0.3) -> None:
        """Kill and resume runs until `kills` kills or `seconds` seconds are reached, then complete the last run.

        at_random: share of the kills at a random time. Raises AssertionError with the differences.
        """
        deadline, run_dir = time.monotonic() + seconds, self.folder / "run"
        while len(self.kills) < kills and time.monotonic() < deadline:
            points = self.untried_points()
            if self.random.random() < at_random or not points:
                kill = "at random"
                environment = {"KILL_IN": str(self.random.random() * self.seconds)}
            else:
                label, when = self.random.choice(points)
                kill = f"{when} {label}"
                environment = {"KILL_POINT": f"{when}:{label}"}
                self.tried.add((label, when))
            result = self._start(run_dir, environment)
            if result.codes == [0]:  # this start did not reach the kill point
                self._compare(run_dir)
            else:
                assert result.codes == [-signal.SIGKILL], (kill, result.codes, result.tails)
                self.kills.append(kill)
                self.on_kill()
        result = self._start(run_dir)
        assert result.codes == [0], (self.kills[-3:], result.tails)
        self._compare(run_dir)

    def untried_points(self) -> list[tuple[str, str]]:
        """(label, when) of all calls recorded in any start so far at which no start was killed."""
        recorded = sorted(set(labels(self.log)))
        points = [(label, when) for label in recorded for when in ("before", "after")]
        points += [(label, "half") for label in recorded if label.startswith("append")]
        return [point for point in points if point not in self.tried]

    def _start(self, run_dir: Path, environment: dict[str, str] | None = None) -> Launch:
        environment = {"KILL_POINTS_IN": str(run_dir), "KILL_POINTS_LOG": str(self.log), **(environment or {})}
        return train(1, *self.settings, f"run.dir={run_dir}", env=environment, seconds=900)  # enough on a busy machine

    def _compare(self, run_dir: Path) -> None:
        """Compare a completed run with the uninterrupted one, then delete its folder."""
        results = results_of(run_dir)
        for name, value in self.expected.items():
            assert results[name] == value, f"{name} differs after {self.kills[-5:]}: {run_dir}"
        self.runs += 1
        shutil.rmtree(run_dir)


def results_of(run_dir: Path) -> dict[str, Any]:
    """What kills must not change: metrics, evaluations, the bytes of the last checkpoint, and file names."""
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
    """The lines of a JSON Lines file; any invalid line raises."""
    for text in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(text)


def remove_shared_memory(folder: Path) -> None:
    """Remove /dev/shm segments of killed runs with shards below `folder`; streaming would open all of them."""
    for names in Path("/dev/shm").glob("??????_locals"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in names.read_bytes():
                for segment in names.parent.glob(names.name.removesuffix("locals") + "*"):
                    segment.unlink(missing_ok=True)
