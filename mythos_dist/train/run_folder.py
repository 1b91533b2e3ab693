"""The run folder: its config, its logs, and the refusal to mix two runs in one folder.

Decisions: CLUSTER-1, CLUSTER-9.
"""

import glob
import json
import logging
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from mythos_dist.checkpoint import fence as fences
from mythos_dist.checkpoint.fence import Fence, newest_start
from mythos_dist.checkpoint.reader import checkpoints_of
from mythos_dist.config.compare import differences
from mythos_dist.config.deepspeed import deepspeed_config
from mythos_dist.config.load import dump_config, load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import (
    get_number,
    lock_file,
    os_user_error,
    read_json_lines,
    remove_temporaries,
    user_errors,
    write_atomically,
)
from mythos_dist.parallel.launcher import RankInfo, read_job_id
from mythos_dist.train import restarts, spikes, stop
from mythos_dist.train.line_file import FILES as LINES

log = logging.getLogger(__name__)

COMPLETED, LOCK, SETTINGS = "COMPLETED", "writer.lock", ("config.yaml", "deepspeed.json")
# What the run itself replaces, under the lock; its own temporary files of these names may be removed.
_REPLACED = (*SETTINGS, *LINES, restarts.FILE, spikes.FILE, fences.FILE, "loops.png", COMPLETED)
_FILES = (*_REPLACED, LOCK, fences.GUARD, stop.FILE)
_FOLDERS = ("checkpoints", "logs", "wandb")


def check_run_folder(config: Config) -> None:
    """Raise UserError when `run.dir` cannot be a run's folder, or holds a run of another config, naming each setting
    that differs. Writes nothing."""
    path = Path(config.run.dir)
    if found := _unusable(path):
        raise UserError(found)
    spikes.read_rollbacks(path)
    if not (path / SETTINGS[0]).exists():
        return
    before = asdict(_settings_of(path / SETTINGS[0]))
    found = [
        f"{name}={value}, but the run in run.dir={path} has {old}" for name, value, old in differences(config, before)
    ]
    if found:
        raise UserError([*found, "set these back to go on with that run, or give another run.dir"])


def _unusable(path: Path) -> list[str]:
    """Why `path` can be no run folder, a line each."""
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        os.stat(
            path
        )  # for what `lexists` does not tell: a name that is too long, links in a circle, a forbidden folder
    except FileNotFoundError:
        pass
    except ValueError as error:
        return [f"run.dir={str(path)!r} is no path ({error}); give another"]
    except NotADirectoryError:
        return [f"run.dir={path}: {there} is a file, and no folder can be made below it; give another run.dir"]
    except OSError as error:
        return [f"run.dir={path}: {os_user_error(error, path, 'cannot be used')}"]
    if there.is_symlink() and not there.exists():
        return [f"run.dir={path}: {there} is a link to {os.readlink(there)}, which is not there; make that folder"]
    if not there.is_dir():
        what = "is a file" if there == path else f"lies below {there}, which is a file"
        return [f"run.dir={path} {what}; name a folder"]
    folders = [there, *(there / name for name in _FOLDERS)] if there == path else [there]
    found = [_not_writable(path, folder) for folder in folders if folder.is_dir()]
    if there == path:
        found += [
            f"{path / name} is a folder; the run writes a file of this name: move it away"
            for name in _FILES
            if (path / name).is_dir()
        ]
        found += [
            f"{path / name} is no folder, and the run needs one of this name: move it away"
            for name in _FOLDERS
            if os.path.lexists(path / name) and not (path / name).is_dir()
        ]
    return [line for line in found if line]


def _not_writable(run_dir: Path, folder: Path) -> str:
    """Why nothing can be written in a folder, as far as that can be seen without writing; empty: it can."""
    if os.access(folder, os.W_OK | os.X_OK):
        return ""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"run.dir={run_dir}: {folder} lies on a file system that is mounted read-only; give another run.dir"
    return f"run.dir={run_dir}: nothing may be written in {folder} (permission denied); give another run.dir"


def _settings_of(file: Path) -> Config:
    """The config of the run in the folder. Raises UserError if it is damaged, with what to do."""
    try:
        text, config = file.read_text(encoding="utf-8"), load_config(file)
        whole = dump_config(config)
        if text == whole or not whole.startswith(text):  # else its end is missing, and defaults stand for it
            return config
        problems = ["it ends too early"]
    except OSError as error:
        problems = [error.strerror or str(error)]
    except UnicodeDecodeError as error:
        problems = [str(error)]
    except UserError as error:
        problems = error.problems
    raise UserError(
        [
            *problems,
            "this file of the run is damaged, or of another version: remove it, and the same command writes it again "
            f"(checkpoints hold these settings, too); or give another run.dir than {file.parent}",
        ],
        source=str(file),
    )


def refuse_to_start_over(run_dir: Path) -> None:
    """Raise UserError if a run without a checkpoint had one: it would begin again, and drop its metrics."""
    if checkpoints_of(run_dir / "checkpoints"):
        return
    lines = read_json_lines(run_dir / LINES[0], tail=1 << 16)
    last = max((int(get_number(line, "step") or 0) for line in lines), default=0)
    completed, published = (run_dir / COMPLETED).exists(), newest_start(run_dir).get("published")
    if completed or (published and last):
        had = f"has the marker {COMPLETED}" if completed else f"has saved a checkpoint of step {published}"
        remove = " and ".join(name for name, there in ((COMPLETED, completed), (LINES[0], last)) if there)
        raise UserError(
            f"run.dir={run_dir} {had}, but {run_dir / 'checkpoints'} holds no checkpoint: training would begin at "
            f"step 0 and drop the {last} steps in {LINES[0]}; put the checkpoints back, or give another run.dir, or "
            f"remove {remove} there to begin again"
        )


def claim_run_folder(config: Config) -> TextIO:
    """Make `run.dir` this process's (rank 0's) as long as the returned file is open.

    Ranks outlive a launcher that is killed, so the same command given again may meet the old run, still writing:
    that raises UserError, as does a folder that cannot be written. But a later start of the same submission takes over:
    its scheduler has given the old one up, and whatever is left of it meets the fence.
    """
    path = Path(config.run.dir)
    with user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        file = path / LOCK
        lock = lock_file(file)
        if lock is None and _is_ours(path):
            lock = lock_file(file, timeout=5.0, poll=0.25)  # its process may be exiting
            if lock is None:
                log.warning("rank 0 of an earlier start still holds %s: this start takes the run folder over", path)
                file.unlink(missing_ok=True)
                lock = lock_file(file)
    if lock is None:
        raise UserError(
            f"run.dir={path} is in use: {_holder(path)} writes there; stop its ranks, or give another run.dir"
        )
    with user_errors(path):
        remove_temporaries(path, _REPLACED)
        _remove_probes(path)
    return lock


def probe_prefix(run_dir: Path) -> str:
    """Prefix of the probe files with which preflight checks that all nodes share the run folder."""
    return f".{run_dir.name}.seen-by-all-"


def _remove_probes(run_dir: Path) -> None:
    """Remove probe files that earlier starts of this run left when they were killed.

    They are in the run folder, or in its parent if it did not exist yet.
    """
    prefix = probe_prefix(run_dir)
    for folder in (run_dir, run_dir.parent):
        for file in folder.glob(f"{glob.escape(prefix)}*"):
            if re.fullmatch("[0-9a-f]{16}", file.name.removeprefix(prefix)):
                file.unlink(missing_ok=True)


def write_settings(config: Config, num_replicas: int, fence: Fence) -> None:
    """On rank 0: config.yaml and DeepSpeed's JSON, when this start is the newest. Raises UserError."""
    path = fence.run_dir
    with user_errors(path), fence.guard():
        write_atomically(path / "config.yaml", dump_config(config))
        write_atomically(path / "deepspeed.json", json.dumps(deepspeed_config(config, num_replicas), indent=2) + "\n")
        (path / COMPLETED).unlink(missing_ok=True)  # train.steps was raised


def mark_completed(fence: Fence | None, run_dir: Path) -> None:
    """On rank 0: write the marker, when everything before it is on disk. Raises UserError.

    fence: None for a start that only completes an earlier one.
    """
    marker = run_dir / COMPLETED
    with user_errors(marker), fence.guard() if fence else nullcontext():
        if not marker.exists():
            write_atomically(marker, "")


def _is_ours(run_dir: Path) -> bool:
    """Whether the run's newest start belongs to this process's submission."""
    launch = read_job_id()
    return bool(launch) and newest_start(run_dir).get("launch") == launch


def _holder(run_dir: Path) -> str:
    about = newest_start(run_dir)
    job = f" of job {about['slurm_job_id']}" if "slurm_job_id" in about else ""
    return f"a run{job} on {about.get('host')} (pid {about.get('pid')})" if about else "another run"


def start_logging(run_dir: Path, rank_info: RankInfo, start: int) -> None:
    """Send every library's log lines to logs/rank-NNNNN.log; the console gets our warnings, from rank 0.

    Raises UserError if the file cannot be opened.
    """
    with user_errors(run_dir / "logs"):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(run_dir / "logs" / f"rank-{rank_info.rank:05d}.log")
    to_file.setFormatter(
        logging.Formatter(f"%(asctime)s {rank_info.node} start {start} %(levelname)s %(name)s: %(message)s")
    )
    logging.captureWarnings(True)  # deprecations inside DeepSpeed and torch are for the log, not for the console
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers = [to_file]
    if rank_info.rank == 0:
        to_console = logging.StreamHandler(sys.stderr)
        to_console.setLevel(logging.WARNING)
        to_console.addFilter(lambda record: record.name.startswith("mythos_dist"))
        to_console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(to_console)
    for name in list(logging.root.manager.loggerDict):  # DeepSpeed's logger brings a console handler of its own
        logger = logging.getLogger(name)
        if name.split(".")[0] in ("DeepSpeed", "deepspeed", "streaming"):
            logger.handlers, logger.propagate = [], True
