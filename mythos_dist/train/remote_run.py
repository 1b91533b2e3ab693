"""A run whose checkpoints are copied to a store: which run is there, and its files if the local folder is gone.

A run without a checkpoint in `run.dir` resumes from the newest complete one in `checkpoint.remote`; each rank reads
the ranges that it needs from there. Its logs, excluded batches and number of starts are copied into the new folder
first, so that they continue. A store that cannot be reached stops a start only if the run might have to resume from it.

Decisions: CHECKPOINT-17.
"""

import json
import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_dist.checkpoint.fence import FILE as LOCAL_WRITER
from mythos_dist.checkpoint.fence import newest_start
from mythos_dist.checkpoint.reader import checkpoints_of
from mythos_dist.checkpoint.remote import (
    CHECKPOINTS,
    LOGS,
    MAX_LOG_BYTES,
    STATE,
    RemoteState,
    read_state,
    read_writer,
)
from mythos_dist.config.compare import differences
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError, first_line
from mythos_dist.files import get_number, user_errors, write_atomically
from mythos_dist.parallel.process_identity import is_running
from mythos_dist.store.fetch import Unavailable, read_object
from mythos_dist.urls import join_url

log = logging.getLogger(__name__)


def join_remote(config: Config, resumes_from_store: bool) -> str:
    """On rank 0, which holds the folder's lock: the id of the run, after a check that the store holds the same run; ""
    without `checkpoint.remote`. Copies the run's files into a folder that lacks them.

    Raises UserError if another run is in the store, or if this one was continued in another folder.
    """
    url, run_dir = config.checkpoint.remote, Path(config.run.dir)
    if url is None:
        return ""
    state, has_checkpoints = read_state(run_dir), bool(checkpoints_of(run_dir / CHECKPOINTS))
    try:
        writer = read_writer(url)
    except Unavailable as error:
        if not has_checkpoints:
            raise  # it may hold checkpoints of this run
        log.warning("checkpoint.remote: %s; training begins without it", first_line(error))
        writer = None
    run = state.run if state else RemoteState().run
    if writer:
        _check(config, writer, state, has_checkpoints, resumes_from_store)
        if not has_checkpoints:
            run = writer["run"]
            _copy_files(run_dir, url, writer, resumes_from_store)
    with user_errors(run_dir):
        write_atomically(run_dir / STATE, RemoteState(run, url).to_text())
    return run


def _check(
    config: Config, writer: dict[str, Any], state: RemoteState | None, has_checkpoints: bool, resumes: bool
) -> None:
    """Raises UserError if the run that `writer` describes, which is in the store, is not the one in the folder."""
    url, run_dir = config.checkpoint.remote or "", Path(config.run.dir)
    where = f"{writer.get('run_dir', '?')} on {writer.get('host', '?')}"
    if (has_checkpoints or state) and (state is None or state.run != writer["run"]):
        raise UserError(
            f"checkpoint.remote={url} holds the run of {where}, which is not the one in run.dir={run_dir}; give each "
            "run a folder of its own in the store, or to resume that run, a run.dir without checkpoints"
        )
    if has_checkpoints and writer["start"] > newest_start(run_dir).get("start", 0):
        raise UserError(
            f"start {writer['start']} of this run has continued it in {where}, after the checkpoints in "
            f"run.dir={run_dir}; to resume from checkpoint.remote={url}, give a run.dir without checkpoints"
        )
    if has_checkpoints:
        return
    if writer.get("state") == "running" and writer.get("run_dir") != str(run_dir.resolve()) and is_running(writer):
        raise UserError(
            f"checkpoint.remote={url} is in use: the run in {where} (pid {writer.get('pid')}) writes there; stop it, "
            "or give this run a folder of its own in the store"
        )
    if not resumes:
        _check_config(config, url)


def _check_config(config: Config, url: str) -> None:
    """Refuse the URL of a run with other settings that has not uploaded a checkpoint yet. Raises UserError."""
    content = _read(url, "config.yaml")
    if content is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_bytes(content)
        old_settings = asdict(load_config(file))
    problems = [
        f"{name}={value}, but the run in checkpoint.remote={url} has {old}"
        for name, old, value in differences(old_settings, config)
    ]
    if problems:
        raise UserError([*problems, "set these back to resume that run, or give another URL"])


def _copy_files(run_dir: Path, url: str, writer: dict[str, Any], resumes: bool) -> None:
    """Files of the run that are not in its folder. Those of a folder that was in use until now are newer."""
    for name in LOGS if resumes else ():
        if not (run_dir / name).exists() and (content := _read(url, name)) is not None:
            with user_errors(run_dir / name):
                write_atomically(run_dir / name, content)
    if writer["start"] > newest_start(run_dir).get("start", 0):  # starts continue to count
        file, time = run_dir / LOCAL_WRITER, get_number(writer, "time")
        with user_errors(file):
            write_atomically(file, json.dumps(writer) + "\n")
            if time is not None:
                os.utime(file, (time, time))  # the heartbeat: it was not alive now


def _read(url: str, name: str) -> bytes | None:
    """A file of the run in the store; None if there is none. Raises Unavailable."""
    try:
        return read_object(join_url(url, name), MAX_LOG_BYTES)
    except Unavailable as error:
        if error.missing:
            return None
        raise
