"""Save checkpoints without stopping the run: copy to host memory, write behind the training, publish when all is there.

    checkpoints/step-00000010.tmp-3/    start 3 of the run is writing: a file of tensors per rank
    checkpoints/step-00000010/          complete: every file is on disk, and checkpoint.json has their hashes
    checkpoints/latest                  the name of the one to resume from

A thread of each rank writes; it passes no collective. That all of them are done is agreed by the main threads, between
two steps, and rank 0 then writes the manifest, renames the folder and moves `latest`. Whatever ends the run before
that leaves a folder that nobody reads. The trap: a rank whose disk is full must not make the others wait, so a failure
is a result like any other; the run goes on, with the last good checkpoint.
"""

import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import Checkpoint, CheckpointManifest, FileEntry, TensorEntry, checkpoints_of
from mythos_dist.checkpoint.names import folder_name, remove
from mythos_dist.checkpoint.publish import prune, publish, remove_leftovers
from mythos_dist.checkpoint.signature import signing_key
from mythos_dist.checkpoint.state import State
from mythos_dist.checkpoint.tensor_file import write_tensors
from mythos_dist.config.schema import CheckpointConfig, Config
from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, reason, user_errors
from mythos_dist.parallel.process import any_rank, raise_on_all_ranks

log = logging.getLogger(__name__)


class Saver:
    """One run's writer of checkpoints. Every rank has one and calls the same methods in the same order."""

    def __init__(
        self,
        checkpoints: Path,
        settings: CheckpointConfig,
        fence: Fence,
        state: State,
        on_progress: Callable[[], None] = lambda: None,
    ):
        """`state`: views that stay valid as long as the run lasts; `save` reads them.

        `on_progress` is called now and then while training waits for a save that gets on.
        """
        self._folder, self._settings, self._fence = checkpoints, settings, fence
        self._writes = {name: held for name, held in state.items() if held.writes}
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._written: tuple[FileEntry | None, str | None] = (None, None)  # this rank's file; what went wrong
        self._saving: CheckpointManifest | None = None
        self._last_is_whole = True
        self._on_progress, self._tensors_written = on_progress, 0
        self.newest: int | None = None  # the step of the newest state that was saved (or loaded), whole or not yet
        self.published: int | None = None  # the step of the newest whole one
        self._key = raise_on_all_ranks(lambda: signing_key(settings.key_file))
        # The others wait in `together`, or rank 0 might remove what a faster rank has begun.
        raise_on_all_ranks(lambda: self._prepare() if dist.get_rank() == 0 else None)
        if settings.background:
            # Memory that was never touched comes at a twentieth of the speed at which it is copied to.
            self._thread = threading.Thread(target=self._make_room, daemon=True)
            self._thread.start()

    def _prepare(self) -> None:
        """On rank 0: make the folder, and remove what starts have left that ended while they wrote."""
        try:
            make_folders(self._folder)
            remove_leftovers(self._folder, self._fence.start)
        except OSError as error:
            raise UserError(f"cannot be written ({reason(error)}); checkpoints go there", str(self._folder)) from None

    def save(self, manifest: CheckpointManifest) -> None:
        """Begin to save the state as it is now; `manifest` is without tensors and files. First ends an earlier save."""
        self.finish()
        for key, value in self._values() if self._copies else ():
            self._copies[key].copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._saving, self._written, self.newest = manifest, (None, None), manifest.step
        self._thread = threading.Thread(target=self._write, args=(self._temporary(manifest),), daemon=True)
        self._thread.start()
        if not self._settings.background:
            self.finish()
        elif not self._copies:
            self._wait(self._thread)  # this rank's values must not change until they are on disk

    def poll(self) -> None:
        """Between two steps: publish what was being saved if every rank has written its part."""
        if self._saving is None:
            return
        if not any_rank(self._thread is not None and self._thread.is_alive()):
            self.finish()

    def finish(self) -> bool:
        """Wait until nothing is being saved. Returns whether the last save is whole; the same on every rank."""
        if self._thread is not None:
            self._wait(self._thread)
            self._thread = None
        if self._saving is None:
            return self._last_is_whole
        manifest, self._saving = self._saving, None
        rank = dist.get_rank()
        found: list[Any] = [None] * dist.get_world_size()
        shapes = {name: (held.whole, tuple(held.values)) for name, held in self._writes.items()}
        dist.gather_object((*self._written, shapes), found if rank == 0 else None)
        published = raise_on_all_ranks(lambda: rank == 0 and self._publish(manifest, found))
        self._last_is_whole = any_rank(published)
        if self._last_is_whole:
            self.published = manifest.step
        return self._last_is_whole

    def _wait(self, thread: threading.Thread) -> None:
        written = -1
        while thread.is_alive():
            if self._tensors_written != written:
                written = self._tensors_written
                self._on_progress()
            thread.join(1.0)

    def _make_room(self) -> None:
        """In a thread: host memory for a copy of what this rank writes."""
        pinned = torch.cuda.is_available()
        try:
            self._copies = {
                key: torch.zeros(value.shape, dtype=value.dtype, pin_memory=pinned) for key, value in self._values()
            }
        except RuntimeError as error:
            log.warning("no room for a copy of the state (%s): training waits while checkpoints are written", error)

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank's file holds, in order."""
        for name, held in self._writes.items():
            for kind, value in held.values.items():
                yield f"{kind}/{name}", value

    def _temporary(self, manifest: CheckpointManifest) -> Path:
        return self._folder / f"{folder_name(manifest.step)}.tmp-{self._fence.start}"

    def _write(self, folder: Path) -> None:
        """In the thread: this rank's file."""
        try:
            self._written = (self._write_file(folder), None)
        except OSError as error:
            self._written = (None, f"rank {dist.get_rank()}: {error}")
        except BaseException as error:
            log.exception("saving failed")
            self._written = (None, f"rank {dist.get_rank()}: {type(error).__name__}: {error}")

    def _write_file(self, folder: Path) -> FileEntry | None:
        if not self._writes:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {key: tuple(value.shape) for key, value in self._values()}
        copies = (self._copies.get(key, value) for key, value in self._values())

        def blocks() -> Iterator[memoryview]:
            for copy in copies:
                yield copy.detach().cpu().numpy().data
                self._tensors_written += 1

        sha256 = hashlib.sha256() if self._key else None
        size, digest = write_tensors(folder / file_name(dist.get_rank()), shapes, blocks(), sha256=sha256)
        pieces = {name: held.piece for name, held in self._writes.items()}
        return FileEntry(size, digest, pieces, sha256 and sha256.hexdigest())

    def _publish(
        self, manifest: CheckpointManifest, found: Sequence[tuple[FileEntry | None, str | None, dict]]
    ) -> bool:
        """On rank 0: make a checkpoint of what the ranks have written. Raises UserError if the run was taken over."""
        temporary = self._temporary(manifest)
        problems = [problem for _, problem, _ in found if problem]
        try:
            if not problems:
                files = {file_name(rank): file for rank, (file, *_) in enumerate(found) if file}
                tensors = {
                    name: TensorEntry(shape, kinds) for *_, shapes in found for name, (shape, kinds) in shapes.items()
                }
                manifest = replace(manifest, files=files, tensors=tensors)
                with self._fence.guard():
                    publish(temporary, manifest, self._key)
                _prune(self._folder, manifest, self._settings)
        except OSError as error:
            problems = [f"rank 0: {error}"]
        if problems:
            with suppress(OSError):  # the next start tries again
                remove(temporary)
            log.warning(
                "the checkpoint of step %d could not be written (%s); the run goes on, and would resume from %s",
                manifest.step,
                "; ".join(problems[:3]),
                self._last(),
            )
        return not problems

    def _last(self) -> str:
        """What the run would resume from, for a message."""
        try:
            return next((path.name for path in checkpoints_of(self._folder)), "its beginning")
        except UserError as error:
            return f"nothing: {error}"


def file_name(rank: int) -> str:
    """Of what a rank has written."""
    return f"rank-{rank:05d}.safetensors"


def clean_complete_run(newest: Checkpoint, settings: CheckpointConfig, start: int) -> None:
    """Remove what starts up to `start` left because they were killed, after the `newest` checkpoint too.

    For a complete run, which makes no Saver (that removes the same). Raises UserError if the folder cannot be read.
    """
    folder = newest.folder.parent
    with user_errors(folder):
        remove_leftovers(folder, start)
        _prune(folder, newest.manifest, settings)


def _prune(folder: Path, newest: CheckpointManifest, settings: CheckpointConfig) -> None:
    prune(folder, newest, settings.keep, functools.partial(is_pinned, settings=settings))


def is_pinned(step: int, settings: CheckpointConfig) -> bool:
    """Whether a step's checkpoint is saved and kept whatever else is."""
    return step in settings.pin or bool(settings.pin_every and step % settings.pin_every == 0)


def is_due(step: int, config: Config) -> bool:
    """Whether a checkpoint is saved behind a step."""
    settings = config.checkpoint
    return step == config.train.steps or step % settings.every == 0 or is_pinned(step, settings)
