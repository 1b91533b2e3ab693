"""The status of a run, from the files in its folder and from SLURM's record of its job.

Rule: a run is completed if the file COMPLETED exists, or its newest start recorded that. `writer.json` is the record of
the newest start, and its modification time is the heartbeat. A start that was killed records nothing: it is dead if its
process has ended (which can be checked only on the same host and in the same container) or the heartbeat is old, unless
its job is pending again. Nothing here imports torch or contacts ranks, so it can run on a login node at any time. Files
may be incomplete or damaged: invalid values count as missing.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mythos_dist.checkpoint.remote import read_state
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config, TrainConfig
from mythos_dist.errors import UserError
from mythos_dist.files import get_number, read_json_lines
from mythos_dist.parallel.process_identity import is_running
from mythos_dist.units import count, format_duration, short

ALIVE_FOR = 60.0  # seconds without a heartbeat after which a start is dead; there is one every ten seconds
PATIENCE = 120.0  # seconds without a step after which a run may be called hung
_TAIL = 1 << 18  # bytes that are read from the end of a .jsonl file
_RECENT = 100  # steps over which speeds are measured

State = Literal["running", "completed", "requeued", "stopped", "hung", "dead"]


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue shows it."""

    state: str  # PENDING, RUNNING, ...
    reason: str
    restarts: int


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. None: unknown (yet)."""

    run_dir: str
    state: State
    why: str  # the reason for the state, and what to do
    step: int  # the last completed step
    steps: int | None  # train.steps
    loss: float | None
    tokens: int
    tokens_per_second: float | None  # over the last steps
    seconds_per_step: float | None  # including evaluations and checkpoints
    eta_seconds: float | None
    start: int  # number of the start, from 1
    host: str
    pid: int | None
    job: str | None
    job_state: str | None
    seconds_since_life: float  # since the last heartbeat
    seconds_since_step: float | None
    restart: dict[str, Any] | None  # the last line of restarts.jsonl
    uploads: dict[str, Any] | None = None  # remote.json; None without checkpoint.remote

    @property
    def exit_code(self) -> int:
        """1 if the run needs attention."""
        return 1 if self.state in ("hung", "dead") else 0


def query_slurm(job: str) -> SlurmJob | None:
    """None without SLURM, or if SLURM does not know the job any more."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", f"--jobs={job}", "--Format=State:20,RestartCnt:12,Reason:60"]
    try:
        fields = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split(maxsplit=2)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if len(fields) < 2 or not fields[1].isdecimal():
        return None
    return SlurmJob(fields[0], fields[2].strip() if len(fields) > 2 else "", int(fields[1]))


def read_status(
    run_dir: str | Path,
    patience: float = PATIENCE,
    slurm: Callable[[str], SlurmJob | None] = query_slurm,
    now: float | None = None,
) -> RunStatus:
    """The status of the run in `run_dir` at `now` (unix seconds; None: the current time).

    patience: seconds without a step before a run may be called hung. Raises UserError if the folder contains no run.
    """
    folder, now = Path(run_dir), time.time() if now is None else now
    writer, heartbeat = read_local_writer(folder)
    try:
        config = load_config(folder / "config.yaml")
    except UserError:
        config = None  # not completely written yet, or of another version
    metrics = [line for line in _read_lines(folder / "metrics.jsonl") if "step" in line]
    restarts = _read_lines(folder / "restarts.jsonl")
    job = slurm(writer["slurm_job_id"]) if "slurm_job_id" in writer else None
    last = metrics[-1] if metrics else {}
    since_life = now - heartbeat
    since_step = now - last["time"] if "time" in last else None
    since_start = now - writer.get("began", writer.get("time", heartbeat))
    idle, limit = _idle_seconds(metrics, since_step, since_start, patience, config)
    completed = (folder / "COMPLETED").exists()
    state, why = determine_state(
        writer, job, completed, since_life, idle, limit, process_ended=is_running(writer) is False
    )
    seconds_per_step, left = _seconds_per_step(metrics), None
    step, steps = last.get("step") or 0, config.train.steps if config else None
    if config and steps is not None:  # counts the steps that were carried over, if any
        first_step = (last.get("schedule_step") or step) - step
        if last.get("stage", "") != config.run.stage and config.run.start_from_state != "everything":
            first_step = -config.run.stage_begin  # the stage has begun, and trained no step yet
        steps -= first_step
        left = _steps_left(config.train, step + first_step)
    eta = left * seconds_per_step if state == "running" and left is not None and seconds_per_step else None
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        why=why,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        tokens=last.get("tokens") or 0,
        tokens_per_second=_tokens_per_second(metrics, config, seconds_per_step),
        seconds_per_step=seconds_per_step,
        eta_seconds=eta,
        start=writer["start"],
        host=writer.get("host", "?"),
        pid=writer.get("pid"),
        job=writer.get("slurm_job_id"),
        job_state=job.state if job else None,
        seconds_since_life=since_life,
        seconds_since_step=since_step,
        restart=restarts[-1] if restarts else None,
        uploads=_read_uploads(folder, config),
    )


def _idle_seconds(
    metrics: list[dict[str, Any]],
    since_step: float | None,
    since_start: float,
    patience: float,
    config: Config | None,
) -> tuple[float, float]:
    """Seconds since the last step of this start (before its first step: since it began), and the seconds after which
    the run counts as hung: ten step times, or faults.hang_after before the first step, but at least `patience`."""
    if since_step is not None and since_step < since_start:
        recent = [line["step_seconds"] for line in metrics[-_RECENT:] if "step_seconds" in line]
        return since_step, max(patience, 10 * statistics.median(recent or [0.0]))
    return since_start, max(patience, config.faults.hang_after if config else 0)


def determine_state(
    writer: dict[str, Any],
    job: SlurmJob | None,
    completed: bool,
    since_life: float,
    idle: float,
    limit: float,
    process_ended: bool = False,
) -> tuple[State, str]:
    """The state, and the reason for it.

    idle: seconds since the last step or, before the first one, since the start. limit: of `idle`, after which the run
    hangs. process_ended: whether rank 0's process is known to have ended.
    """
    recorded, why = writer.get("state", "running"), writer.get("why") or ""
    alive = recorded == "running" and since_life <= ALIVE_FOR and not process_ended
    if alive and idle > limit:
        return "hung", f"no step for {format_duration(idle)}, but rank 0 is alive; see logs/ in the run folder"
    if alive:
        return "running", ""
    if completed or recorded == "completed":
        return "completed", ""
    if recorded == "running" and process_ended:
        why = f"rank 0 (pid {writer.get('pid')}) has exited on this host without recording a reason: it was killed"
    elif recorded == "running":
        why = f"no heartbeat for {format_duration(since_life)}: rank 0 was killed, or its node was lost"
    name = f"job {writer.get('slurm_job_id')}"
    if job and job.state == "PENDING":
        return "requeued", f"{name} is pending in SLURM's queue ({job.reason}); {why}"
    if job and job.restarts > _to_int(writer.get("slurm_restart_count")):
        return "requeued", f"SLURM has restarted {name}, and its ranks are starting; {why}"
    if recorded == "stopped":
        return "stopped", f"{why}; the same command resumes the run"
    if job and job.state == "RUNNING" and (since_life > ALIVE_FOR or process_ended):  # else it is being requeued
        why += f"; {name} still holds its nodes, cancel it with scancel"
    return "dead", f"{why}; the same command resumes from the newest checkpoint"


def format_status(status: RunStatus) -> list[str]:
    """The status as lines of text."""
    state_is_in_why = status.why.startswith(status.state)
    state = status.why if state_is_in_why else "; ".join(filter(None, (status.state, status.why)))
    lines = [f"{status.run_dir}: {state}", _progress_line(status), _process_line(status)]
    return [*lines, *_upload_lines(status), *_restart_lines(status)]


def _progress_line(status: RunStatus) -> str:
    parts = [f"step {status.step}" + (f"/{status.steps}" if status.steps else "")]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.tokens_per_second and status.seconds_per_step:
        parts.append(f"tokens/s {short(status.tokens_per_second)}  {status.seconds_per_step:.2f} s/step")
    if status.steps:
        parts.append(f"{100 * status.step / status.steps:.1f}% done")
    if status.eta_seconds is not None:
        parts.append(f"{format_duration(status.eta_seconds)} left")
    return "  " + "  ".join(parts)


def _process_line(status: RunStatus) -> str:
    line = f"  start {status.start} on {status.host} (pid {status.pid})"
    if status.job:
        line += f", SLURM job {status.job}"
        if status.job_state:
            line += f" ({status.job_state})"
    line += f"; last heartbeat {format_duration(status.seconds_since_life)} ago"
    if status.seconds_since_step is not None:
        line += f", last step {format_duration(status.seconds_since_step)} ago"
    return line


def _upload_lines(status: RunStatus) -> list[str]:
    uploads = status.uploads
    if uploads is None:
        return []
    uploaded, waiting = uploads["uploaded"], uploads["waiting"]
    line = f"  uploads to {uploads['url']}: " + ("none yet" if uploaded is None else f"step {uploaded} is the newest")
    if waiting:
        line += f", {count(len(waiting), 'checkpoint')} waiting (step {', '.join(map(str, waiting[:5]))})"
    return [line, *([f"    failing: {uploads['problem']}"] if uploads["problem"] else [])]


def _read_uploads(folder: Path, config: Config | None) -> dict[str, Any] | None:
    """The content of remote.json if the run uploads its checkpoints, and the file is intact."""
    state = read_state(folder) if config and config.checkpoint.remote else None
    return asdict(state) if state else None


def _restart_lines(status: RunStatus) -> list[str]:
    if not status.restart:
        return []
    restart = status.restart
    lost = restart.get("seconds_lost")
    lost_text = f" ({format_duration(lost)} lost)" if lost is not None else ""
    return [
        f"  start {restart.get('start')} resumed after step {restart.get('from_step')}{lost_text}: {restart.get('why')}"
    ]


def read_local_writer(folder: Path) -> tuple[dict[str, Any], float]:
    """writer.json, which the newest start has written, and when it was last modified (unix seconds)."""
    file = folder / "writer.json"
    try:
        writer = json.loads(file.read_bytes())
        if isinstance(writer.get("start"), int):
            return _drop_invalid(writer), file.stat().st_mtime
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    if os.path.isfile(file):
        raise UserError(f"{file} is damaged; the next start of the run replaces it")
    if os.path.exists(folder / "config.yaml") or os.path.isdir(folder / "launch"):
        raise UserError(f"{folder}: no start of this run has reached its first step; see the launcher's output")
    raise UserError(f"{folder} is not a run folder: give the run.dir of a run, such as runs/demo")


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [_drop_invalid(line) for line in read_json_lines(file, _TAIL)]


_NUMBERS = "start step time began loss tokens tokens_per_second step_seconds pid from_step seconds_lost".split()
_TEXTS = "state why host slurm_job_id".split()


def _drop_invalid(line: dict[str, Any]) -> dict[str, Any]:
    """`line` without values of a wrong type, which a full disk or an editor may leave."""
    valid = dict(line)
    for key in _NUMBERS:
        if key in line and get_number(line, key) is None:
            del valid[key]
    for key in _TEXTS:
        if key in line and not isinstance(line[key], str):
            del valid[key]
    return valid


def _to_int(value: Any) -> int:
    return int(value) if str(value).isdecimal() else 0


def _seconds_per_step(metrics: list[dict[str, Any]]) -> float | None:
    """The mean over the last steps, without pauses between two starts."""
    recent = [line for line in metrics[-_RECENT:] if "time" in line]
    step_times = [
        (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])
        for earlier, later in itertools.pairwise(recent)
        if later["step"] > earlier["step"] and later["time"] > earlier["time"]
    ]
    if not step_times:
        return metrics[-1].get("step_seconds") if metrics else None
    median = statistics.median(step_times)
    return statistics.fmean(seconds for seconds in step_times if seconds <= 20 * median)


def _steps_left(train: TrainConfig, step: int) -> float:
    """Steps of the schedule after `step`, in steps of its size: with `train.batch_ramp` later ones take longer."""
    return (train.samples_until(train.steps) - train.samples_until(step)) / train.batch_size_at(max(1, step))


def _tokens_per_second(
    metrics: list[dict[str, Any]], config: Config | None, seconds_per_step: float | None
) -> float | None:
    if config and seconds_per_step:
        size = metrics[-1].get("global_batch") if metrics else None
        return (size or config.train.global_batch) * config.train.seq_len / seconds_per_step
    return metrics[-1].get("tokens_per_second") if metrics else None
