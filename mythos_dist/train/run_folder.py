"""The run folder: its config, its logs, and the refusal to mix two runs in one folder."""

import fcntl
import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from mythos_dist.checkpoint.fence import newest_start
from mythos_dist.cluster.place import Place, launch_of
from mythos_dist.config.compare import differences
from mythos_dist.config.deepspeed import deepspeed_config
from mythos_dist.config.load import dump_config, load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError

log = logging.getLogger(__name__)


def check_run_folder(config: Config) -> None:
    """Raise UserError when `run.dir` holds a run of another config, naming each setting that differs."""
    path = Path(config.run.dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"run.dir={config.run.dir} is a file; name a folder")
    if not (path / "config.yaml").exists():
        return
    before = asdict(load_config(path / "config.yaml"))
    found = [
        f"{name}={value}, but the run in run.dir={path} has {old}" for name, value, old in differences(config, before)
    ]
    if found:
        raise UserError([*found, "set these back to go on with that run, or give another run.dir"])


def claim_run_folder(config: Config, num_replicas: int) -> TextIO:
    """Make `run.dir` this process's (rank 0's) as long as the returned file is open; write config and DeepSpeed's JSON.

    Ranks outlive a launcher that is killed, so the same command given again may meet the old run, still writing:
    that raises UserError. But a later start of the same submission takes over: its scheduler has given the old one up,
    and whatever is left of it meets the fence.
    """
    path = Path(config.run.dir)
    path.mkdir(parents=True, exist_ok=True)
    file = path / "writer.lock"
    lock = _locked(file)
    if lock is None and _is_ours(path):
        for _ in range(20):  # it may be on its way out
            time.sleep(0.25)
            if lock := _locked(file):
                break
        else:
            log.warning("a rank 0 of an earlier start still holds %s: it is cut off, and this start takes over", path)
            file.unlink(missing_ok=True)
            lock = _locked(file)
    if lock is None:
        raise UserError(
            f"run.dir={path} is in use: {_holder(path)} writes there; stop its ranks, or give another run.dir"
        )
    (path / "config.yaml").write_text(dump_config(config))
    (path / "deepspeed.json").write_text(json.dumps(deepspeed_config(config, num_replicas), indent=2) + "\n")
    return lock


def _locked(file: Path) -> TextIO | None:
    """`file`, open and locked; None if another process has the lock."""
    lock = file.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _is_ours(run_dir: Path) -> bool:
    """Whether the run's newest start belongs to this process's submission."""
    launch = launch_of()
    return bool(launch) and newest_start(run_dir).get("launch") == launch


def _holder(run_dir: Path) -> str:
    about = newest_start(run_dir)
    job = f" of job {about['slurm_job_id']}" if "slurm_job_id" in about else ""
    return f"a run{job} on {about['host']} (pid {about['pid']})" if about else "another run"


def start_logging(run_dir: Path, place: Place, start: int) -> None:
    """Send every library's log lines to logs/rank-NNNNN.log; the console gets our warnings, from rank 0."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(run_dir / "logs" / f"rank-{place.rank:05d}.log")
    to_file.setFormatter(
        logging.Formatter(f"%(asctime)s {place.node} start {start} %(levelname)s %(name)s: %(message)s")
    )
    logging.captureWarnings(True)  # deprecations inside DeepSpeed and torch are for the log, not for the console
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers = [to_file]
    if place.rank == 0:
        to_console = logging.StreamHandler(sys.stderr)
        to_console.setLevel(logging.WARNING)
        to_console.addFilter(lambda record: record.name.startswith("mythos_dist"))
        to_console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(to_console)
    for name in list(logging.root.manager.loggerDict):  # DeepSpeed's logger brings a console handler of its own
        logger = logging.getLogger(name)
        if name.split(".")[0] in ("DeepSpeed", "deepspeed", "streaming"):
            logger.handlers, logger.propagate = [], True
