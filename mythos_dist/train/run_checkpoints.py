"""A run's checkpoints: load one into the engine; save, upload and record those of this start, and delete old ones.

`resume.py` decides which one is loaded, `checkpoint/` how it is read and written.
"""

import contextlib
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import AVERAGE, MOMENTS, CheckpointManifest, Lineage, library_versions
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import load_state
from mythos_dist.checkpoint.save import Saver
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.parallel.process import on_rank_0, raise_on_all_ranks
from mythos_dist.progress import Bar
from mythos_dist.train.average import carried_snapshots
from mythos_dist.train.global_batch import tokens_at
from mythos_dist.train.session import Session
from mythos_dist.train.start_from import carried_optimizer_state
from mythos_dist.train.uploads import RunUploads

if TYPE_CHECKING:
    from mythos_dist.train.engine import Engine


def load_checkpoint(config: Config, session: Session, engine: "Engine", checkpoint: Checkpoint) -> list[float]:
    """Fill the engine with the state of a checkpoint of this run, and return the gradient norms of the steps before it,
    from which the limit on norms is computed."""
    manifest = checkpoint.manifest
    snapshots = carried_snapshots(config.average, manifest)
    _load_tensors(session, engine, checkpoint, leave_out=() if snapshots else (AVERAGE,))
    engine.after_load(manifest.optimizer, manifest.step, snapshots)
    return _recent_norms(checkpoint)


def load_parent(config: Config, session: Session, engine: "Engine", parent: Checkpoint) -> list[float]:
    """As `load_checkpoint`, of what `start_from_state` takes from the parent, or from the end of the stage before."""
    state = config.run.start_from_state
    _load_tensors(session, engine, parent, leave_out=(AVERAGE, *(MOMENTS if state == "weights" else ())))
    engine.after_load(carried_optimizer_state(parent, state), config.run.stage_begin)
    return _recent_norms(parent) if state == "everything" else []


def _load_tensors(session: Session, engine: "Engine", checkpoint: Checkpoint, leave_out: Collection[str]) -> None:
    """All kinds of tensors except those in `leave_out`, which become zero."""
    session.enter_phase("loading")
    shards = engine.local_shards
    size = sum(4 * value.numel() for shard in shards.values() for value in shard.values.values())
    with Bar("loading", size, quiet=dist.get_rank() > 0) as shown:

        def progress(size: int) -> None:
            session.heartbeat()
            shown.update(size)

        raise_on_all_ranks(lambda: load_state(checkpoint, shards, progress, leave_out))
    on_rank_0(checkpoint.raise_if_replaced)


def _recent_norms(checkpoint: Checkpoint) -> list[float]:
    return checkpoint.manifest.optimizer.get("recent_grad_norms", [])


class RunCheckpoints:
    """The checkpoints that this start saves. Every rank has one and calls the same methods in the same order."""

    def __init__(
        self, config: Config, session: Session, fence: Fence, engine: "Engine", remote_run_id: str, loaded: int | None
    ):
        """remote_run_id: in `checkpoint.remote`; "" without. loaded: step of the checkpoint that it resumes from."""
        self._fence, self._folder = fence, Path(config.run.dir) / "checkpoints"
        self.uploads = RunUploads(config, session, fence, remote_run_id)
        self.saver = Saver(
            self._folder, config.checkpoint, fence, engine.local_shards, session.heartbeat, self.uploads.is_waiting
        )
        self.saver.newest = self.saver.published = loaded
        self._recorded = 0  # publications that `_record` has seen

    def poll(self, step: int) -> None:
        """After step `step`: publish what every rank has written, begin its upload, and delete what was uploaded."""
        self.saver.poll()
        self._record(step)
        if self.uploads.poll():
            self._prune()

    def finish(self, step: int) -> None:
        """After `step`, the last one of this start: wait for the last save. Raises UserError if it has failed."""
        if not self.saver.finish():
            raise UserError(
                f"the last checkpoint could not be written to {self._folder}; fix that (free space on a full disk) and "
                "run the same command again; it resumes from the checkpoint before"
            )
        self._record(step)

    def finish_uploads(self, stopped: bool) -> None:
        """Wait for the last uploads, for a limited time. `stopped`: the run ends early."""
        self.uploads.finish(stopped)
        self._prune()

    def _record(self, step: int) -> None:
        """After a publication: begin its upload, and on rank 0 write its step to writer.json, so that later starts
        notice if it is gone."""
        if self.saver.publications == self._recorded:
            return
        self._recorded = self.saver.publications
        self.uploads.add(self.saver.published)
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError, UserError):
                self._fence.record_status("running", "", step, self.saver.published)

    def _prune(self) -> None:
        """On rank 0: delete checkpoints that were kept only until they were uploaded; a failure is not the run's."""
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                self.saver.prune()


def manifest_of(
    config: Config, step: int, fence: Fence, data: str, engine: "Engine", lineage: Lineage
) -> CheckpointManifest:
    """The manifest of a checkpoint after `step`; `data` is the fingerprint of the shards."""
    tokens = tokens_at(config, lineage, step)
    return CheckpointManifest(
        step=step,
        tokens=tokens,
        start=fence.start,
        layout={"ranks": dist.get_world_size(), **asdict(config.parallel)},
        config=asdict(config),
        data=data,
        versions=library_versions(),
        optimizer=engine.optimizer_state(),
        tensors={},  # filled when they are written, as are `files`
        files={},
        lineage=replace(lineage, tokens=lineage.tokens_before + tokens),
    )
