"""How a run is doing, from what lies in its folder and what SLURM says of its job.

Rule: COMPLETED says that a run is done and nothing else does; `writer.json` says what its newest start has told of
itself, and that file's time of change is the sign of life. A start that was killed tells nothing: it is dead when its
process is gone (asked on the same host and in the same container only), or when the sign of life is old, unless its job
is back in the queue. Nothing here imports torch or talks to ranks, so it can be asked from a login node at any time.
What is read may be torn or damaged: a value that is none is taken to be missing.
"""

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import get_number, read_json_lines
from mythos_dist.parallel.process_identity import is_running
from mythos_dist.units import format_duration, short

ALIVE_FOR = 60.0  # seconds without a sign of life after which a start is dead; one comes every ten
PATIENCE = 120.0  # seconds without a step after which a living run may be called hung
_TAIL = 1 << 18  # bytes of a file of lines that are read, from its end
_RECENT = 100  # steps that speeds are measured over

State = Literal["running", "finished", "requeued", "stopped", "hung", "dead"]


@dataclass(frozen=True)
class SlurmJob:
    """What SLURM has of a job."""

    state: str  # PENDING, RUNNING, ...
    reason: str
    restarts: int


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. None: not known (yet)."""

    run_dir: str
    state: State
    why: str  # what speaks for the state, and what can be done
    step: int  # the last that is finished
    steps: int | None  # that the run shall do
    loss: float | None
    tokens: int
    tokens_per_second: float | None  # over the last steps
    seconds_per_step: float | None  # from one step's end to the next: with evaluations and checkpoints
    eta_seconds: float | None
    start: int  # how manieth start of the run
    host: str
    pid: int | None
    job: str | None
    job_state: str | None
    seconds_since_life: float
    seconds_since_step: float | None
    restart: dict[str, Any] | None  # the last line of restarts.jsonl

    @property
    def exit_code(self) -> int:
        """1 if somebody has to look at it."""
        return 1 if self.state in ("hung", "dead") else 0


def query_slurm(job: str) -> SlurmJob | None:
    """None where there is no SLURM, or if it does not know the job any more."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", f"--jobs={job}", "--Format=State:20,RestartCnt:12,Reason:60"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split(maxsplit=2)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if len(answer) < 2 or not answer[1].isdecimal():
        return None
    return SlurmJob(answer[0], answer[2].strip() if len(answer) > 2 else "", int(answer[1]))


def read_status(
    run_dir: str | Path,
    patience: float = PATIENCE,
    slurm: Callable[[str], SlurmJob | None] = query_slurm,
    now: float | None = None,
) -> RunStatus:
    """The status of the run in `run_dir` at `now` (unix seconds; None: this moment).

    patience: seconds without a step that are never called hung. Raises UserError if there is no run in the folder.
    """
    folder, now = Path(run_dir), time.time() if now is None else now
    writer, sign_of_life = _writer(folder)
    try:
        config = load_config(folder / "config.yaml")
    except UserError:
        config = None  # it is being written, or by another version
    lines = [_sound(line) for line in read_json_lines(folder / "metrics.jsonl", _TAIL)]
    lines = [line for line in lines if "step" in line]
    restarts = [_sound(line) for line in read_json_lines(folder / "restarts.jsonl", _TAIL)]
    job = slurm(writer["slurm_job_id"]) if "slurm_job_id" in writer else None
    last = lines[-1] if lines else {}
    seconds_per_step = _seconds_per_step(lines)
    step, steps = last.get("step") or 0, config.train.steps if config else None
    since_step = now - last["time"] if "time" in last else None
    since_life = now - sign_of_life
    # Steps of the start before do not count; before its first step a start loads, as long as the run itself allows.
    since_start, limit = now - writer.get("began", writer.get("time", sign_of_life)), patience
    if since_step is not None and since_step < since_start:
        recent = [line["step_seconds"] for line in lines[-_RECENT:] if "step_seconds" in line]
        limit = max(patience, 10 * statistics.median(recent or [0.0]))
        quiet = since_step
    else:
        limit = max(patience, config.faults.hang_after if config else 0)
        quiet = since_start
    completed = (folder / "COMPLETED").exists()
    state, why = determine_state(writer, job, completed, since_life, quiet, limit, gone=is_running(writer) is False)
    eta = (steps - step) * seconds_per_step if state == "running" and steps and seconds_per_step else None
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        why=why,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        tokens=last.get("tokens") or 0,
        tokens_per_second=_tokens_per_second(lines, config, seconds_per_step),
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
    )


def determine_state(
    writer: dict[str, Any],
    job: SlurmJob | None,
    completed: bool,
    since_life: float,
    quiet: float,
    limit: float,
    gone: bool = False,
) -> tuple[State, str]:
    """The state, and what speaks for it.

    quiet: seconds since the last step or, before the first, since the start. limit: from when on that is a hang. gone:
    rank 0's process was looked for, and is not there.
    """
    said, why = writer.get("state", "running"), writer.get("why") or ""
    alive = said == "running" and since_life <= ALIVE_FOR and not gone
    if alive and quiet > limit:
        return (
            "hung",
            f"no step for {format_duration(quiet)}, though it shows life; logs/ in the run folder may say where",
        )
    if alive:
        return "running", ""
    if completed or said == "completed":
        return "finished", ""
    if said == "running" and gone:
        why = f"rank 0 (pid {writer.get('pid')}) does not run any more on this host, and left no word: it was killed"
    elif said == "running":
        why = f"no sign of life for {format_duration(since_life)}: rank 0 was killed, or its node was lost"
    name = f"job {writer.get('slurm_job_id')}"
    if job and job.state == "PENDING":
        return "requeued", f"{name} waits in SLURM's queue ({job.reason}); {why}"
    if job and job.restarts > _whole(writer.get("slurm_restart_count")):
        return "requeued", f"SLURM has started {name} again, and ranks are joining; {why}"
    if said == "stopped":
        return "stopped", f"{why}; the same command goes on"
    holds = (
        job and job.state == "RUNNING" and (since_life > ALIVE_FOR or gone)
    )  # else its script is about to requeue it
    still = f"; {name} still holds its nodes, end it with scancel" if holds else ""
    return "dead", f"{why}{still}; the same command goes on from the newest checkpoint"


def format_status(status: RunStatus) -> list[str]:
    """The status for a person, as lines."""
    here = status
    told = here.why if here.why.startswith(here.state) else "; ".join(filter(None, (here.state, here.why)))
    lines = [f"{here.run_dir}: {told}"]
    of = f"/{here.steps}" if here.steps else ""
    numbers = [f"step {here.step}{of}"]
    if here.loss is not None:
        numbers.append(f"loss {here.loss:.3f}")
    if here.tokens_per_second and here.seconds_per_step:
        numbers.append(f"tokens/s {short(here.tokens_per_second)}  {here.seconds_per_step:.2f} s/step")
    if here.steps:
        numbers.append(f"{100 * here.step / here.steps:.1f}% done")
    if here.eta_seconds is not None:
        numbers.append(f"{format_duration(here.eta_seconds)} to go")
    lines.append("  " + "  ".join(numbers))
    job = f", SLURM job {here.job}" + (f" ({here.job_state})" if here.job_state else "") if here.job else ""
    last = "" if here.seconds_since_step is None else f", last step {format_duration(here.seconds_since_step)} ago"
    life = format_duration(here.seconds_since_life)
    lines.append(f"  start {here.start} on {here.host} (pid {here.pid}){job}; sign of life {life} ago{last}")
    if here.restart:
        restart = here.restart
        lost = restart.get("seconds_lost")
        lines.append(
            f"  start {restart.get('start')} went on behind step {restart.get('from_step')}"
            + (f", {format_duration(lost)} were lost" if lost is not None else "")
            + f": {restart.get('why')}"
        )
    return lines


def _writer(folder: Path) -> tuple[dict[str, Any], float]:
    """What the newest start has written of itself, and when its file was last touched."""
    file = folder / "writer.json"
    try:
        writer = json.loads(file.read_bytes())
        if isinstance(writer.get("start"), int):
            return _sound(writer), file.stat().st_mtime
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    if os.path.isfile(file):
        raise UserError(f"{file} is damaged; the next start of the run writes it anew")
    if os.path.exists(folder / "config.yaml") or os.path.isdir(folder / "launch"):
        raise UserError(f"{folder}: no start of this run has come as far as its first step; see what the launcher said")
    raise UserError(f"{folder} is not a run folder: give the run.dir of a run, such as runs/demo")


_NUMBERS = "start step time began loss tokens tokens_per_second step_seconds pid from_step seconds_lost".split()
_TEXTS = "state why host slurm_job_id".split()


def _sound(line: dict[str, Any]) -> dict[str, Any]:
    """`line` without values that are none of their kind: a reader must not fail over what a disk or an editor left."""
    wrong = {key for key in _NUMBERS if key in line and not math.isfinite(get_number(line, key) or 0.0)}
    wrong |= {key for key in _NUMBERS if key in line and get_number(line, key) is None}
    wrong |= {key for key in _TEXTS if key in line and not isinstance(line[key], str)}
    return {key: value for key, value in line.items() if key not in wrong}


def _whole(value: Any) -> int:
    return int(value) if str(value).isdecimal() else 0


def _seconds_per_step(lines: list[dict[str, Any]]) -> float | None:
    """The mean over the last steps. A pause between two starts is none: it is no part of training."""
    recent = [line for line in lines[-_RECENT:] if "time" in line]
    apart = [
        (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])
        for earlier, later in itertools.pairwise(recent)
        if later["step"] > earlier["step"] and later["time"] > earlier["time"]
    ]
    if not apart:
        return lines[-1].get("step_seconds") if lines else None
    usual = statistics.median(apart)
    return statistics.fmean(seconds for seconds in apart if seconds <= 20 * usual)


def _tokens_per_second(
    lines: list[dict[str, Any]], config: Config | None, seconds_per_step: float | None
) -> float | None:
    if config and seconds_per_step:
        return config.train.global_batch * config.train.seq_len / seconds_per_step
    return lines[-1].get("tokens_per_second") if lines else None
