"""Sinks: where rank 0 sends metrics besides metrics.jsonl and eval.jsonl, that is Weights & Biases and TensorBoard.

A sink that fails gets one warning and nothing more: training never depends on one. Further sinks are subclasses of
`Sink` with a line in `_SINKS`.

Decisions: PROJECT-10.
"""

import dataclasses
import hashlib
import logging
import os
import secrets
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mythos_dist.config.dump import dump_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError, first_line, redact
from mythos_dist.files import write_atomically

log = logging.getLogger(__name__)

WANDB_ID = "wandb_id"  # file in the run folder: the id of the run in Weights & Biases
TENSORBOARD = "tensorboard"  # folder in the run folder


class Sink:
    """Receives the lines of metrics.jsonl and eval.jsonl. An exception of any method ends the sink, not the run."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """`values`: a line without its step; several lines may have the same step."""
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """The steps after `step` are trained again."""

    def flush(self) -> None:
        """Called before a checkpoint: what was logged should survive the end of this process."""

    def close(self) -> None:
        """Close the sink: nothing more is logged in this start."""


class WandbSink(Sink):
    """A run in Weights & Biases, which every start of our run continues.

    The trap: wandb ignores steps that are not above its last one. After a resume repeated steps have equal values, but
    after a rollback it misses those up to where the run was.
    """

    def __init__(self, config: Config, run_dir: Path, resumed_step: int):
        self._run = _init_wandb(config, run_dir)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink(Sink):
    """Event files in run.dir/tensorboard: every number of a line as a scalar, also those inside sections, such as
    `planned/memory_gb`.

    Lists, such as telemetry by loop, are left out: a curve for each loop of each quantity would be hundreds.
    """

    def __init__(self, config: Config, run_dir: Path, resumed_step: int):
        self._folder = run_dir / TENSORBOARD
        self._writer = self._open(resumed_step)
        self._writer.add_text("config", _as_markdown(redact(dump_config(config))), resumed_step)

    def _open(self, resumed_step: int) -> Any:
        from torch.utils.tensorboard.writer import SummaryWriter

        # TensorBoard drops earlier events from `purge_step` on, evaluations before the first step included.
        return SummaryWriter(self._folder, purge_step=resumed_step + 1 if resumed_step else 0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in scalars(values):
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


_SINKS: dict[str, tuple[Callable[[Config], bool], type[WandbSink] | type[TensorBoardSink]]] = {
    "wandb": (lambda config: os.environ.get("WANDB_MODE", config.run.wandb) != "disabled", WandbSink),
    "TensorBoard": (lambda config: config.run.tensorboard, TensorBoardSink),
}


class Sinks:
    """All sinks of a run, on rank 0. No method raises."""

    def __init__(self, config: Config, run_dir: Path, resumed_step: int):
        """Open those that the config asks for."""
        self._sinks: dict[str, Sink] = {}
        for name, (wanted, sink) in _SINKS.items():
            if wanted(config):
                try:
                    self._sinks[name] = sink(config, run_dir, resumed_step)
                except Exception as error:
                    _warn(name, error)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send a line to every sink."""
        self._call(lambda sink: sink.log(step, values))

    def rewind(self, step: int) -> None:
        """The steps after `step` are trained again."""
        self._call(lambda sink: sink.rewind(step))

    def flush(self) -> None:
        """Before a checkpoint."""
        self._call(lambda sink: sink.flush())

    def close(self) -> None:
        """End all."""
        self._call(lambda sink: sink.close())
        self._sinks = {}

    def _call(self, use: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                use(sink)
            except Exception as error:
                del self._sinks[name]
                _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    kind = type(error).__name__
    log.warning(
        "%s failed and gets no more metrics in this start (%s: %s); metrics.jsonl has them",
        name, kind, redact(first_line(error)),
    )  # fmt: skip
    log.info("%s", redact("".join(traceback.format_exception(error))))


def check_sinks(config: Config) -> None:
    """UserError if a package that a setting asks for is not installed."""
    if config.run.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "run.tensorboard=true needs the package tensorboard, which is not installed: pip install tensorboard, or "
            "set it to false"
        )


def scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a line of metrics by name; those of a section as section/name. Truth values are 0 and 1."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{key}", float(value)


def _as_markdown(text: str) -> str:
    """A block of code."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _init_wandb(config: Config, run_dir: Path) -> Any:
    """A run of wandb. Offline mode does not use the network; online mode falls back to offline without one."""
    import wandb

    mode = os.environ.get("WANDB_MODE", config.run.wandb)
    if mode == "online" and not _is_reachable("api.wandb.ai"):
        log.warning("wandb: api.wandb.ai cannot be reached; recording offline (upload later with `wandb sync`)")
        mode = "offline"
    run_id = wandb_id(run_dir)

    def start(mode: Literal["online", "offline"]):
        return wandb.init(
            mode=mode,
            project=config.run.project,
            group=config.run.group or None,
            tags=config.run.tags or None,
            name=run_dir.name,
            id=run_id,
            resume="allow",
            config=_redacted(dataclasses.asdict(config)),
            allow_val_change=True,  # a resumed run may have other values
            dir=run_dir,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30),
        )

    if mode == "online":
        try:
            return start("online")
        except wandb.Error as error:  # not logged in, or the server does not answer
            log.warning("wandb: %s; recording offline (upload later with `wandb sync`)", error)
    return start("offline")


def wandb_id(run_dir: Path) -> str:
    """The id of the run in wandb, kept in the run folder, so that each start continues the same wandb run, also if the
    folder has moved. Raises OSError."""
    file = run_dir / WANDB_ID
    if file.exists() and (recorded := file.read_text(encoding="utf-8").strip()):
        return recorded
    if (run_dir / "wandb").exists():  # of a version whose ids were hashes of the path
        run_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    else:
        run_id = secrets.token_hex(6)
    write_atomically(file, f"{run_id}\n")
    return run_id


def _redacted(value: Any) -> Any:
    """A config for others' eyes: URLs may hold passwords."""
    if isinstance(value, dict):
        return {redact(str(key)): _redacted(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(one) for one in value]
    return redact(value) if isinstance(value, str) else value


def _is_reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True
