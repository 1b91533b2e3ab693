"""What a report shows of one run, read from its folder. The run may be active, or be damaged: what cannot be read is
named in the page, and the rest is shown.

Nothing here imports torch, or contacts ranks or SLURM.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mythos_dist.checkpoint.names import MANIFEST_FILE, folder_name, step_of
from mythos_dist.errors import redact
from mythos_dist.files import get_number, read_json_lines
from mythos_dist.ops.cluster.status import determine_state, read_local_writer
from mythos_dist.ops.report.metrics_file import (
    Event,
    MetricsFile,
    envelope,
    quantiles,
    ranges,
    read_metrics,
)
from mythos_dist.parallel.process_identity import is_running
from mythos_dist.progress import Progress

EXPERT_LOAD = "expert_load.json"
MAX_MANIFEST = 1 << 26  # bytes of a checkpoint.json that is read for versions and layout


@dataclass(frozen=True)
class SavedCheckpoint:
    """A folder in checkpoints/."""

    step: int
    bytes: int


@dataclass
class RunReport:
    """All that is known of a run."""

    folder: Path
    name: str
    state: str
    why: str
    metrics: MetricsFile
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[SavedCheckpoint] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # section.key -> value
    environment: dict[str, str] = field(default_factory=dict)
    expert_load: dict[str, Any] = field(default_factory=dict)  # step, counts (n_loops, loop_layers * E)
    problems: list[str] = field(default_factory=list)

    @property
    def events(self) -> list[Event]:
        """Everything that happened, in the order of steps."""
        starts = [
            Event(int(step), "restart", f"start {line.get('start')}: {line.get('why')}")
            for line in self.restarts
            if (step := get_number(line, "from_step")) is not None
        ]
        return sorted([*self.metrics.events, *starts])


def read_run(folder: Path, name: str | None = None, progress: Progress = lambda size: None) -> RunReport:
    """progress: called with the bytes of metrics.jsonl that are read.

    Raises UserError if `folder` is not a run folder, and OSError if its metrics cannot be read.
    """
    writer, heartbeat = read_local_writer(folder)
    completed = (folder / "COMPLETED").exists()
    since_life = time.time() - heartbeat
    process_ended = is_running(writer) is False
    # Never "hung": the page shows the step times itself.
    state, why = determine_state(
        writer, None, completed, since_life, idle=0.0, limit=math.inf, process_ended=process_ended
    )
    metrics = read_metrics(folder / "metrics.jsonl", progress)
    report = RunReport(folder, name or folder.resolve().name, state, why, metrics)
    report.evaluations = [
        line for line in read_json_lines(folder / "eval.jsonl") if get_number(line, "step") is not None
    ]
    report.restarts = read_json_lines(folder / "restarts.jsonl")
    report.checkpoints = list(_checkpoints(folder / "checkpoints"))
    report.config = _config(folder / "config.yaml", report.problems)
    report.environment = _environment(folder, writer, report)
    report.expert_load = _expert_load(folder / EXPERT_LOAD, report.problems)
    if report.metrics.invalid:
        report.problems.append(f"metrics.jsonl has {report.metrics.invalid} lines that are not steps")
    return report


def _checkpoints(folder: Path) -> Iterator[SavedCheckpoint]:
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        path = folder / name
        if (step := step_of(name)) is not None and (path / MANIFEST_FILE).exists():
            size = sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
            yield SavedCheckpoint(step, size)


def _config(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
        flat = dict(_flatten(sections))
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError) as error:
        problems.append(f"config.yaml cannot be read ({type(error).__name__})")
        return {}
    return flat


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner and prefix.count(".") < 1:
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _environment(folder: Path, writer: dict[str, Any], report: RunReport) -> dict[str, str]:
    details = {
        "host": writer.get("host"),
        "start": writer.get("start"),
        "SLURM job": writer.get("slurm_job_id"),
        "folder": folder.resolve(),
    }
    if report.checkpoints:
        manifest = folder / "checkpoints" / folder_name(report.checkpoints[-1].step) / MANIFEST_FILE
        try:
            if manifest.stat().st_size <= MAX_MANIFEST:
                content = json.loads(manifest.read_bytes().split(b"\n", 1)[1])
                layout = {key: value for key, value in content["layout"].items() if value != 1 or key == "ranks"}
                details["layout"] = ", ".join(f"{key} {value}" for key, value in layout.items())
                details |= content["versions"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            report.problems.append(f"{manifest} cannot be read ({type(error).__name__})")
    return {key: redact(str(value)) for key, value in details.items() if value is not None}


def _expert_load(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        counts = np.array(content["counts"], dtype=np.float64)
        if counts.ndim != 2 or not counts.size:
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        problems.append(f"{file.name} cannot be read ({type(error).__name__})")
        return {}
    load = counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)
    return {"step": content.get("step"), "load": load.round(3).tolist()}


def page_data(report: RunReport) -> dict[str, Any]:
    """What the page's script draws; null: no value. Curves have `metrics_file.POINTS` points at most."""
    columns = report.metrics.columns
    begins = ranges(len(report.metrics))
    ends = np.append(begins, len(report.metrics))[1:] - 1
    times = columns["time"]
    first = times[np.isfinite(times)][:1]
    hours = (times - first) / 3600 if len(first) else times
    curves = {}
    for name in columns:
        if name not in ("step", "tokens_total", "time") and np.isfinite(columns[name]).any():
            one = envelope(columns[name], begins)
            curves[name] = {"mean": _numbers(one.mean)}
            if len(begins) < len(report.metrics):
                curves[name] |= {"low": _numbers(one.low), "high": _numbers(one.high)}
    if "step_seconds" in curves:
        half, most = quantiles(columns["step_seconds"], begins, (0.5, 0.95))
        curves["step_seconds"] |= {"median": _numbers(half), "p95": _numbers(most)}
    return {
        "name": report.name,
        "x": {
            "step": _numbers(columns["step"][ends]),
            "tokens": _numbers(columns["tokens_total"][ends]),
            "hours": _numbers(hours[ends]),
        },
        "points": len(begins),
        "steps": len(report.metrics),
        "curves": curves,
        "evaluations": [
            {key: line.get(key) for key in ("step", "heldout_loss", "heldout_loss_average", "accuracy", "by_loops")}
            for line in report.evaluations
        ],
        "events": [event._asdict() for event in report.events],
        "probes": [{"step": probe.step, **_lists(probe.values)} for probe in report.metrics.probes],
        "expert_load": report.expert_load,
        "planned": report.metrics.planned,
        "checkpoints": [[one.step, one.bytes] for one in report.checkpoints],
    }


def _lists(values: dict[str, Any]) -> dict[str, list[float]]:
    return {name: value for name, value in values.items() if isinstance(value, list) and name != "failures"}


def _numbers(values: np.ndarray) -> list[float | None]:
    """As JSON has them, with 9 digits; whole numbers exactly."""
    return [
        None if value != value else int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.9g}")
        for value in values.tolist()
    ]
