"""The copy of a run in a store (`checkpoint.remote`): its files, and which run and start it belongs to.

    URL/writer.json                       the run's id and its newest start, like writer.json in the run folder
    URL/config.yaml, metrics.jsonl, ...   as they were in the run folder when the newest checkpoint was uploaded
    URL/checkpoints/step-00000010/        the files of a checkpoint, complete once checkpoint.json is there

`URL/` is laid out like a run folder. The id is drawn when a run first writes to a store, and kept in its folder in
`remote.json`: a second run that is given the same URL by mistake is refused, and so is one whose folder was continued
elsewhere.

Decisions: CHECKPOINT-16, CHECKPOINT-17.
"""

import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mythos_dist.errors import UserError
from mythos_dist.store.fetch import START_PATIENCE, Unavailable, read_object
from mythos_dist.urls import join_url

CHECKPOINTS, WRITER, STATE = "checkpoints", "writer.json", "remote.json"
# What a run whose folder is lost needs besides a checkpoint, so that its files continue.
LOGS = ("config.yaml", "metrics.jsonl", "eval.jsonl", "restarts.jsonl", "rollbacks.json")
MAX_LOG_BYTES = 1 << 34
_MAX_WRITER_BYTES = 1 << 20


@dataclass(frozen=True)
class UploadSettings:
    """What the process that uploads a run's checkpoints needs to know."""

    run_dir: str
    url: str
    run: str  # the run's id
    start: int
    token: str  # of the start
    node: int = 0  # index of this node among `nodes`; the process of node 0 writes the manifests
    nodes: int = 1
    keep: int | None = None  # checkpoint.remote_keep
    pin: tuple[int, ...] = ()
    pin_every: int = 0

    def to_text(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> "UploadSettings":
        """The inverse of `to_text`."""
        raw = json.loads(text)
        return UploadSettings(**raw | {"pin": tuple(raw["pin"])})


@dataclass
class RemoteState:
    """The content of `remote.json` in the run folder: the run's id, and how far its uploads are."""

    run: str = field(default_factory=lambda: secrets.token_hex(8))
    url: str = ""
    uploaded: int | None = None  # step of the newest checkpoint that is in the store
    uploaded_time: float | None = None  # unix seconds
    waiting: list[int] = field(default_factory=list)  # steps of local checkpoints that are not there yet
    problem: str = ""  # why uploads fail at the moment

    def to_text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self)) + "\n"


def read_state(run_dir: Path) -> RemoteState | None:
    """None if the run has not written to a store, or if the file is damaged."""
    try:
        raw = json.loads((run_dir / STATE).read_bytes())
        state = RemoteState(**{key: raw[key] for key in RemoteState.__dataclass_fields__})
        return state if isinstance(state.run, str) and isinstance(state.waiting, list) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def read_writer(url: str, patience: float = START_PATIENCE) -> dict[str, Any] | None:
    """The run and the newest start that write to `url`; None if no run has. Raises Unavailable, UserError if it is
    damaged."""
    file = join_url(url, WRITER)
    try:
        about = json.loads(read_object(file, _MAX_WRITER_BYTES, patience))
        if isinstance(about["run"], str) and isinstance(about["start"], int) and isinstance(about["token"], str):
            return about
    except Unavailable as error:
        if error.missing:
            return None
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError("is damaged, or no file of mythos_dist; set checkpoint.remote to another folder", file)


def step_url(url: str, name: str) -> str:
    """The URL of the checkpoint `name` of the run at `url`."""
    return join_url(url, CHECKPOINTS, name)
