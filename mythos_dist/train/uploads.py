"""The uploads of a run's checkpoints to `checkpoint.remote`, as the training loop sees them.

The first rank of each node has a process that uploads (`checkpoint/upload_process.py`). The loop tells it of each
published checkpoint and reads, between two steps, what has happened; it never waits for it before the run ends. Rank 0
reports: a warning when uploads begin to fail, a line when they work again, entries in metrics.jsonl, and `remote.json`
in the run folder.

Decisions: CHECKPOINT-15.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.names import MANIFEST_FILE, step_of
from mythos_dist.checkpoint.reader import checkpoints_of
from mythos_dist.checkpoint.remote import CHECKPOINTS, STATE, RemoteState, UploadSettings
from mythos_dist.checkpoint.upload_process import UploadProcess
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.parallel.process import any_rank, from_rank_0
from mythos_dist.train.session import Session
from mythos_dist.units import count, format_duration, short

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2  # while the run waits for its last uploads


class RunUploads:
    """Every rank has one and calls the same methods in the same order; without `checkpoint.remote` they do nothing."""

    def __init__(self, config: Config, session: Session, fence: Fence, run_id: str):
        """run_id: of the run in `checkpoint.remote`."""
        settings, nodes, rank = config.checkpoint, session.nodes, dist.get_rank()
        self._session, self._fence, self._run_dir = session, fence, Path(config.run.dir)
        self._limits = settings.remote_wait, settings.remote_wait_stopped
        self._process: UploadProcess | None = None
        self._uploaded: set[int] = set()
        self._superseded = False  # another start or run writes to the store
        self._idle = False  # the process has nothing more to do
        self._entries: dict[str, Any] = {}  # for the next line of metrics.jsonl
        self._state = RemoteState(run_id, settings.remote or "") if settings.remote else None
        if settings.remote is None:
            return
        token = from_rank_0(lambda: fence.token)
        if nodes.index(nodes[rank]) == rank:
            names = list(dict.fromkeys(nodes))
            self._process = UploadProcess(
                UploadSettings(
                    run_dir=str(self._run_dir.resolve()),
                    url=settings.remote,
                    run=run_id,
                    start=fence.start,
                    token=token,
                    node=names.index(nodes[rank]),
                    nodes=len(names),
                    keep=settings.remote_keep,
                    pin=settings.pin,
                    pin_every=settings.pin_every,
                )
            )
        if rank == 0:
            self._write_state()

    def is_waiting(self, step: int) -> bool:
        """On rank 0: whether the local checkpoint of a step is to be uploaded, and is not yet."""
        return self._state is not None and not self._superseded and step not in self._uploaded

    def add(self, step: int | None) -> None:
        """The checkpoint of a step was published."""
        if self._process is not None and step is not None:
            self._uploaded.discard(step)
            self._idle = False
            self._process.notify()
            self._write_state()

    def poll(self) -> bool:
        """Read what has happened, and report it. Returns whether a checkpoint was uploaded."""
        events = self._process.poll() if self._process else []
        for event in events:
            self._handle(event)
        if events:
            self._write_state()
        return any(event["event"] in ("uploaded", "present") for event in events)

    def take_entries(self) -> dict[str, Any]:
        """On rank 0: what has happened since the last call, for the step's line in metrics.jsonl."""
        entries, self._entries = self._entries, {}
        return entries

    def finish(self, stopped: bool) -> None:
        """Wait for the last uploads for a limited time, and log what is not uploaded; then end the process."""
        if self._state is None:
            return
        limit, began = self._limits[stopped], time.monotonic()
        self._session.enter_phase("uploading the last checkpoints")
        self.poll()
        if dist.get_rank() == 0 and (waiting := self._waiting()):
            text = f"uploading {_steps(waiting)} to {self._state.url}, for at most {format_duration(limit)}"
            print(text, flush=True)
        while any_rank(dist.get_rank() == 0 and self._is_busy() and time.monotonic() - began < limit):
            self._session.heartbeat()
            time.sleep(_POLL_SECONDS)
            self.poll()
        if dist.get_rank() == 0 and (waiting := self._waiting(after_all=True)):
            why = self._state.problem or f"it takes more than {format_duration(limit)}"
            log.warning(
                "%s not uploaded to %s (%s); they are in %s, and the same command uploads them",
                f"{_steps(waiting)} {'was' if len(waiting) == 1 else 'were'}",
                self._state.url,
                why,
                self._run_dir,
            )
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _is_busy(self) -> bool:
        """On rank 0: whether there is something to upload, or to remove from the store."""
        return not self._superseded and (not self._idle or bool(self._waiting()))

    def _waiting(self, after_all: bool = False) -> list[int]:
        """Steps of local checkpoints that wait for their upload; `after_all`: also if it has ended for good."""
        if self._superseded and not after_all:
            return []
        try:
            folders = checkpoints_of(self._run_dir / CHECKPOINTS)
        except UserError:  # the run reports it when it saves
            return []
        steps = (step_of(folder.name) for folder in folders if (folder / MANIFEST_FILE).is_file())
        return sorted(step for step in steps if step is not None and step not in self._uploaded)

    def _handle(self, event: dict[str, Any]) -> None:
        state, kind = self._state, event["event"]
        assert state is not None
        if kind in ("uploaded", "present"):
            self._uploaded.add(event["step"])
            if state.uploaded is None or event["step"] >= state.uploaded:
                state.uploaded, state.uploaded_time = event["step"], time.time()
            if kind == "uploaded":
                rate = event["bytes"] / max(event["seconds"], 1e-3)
                log.info("step %d was uploaded in %.1f s (%sB/s)", event["step"], event["seconds"], short(rate))
                uploads = self._entries.setdefault("uploads", [])
                uploads.append({key: event[key] for key in ("step", "bytes", "seconds")})
        elif kind in ("failed", "superseded"):
            self._superseded = self._superseded or kind == "superseded"
            if state.problem != event["reason"]:
                self._entries["upload_problem"] = event["reason"]
                later = "the upload is tried again" if kind == "failed" else "this start uploads nothing more"
                level = logging.INFO if state.problem and kind == "failed" else logging.WARNING
                waits = "" if kind == "superseded" else f"; {count(len(self._waiting()), 'checkpoint')} waiting"
                log.log(level, "checkpoint.remote: %s; training continues, %s%s", event["reason"], later, waits)
            state.problem = event["reason"]
        elif kind == "damaged":
            self._uploaded.add(event["step"])
            log.warning("the checkpoint of step %d cannot be uploaded: %s", event["step"], event["reason"])
        self._idle = kind == "idle"
        if kind in ("uploaded", "present", "idle") and state.problem:
            if dist.get_rank() == 0:
                print(f"checkpoint.remote: uploads to {state.url} work again", flush=True)
            state.problem = ""

    def _write_state(self) -> None:
        """On rank 0: write remote.json; a failure is not the run's."""
        if dist.get_rank() == 0 and self._state is not None:
            self._state.waiting = self._waiting(after_all=True)
            with suppress(OSError, UserError):
                self._fence.replace(self._run_dir / STATE, self._state.to_text())


def _steps(steps: Sequence[int]) -> str:
    some = ", ".join(map(str, steps[:5])) + (" and more" if len(steps) > 5 else "")
    return f"the checkpoint of step {some}" if len(steps) == 1 else f"the checkpoints of steps {some}"
