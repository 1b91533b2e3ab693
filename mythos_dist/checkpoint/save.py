"""Save checkpoints in the background: copy the state to host memory, write it in a thread, publish it when complete.

    checkpoints/step-00000010.tmp-3/    being written by start 3 of the run: a file of tensors per rank
    checkpoints/step-00000010/          complete: every file is on disk, and checkpoint.json has their hashes
    checkpoints/latest                  the name of the checkpoint to resume from

Each rank writes rank-NNNNN.safetensors with the pieces that it holds, as they are in its memory: nothing is gathered or
resharded. Where several ranks hold the same piece, one of them writes it (`LocalShard.writes`). Rank 0 lists the piece
of each tensor in each file in checkpoint.json; from that list any layout finds its elements (`pieces.py`).

The writer threads run no collectives. The main threads agree between two steps that all of them have finished; rank 0
then writes the manifest, renames the folder and updates `latest`. A run that ends earlier leaves a folder that is not
read as a checkpoint. The trap: a rank with a full disk must not leave the others waiting, so a failed write is
reported like a success; the run continues, and the previous checkpoint stays the newest.

Decisions: CHECKPOINT-3, CHECKPOINT-7, CHECKPOINT-8.
"""

import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import CheckpointManifest, FileEntry, LocalShards, TensorEntry
from mythos_dist.checkpoint.names import is_pinned, remove_checkpoint, temporary_name
from mythos_dist.checkpoint.publish import prune, publish
from mythos_dist.checkpoint.reader import checkpoints_of
from mythos_dist.checkpoint.signature import signing_key
from mythos_dist.checkpoint.tensor_file import write_tensors
from mythos_dist.config.schema import CheckpointConfig
from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, reason, user_errors
from mythos_dist.parallel.process import any_rank, on_rank_0, raise_on_all_ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    file: FileEntry | None = None  # None: this rank has nothing to write, or failed
    tensors: dict[str, TensorEntry] = field(default_factory=dict)  # in the file
    problem: str = ""


class Saver:
    """Writes a run's checkpoints. Every rank has one and calls the same methods in the same order."""

    def __init__(
        self,
        checkpoints: Path,
        settings: CheckpointConfig,
        fence: Fence,
        shards: LocalShards,
        on_progress: Callable[[], None] = lambda: None,
        is_waiting: Callable[[int], bool] = lambda step: False,
    ):
        """`shards`: views that stay valid until the run ends; `save` reads them.

        `on_progress` is called repeatedly while training waits for a save that makes progress. `is_waiting`: on rank 0,
        whether a step's checkpoint waits for its upload.
        """
        self._folder, self._settings, self._fence = checkpoints, settings, fence
        self._shards = {name: shard for name, shard in shards.items() if shard.writes}
        self._copies: dict[str, Tensor] = {}  # in host memory; empty: tensors are written from the views themselves
        self._thread: threading.Thread | None = None
        self._written = _Written()
        self._saving: CheckpointManifest | None = None
        self._last_is_complete = True
        self._on_progress, self._tensors_written, self._is_waiting = on_progress, 0, is_waiting
        self._pruned_for: CheckpointManifest | None = None  # on rank 0: the newest checkpoint that was published
        self.newest: int | None = None  # step of the newest state that was saved or loaded, published or not
        self.published: int | None = None  # step of the newest published checkpoint
        self.publications = 0  # by this start
        self._key = raise_on_all_ranks(lambda: signing_key(settings.key_file))
        on_rank_0(self._prepare_folder)
        if settings.background:
            # In advance: copying to memory that was never touched is twenty times slower.
            self._thread = threading.Thread(target=self._allocate_copies, daemon=True)
            self._thread.start()

    def _prepare_folder(self) -> None:
        """On rank 0: create the folder. Raises UserError if it cannot."""
        try:
            make_folders(self._folder)
        except OSError as error:
            raise UserError(f"cannot be written ({reason(error)}); checkpoints go there", str(self._folder)) from None

    def save(self, manifest: CheckpointManifest) -> None:
        """Begin to save the current state, after finishing an earlier save; `manifest` has no tensors and files yet."""
        self.finish()
        if self._copies:
            for key, value in self._values():
                self._copies[key].copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._saving, self._written, self.newest = manifest, _Written(), manifest.step
        self._thread = threading.Thread(target=self._write, args=(self._temporary(manifest),), daemon=True)
        self._thread.start()
        if not self._settings.background:
            self.finish()
        elif not self._copies:
            self._wait(self._thread)  # this rank's values must not change until they are on disk

    def poll(self) -> None:
        """Between two steps: publish the checkpoint that is being saved if every rank has written its file."""
        if self._saving is None:
            return
        if not any_rank(self._thread is not None and self._thread.is_alive()):
            self.finish()

    def finish(self) -> bool:
        """Wait for the save in progress and publish it. Returns whether the last save succeeded, equal on all ranks."""
        if self._thread is not None:
            self._wait(self._thread)
            self._thread = None
        if self._saving is None:
            return self._last_is_complete
        manifest, self._saving = self._saving, None
        rank = dist.get_rank()
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(self._written, of_ranks if rank == 0 else None)
        published = on_rank_0(lambda: self._publish(manifest, of_ranks))
        self._last_is_complete = any_rank(bool(published))
        if self._last_is_complete:
            self.published = manifest.step
            self.publications += 1
        return self._last_is_complete

    def prune(self) -> None:
        """On rank 0: delete the checkpoints that are not needed any more, since a newer one was published or they were
        uploaded. Raises OSError if the folder cannot be listed."""
        if self._pruned_for:
            _prune(self._folder, self._pruned_for, self._settings, self._is_waiting)

    def _wait(self, thread: threading.Thread) -> None:
        reported = -1
        while thread.is_alive():
            if self._tensors_written != reported:
                reported = self._tensors_written
                self._on_progress()
            thread.join(1.0)

    def _allocate_copies(self) -> None:
        """In a thread: host memory for a copy of what this rank writes."""
        pinned = torch.cuda.is_available()
        try:
            self._copies = {
                key: torch.zeros(value.shape, dtype=value.dtype, pin_memory=pinned) for key, value in self._values()
            }
        except RuntimeError as error:
            log.warning("no host memory for a copy of the state (%s): training waits while it is written", error)

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of this rank's file, in order."""
        for name, shard in self._shards.items():
            for kind, value in shard.values.items():
                yield f"{kind}/{name}", value

    def _temporary(self, manifest: CheckpointManifest) -> Path:
        return self._folder / temporary_name(manifest.step, self._fence.start)

    def _write(self, folder: Path) -> None:
        """In the thread: write this rank's file."""
        try:
            self._written = self._write_file(folder)
        except OSError as error:
            self._written = _Written(problem=f"rank {dist.get_rank()}: {error}")
        except BaseException as error:
            log.exception("saving failed")
            self._written = _Written(problem=f"rank {dist.get_rank()}: {type(error).__name__}: {error}")

    def _write_file(self, folder: Path) -> _Written:
        if not self._shards:
            return _Written()
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {key: tuple(value.shape) for key, value in self._values()}

        def blocks() -> Iterator[memoryview]:
            for key, value in self._values():
                yield self._copies.get(key, value).detach().cpu().numpy().data
                self._tensors_written += 1

        sha256 = hashlib.sha256() if self._key else None
        size, digest = write_tensors(folder / file_name(dist.get_rank()), shapes, blocks(), sha256=sha256)
        pieces = {name: shard.piece for name, shard in self._shards.items()}
        tensors = {name: TensorEntry(shard.full_shape, tuple(shard.values)) for name, shard in self._shards.items()}
        return _Written(FileEntry(size, digest, pieces, sha256.hexdigest() if sha256 else None), tensors)

    def _publish(self, manifest: CheckpointManifest, of_ranks: Sequence[_Written]) -> bool:
        """On rank 0: publish what all ranks wrote. Raises UserError if a newer start took the run over."""
        temporary = self._temporary(manifest)
        problems = [written.problem for written in of_ranks if written.problem]
        try:
            if not problems:
                files, tensors = {}, {}
                for rank, written in enumerate(of_ranks):
                    if written.file:
                        files[file_name(rank)] = written.file
                        tensors |= written.tensors
                manifest = replace(manifest, files=files, tensors=tensors)
                with self._fence.guard():
                    publish(temporary, manifest, self._key, self._fence.check)
                self._pruned_for = manifest
                self.prune()
        except OSError as error:
            problems = [f"rank 0: {error}"]
        if problems:
            with suppress(OSError):  # the next start tries again
                remove_checkpoint(temporary)
            log.warning(
                "the checkpoint of step %d could not be written (%s); training continues, and would resume from %s",
                manifest.step,
                "; ".join(problems[:3]),
                self._resume_point(),
            )
        return not problems

    def _resume_point(self) -> str:
        """For a message: what the run would resume from now."""
        try:
            checkpoints = checkpoints_of(self._folder)
        except UserError as error:
            return f"nothing: {error}"
        return checkpoints[0].name if checkpoints else "its beginning"


def file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def prune_complete_run(
    folder: Path, newest: CheckpointManifest, settings: CheckpointConfig, is_waiting: Callable[[int], bool]
) -> None:
    """For a run that is complete and so creates no `Saver`: as a `Saver` does, delete checkpoints beyond
    `settings.keep`. Raises UserError if the folder cannot be read."""
    with user_errors(folder):
        _prune(folder, newest, settings, is_waiting)


def _prune(
    folder: Path,
    newest: CheckpointManifest,
    settings: CheckpointConfig,
    is_waiting: Callable[[int], bool] = lambda step: False,
) -> None:
    pinned = functools.partial(is_pinned, pin=settings.pin, pin_every=settings.pin_every)
    prune(folder, newest, settings.keep, pinned, is_waiting, settings.remote_backlog)


def is_due(step: int, last_step: int, settings: CheckpointConfig) -> bool:
    """Whether a checkpoint is saved after a step."""
    return step == last_step or step % settings.every == 0 or is_pinned(step, settings.pin, settings.pin_every)
