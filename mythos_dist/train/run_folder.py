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
from mythos_dist.checkpoint.publish import remove_unfinished
from mythos_dist.checkpoint.reader import checkpoints_of
from mythos_dist.checkpoint.remote import STATE as REMOTE_STATE
from mythos_dist.config.compare import WIDTHS, differences
from mythos_dist.config.deepspeed import deepspeed_config
from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import load_config
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
from mythos_dist.model.parameter_groups import count_elements
from mythos_dist.parallel.launcher import RankInfo, read_job_id
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.train import restarts, spikes, stop
from mythos_dist.train.line_file import FILES as LINES
from mythos_dist.train.sinks import TENSORBOARD, WANDB_ID

log = logging.getLogger(__name__)

PROFILES = "profile"  # folder
COMPLETED, LOCK, SETTINGS = "COMPLETED", "writer.lock", ("config.yaml", "deepspeed.json")
# Files that the run replaces under the lock, so that left-over temporary files of these names may be removed.
_REPLACED = (
    *SETTINGS,
    *LINES,
    restarts.FILE,
    spikes.FILE,
    fences.FILE,
    REMOTE_STATE,
    "loops.png",
    "expert_load.json",
    "report.html",
    WANDB_ID,
    COMPLETED,
)
_FILES = (*_REPLACED, LOCK, fences.GUARD, stop.FILE, stop.PROFILE)
_FOLDERS = ("checkpoints", "logs", "wandb", TENSORBOARD, PROFILES)


def check_run_folder(config: Config) -> None:
    """Raise UserError if `run.dir` cannot be used, or holds a run of another config; names each setting that differs.

    Writes nothing.
    """
    path = Path(config.run.dir)
    if problems := _path_problems(path):
        raise UserError(problems)
    spikes.read_rollbacks(path)
    if not (path / SETTINGS[0]).exists():
        return
    old_settings = asdict(_settings_of(path / SETTINGS[0]))
    old_stage = old_settings["run"]["stage"]
    of_other_stage = bool(old_stage and config.run.stage and old_stage != config.run.stage)
    if of_other_stage:  # they differ in what a stage may change
        old_settings = {"model": {key: old_settings["model"][key] for key in WIDTHS}}
    problems = [
        f"{name}={value}, but the run in run.dir={path} has {old}"
        for name, old, value in differences(old_settings, config, complete=not of_other_stage)
    ]
    if problems:
        raise UserError([*problems, "set these back to resume that run, or give another run.dir"])


def _path_problems(path: Path) -> list[str]:
    """Why `path` cannot be a run folder."""
    existing = path  # the path itself, or its nearest parent that exists
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        os.stat(path)  # raises for names that are too long, cycles of links and parents without permission
    except FileNotFoundError:
        pass
    except ValueError as error:
        return [f"run.dir={str(path)!r} is not a valid path ({error}); give another"]
    except NotADirectoryError:
        return [f"run.dir={path}: {existing} is a file, so no folder can be created below it; give another run.dir"]
    except OSError as error:
        return [f"run.dir={path}: {os_user_error(error, path, 'cannot be used')}"]
    if existing.is_symlink() and not existing.exists():
        target = os.readlink(existing)
        return [f"run.dir={path}: {existing} is a link to {target}, which does not exist; create that folder"]
    if not existing.is_dir():
        problem = "is a file" if existing == path else f"is below {existing}, which is a file"
        return [f"run.dir={path} {problem}; name a folder"]
    folders = [existing, *(existing / name for name in _FOLDERS)] if existing == path else [existing]
    problems = [_write_problem(path, folder) for folder in folders if folder.is_dir()]
    if existing == path:
        problems += [
            f"{path / name} is a folder, but the run writes a file of this name: move it away"
            for name in _FILES
            if (path / name).is_dir()
        ]
        problems += [
            f"{path / name} is not a folder, but the run needs a folder of this name: move it away"
            for name in _FOLDERS
            if os.path.lexists(path / name) and not (path / name).is_dir()
        ]
    return [problem for problem in problems if problem]


def _write_problem(run_dir: Path, folder: Path) -> str:
    """Why a folder is not writable, as far as its permissions and mount options show; empty if it is."""
    if os.access(folder, os.W_OK | os.X_OK):
        return ""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"run.dir={run_dir}: {folder} is on a file system that is mounted read-only; give another run.dir"
    return f"run.dir={run_dir}: {folder} is not writable (permission denied); give another run.dir"


def _settings_of(file: Path) -> Config:
    """The config of the run in the folder. Raises UserError with the remedy if the file is damaged."""
    try:
        text, config = file.read_text(encoding="utf-8"), load_config(file)
        expected = dump_config(config)
        complete_lines = text[: text.rfind("\n") + 1] or text  # the last value may be truncated, too
        if text == expected or not expected.startswith(complete_lines):
            return config
        problems = ["it is truncated"]  # and `config` has defaults for the missing settings
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
            f"(checkpoints also contain these settings); or give another run.dir than {file.parent}",
        ],
        source=str(file),
    )


def refuse_to_start_over(run_dir: Path) -> None:
    """Raise UserError if a run had a checkpoint but has none now: it would start over and drop its metrics."""
    if checkpoints_of(run_dir / "checkpoints"):
        return
    lines = read_json_lines(run_dir / LINES[0], tail=1 << 16)
    last = max((int(get_number(line, "step") or 0) for line in lines), default=0)
    completed, published = (run_dir / COMPLETED).exists(), newest_start(run_dir).get("published")
    if completed or (published and last):
        evidence = f"has the marker {COMPLETED}" if completed else f"has saved a checkpoint of step {published}"
        remove = " and ".join(name for name, exists in ((COMPLETED, completed), (LINES[0], last)) if exists)
        raise UserError(
            f"run.dir={run_dir} {evidence}, but {run_dir / 'checkpoints'} holds no checkpoint: training would start "
            f"at step 0 and drop the {last} steps in {LINES[0]}; restore the checkpoints, or give another run.dir, or "
            f"remove {remove} there to start over"
        )


def claim_run_folder(config: Config) -> TextIO:
    """Lock `run.dir` for this process (rank 0) for as long as the returned file is open.

    Raises UserError if the folder is not writable or another run holds the lock: ranks that survive a killed launcher
    may still write. A later start of the same submission takes the lock over: its scheduler has ended the previous
    start, and the fence stops ranks of it that are still alive.
    """
    path = Path(config.run.dir)
    with user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        file = path / LOCK
        lock = lock_file(file)
        if lock is None and _is_ours(path):
            lock = lock_file(file, timeout=5.0, poll=0.25)  # its process may be exiting
            if lock is None:
                log.warning("rank 0 of an earlier start still locks %s: this start takes over the run folder", path)
                file.unlink(missing_ok=True)
                lock = lock_file(file)
    if lock is None:
        raise UserError(
            f"run.dir={path} is in use: {_holder(path)} writes to it; stop its ranks, or give another run.dir"
        )
    return lock


def take_over(run_dir: Path) -> Fence:
    """On rank 0, which holds the run folder's lock: make this the newest start. Raises UserError.

    From then on earlier starts change nothing: they check the number, and what they were about to rename is gone.
    """
    with user_errors(run_dir):
        fence = Fence.take(run_dir)
    remove_leftovers(run_dir, fence.start)
    return fence


def remove_leftovers(run_dir: Path, start: int) -> None:
    """On rank 0, which holds the run folder's lock: remove the temporary files and folders of starts up to `start`.

    Raises UserError.
    """
    with user_errors(run_dir):
        remove_temporaries(run_dir, _REPLACED)
        _remove_probes(run_dir)
        if (run_dir / "checkpoints").is_dir():
            remove_unfinished(run_dir / "checkpoints", start)


def probe_prefix(run_dir: Path) -> str:
    """Prefix of the files with which preflight checks that all nodes share the run folder."""
    return f".{run_dir.name}.seen-by-all-"


def _remove_probes(run_dir: Path) -> None:
    """Remove preflight's files of earlier starts of this run that were killed.

    They are in the run folder, or in its parent if it did not exist yet.
    """
    prefix = probe_prefix(run_dir)
    for folder in (run_dir, run_dir.parent):
        for file in folder.glob(f"{glob.escape(prefix)}*"):
            if re.fullmatch("[0-9a-f]{16}", file.name.removeprefix(prefix)):
                file.unlink(missing_ok=True)


def write_settings(config: Config, mesh: Mesh, fence: Fence) -> None:
    """On rank 0: write config.yaml and its DeepSpeed JSON. Raises UserError, also if there is a newer start."""
    path = fence.run_dir
    settings = deepspeed_config(config, mesh.data.size, count_elements(config, mesh))
    with user_errors(path), fence.guard():
        fence.replace(path / "config.yaml", dump_config(config))
        fence.replace(path / "deepspeed.json", json.dumps(settings, indent=2) + "\n")
        (path / COMPLETED).unlink(missing_ok=True)  # there is one if train.steps was raised


def mark_completed(fence: Fence | None, config: Config) -> None:
    """On rank 0: write the marker COMPLETED with `config.end`, after everything else is on disk. Raises UserError.

    fence: None for a start that only completes an earlier one.
    """
    marker = Path(config.run.dir) / COMPLETED
    replace = fence.replace if fence else write_atomically
    with user_errors(marker), fence.guard() if fence else nullcontext():
        if not marker.exists():
            replace(marker, f"{config.end}\n")


def _is_ours(run_dir: Path) -> bool:
    """Whether the run's newest start belongs to this process's submission."""
    launch = read_job_id()
    return bool(launch) and newest_start(run_dir).get("launch") == launch


def _holder(run_dir: Path) -> str:
    start = newest_start(run_dir)
    job = f" of job {start['slurm_job_id']}" if "slurm_job_id" in start else ""
    return f"a run{job} on {start.get('host')} (pid {start.get('pid')})" if start else "another run"


def start_logging(run_dir: Path, rank_info: RankInfo, start: int) -> None:
    """Send the log lines of all libraries to logs/rank-NNNNN.log, and warnings of mythos_dist on rank 0 to stderr.

    Raises UserError if the file cannot be opened.
    """
    with user_errors(run_dir / "logs"):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(run_dir / "logs" / f"rank-{rank_info.rank:05d}.log")
    to_file.setFormatter(
        logging.Formatter(f"%(asctime)s {rank_info.node} start {start} %(levelname)s %(name)s: %(message)s")
    )
    logging.captureWarnings(True)  # deprecation warnings inside DeepSpeed and torch go to the log only
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers = [to_file]
    if rank_info.rank == 0:
        to_console = logging.StreamHandler(sys.stderr)
        to_console.setLevel(logging.WARNING)
        to_console.addFilter(lambda record: record.name.startswith("mythos_dist"))
        to_console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(to_console)
    for name in list(logging.root.manager.loggerDict):  # DeepSpeed's logger has its own console handler
        logger = logging.getLogger(name)
        if name.split(".")[0] in ("DeepSpeed", "deepspeed", "streaming"):
            logger.handlers, logger.propagate = [], True
