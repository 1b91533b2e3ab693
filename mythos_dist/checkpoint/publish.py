"""On one process: give a finished folder the name that others read, and remove what is no longer needed.

A failure at any point (a kill, a full disk, EIO from fsync or rename) leaves the checkpoints that were there: nothing
is removed before what replaces it is on disk. What this run did not write is never removed (patterns: `names.py`).
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mythos_dist.checkpoint.manifest import FILE, CheckpointManifest, VersionError, read_checkpoint_manifest
from mythos_dist.checkpoint.names import (
    LATEST,
    folder_name,
    is_plain_folder,
    not_ours,
    remove,
    step_of,
    unfinished,
    unfinished_pointer,
)
from mythos_dist.checkpoint.signature import Key
from mythos_dist.config.compare import differences
from mythos_dist.config.load import config_from
from mythos_dist.errors import UserError
from mythos_dist.files import fsync_folder, reason, write_and_fsync

log = logging.getLogger(__name__)
_warned: set[Path] = set()  # of what stays: once each
_published: dict[Path, list[tuple[int, int]]] = {}  # by this process, with `_identity`: these need not be read again


def publish(temporary: Path, manifest: CheckpointManifest, key: Key | None = None) -> Path:
    """Turn a folder whose files are all on disk into the newest checkpoint: manifest, rename, `latest`.

    A checkpoint of the same step is replaced; what else has its name gets another. Returns the checkpoint's folder.
    `key`: sign it. OSError if something did not reach the disk: what was there before is there then.
    """
    write_and_fsync(temporary / FILE, manifest.to_text(key))
    fsync_folder(temporary)
    folder = temporary.parent
    final = folder / folder_name(manifest.step)
    replaced = folder / f"{final.name}.replaced-by-{manifest.start}"
    is_replaced = os.path.lexists(final)
    if is_replaced:
        if not _may_remove(final, manifest):
            replaced = _free_name(folder / f"{final.name}.kept")
            log.warning("%s is no checkpoint of this run; it is now %s", final, replaced)
        elif os.path.lexists(replaced) and not remove(replaced):  # of a publication that failed behind the rename
            replaced = _free_name(replaced)
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if is_replaced:
            replaced.rename(final)
        raise
    _published[final] = _identity(final)
    fsync_folder(folder)  # first of all: `latest` must not name what a power cut takes back
    pointer = folder / f"{LATEST}.tmp-{manifest.start}"
    write_and_fsync(pointer, final.name + "\n")
    pointer.replace(folder / LATEST)
    fsync_folder(folder)
    if is_replaced and unfinished(replaced.name):
        with suppress(OSError):  # the next start tries again
            remove(replaced)
    return final


def prune(
    folder: Path, newest: CheckpointManifest, keep: int, is_pinned: Callable[[int], bool] = lambda step: False
) -> None:
    """Delete this run's checkpoints up to the `newest`, which was just published, but the last `keep` and pinned ones.

    Later ones are left alone: the run went back behind them, and will replace them when it gets there. So is what this
    run did not write, and it does not count.
    """
    steps = {path: step for path in folder.iterdir() if (step := step_of(path.name)) is not None}
    left = keep
    for path, step in sorted(steps.items(), key=lambda item: -item[1]):
        if step > newest.step or is_pinned(step):
            continue
        if left and is_plain_folder(path) and (path / FILE).is_file():
            left -= 1
        elif not left and _may_remove(path, newest):
            with _failure_is_a_warning(path):
                # Without its name first: a kill must not leave half a checkpoint.
                remove(path.rename(path.with_name(f"{path.name}.tmp-{newest.start}")))


def remove_leftovers(folder: Path, start: int) -> None:
    """Remove what starts up to `start` have left that ended while they wrote; a checkpoint that was being replaced gets
    its name back. OSError if the folder cannot be listed."""
    for path in list(folder.iterdir()):
        with _failure_is_a_warning(path):
            if (number := unfinished_pointer(path.name)) is not None and number <= start and path.is_file():
                path.unlink()
            if (found := unfinished(path.name)) is None or found[2] > start or not is_plain_folder(path):
                continue
            checkpoint, what, _ = found
            if what == "replaced-by" and not os.path.lexists(folder / checkpoint):
                path.rename(folder / checkpoint)
            elif not remove(path):
                _warn(path, f"it holds {', '.join(not_ours(path)[:3])}")


def _may_remove(path: Path, newest: CheckpointManifest) -> bool:
    """Whether all that has this name is a checkpoint of the run that has written `newest`. Warns if not."""
    try:
        if not is_plain_folder(path):
            why = "it is no folder of its own"
        elif not any(path.iterdir()):
            why = "it is empty"
        elif others := not_ours(path):
            why = f"it holds {', '.join(others[:3])}"
        elif path in _published and _published[path] == _identity(path):
            why = ""
        else:
            why = _other_run(path, newest)
    except OSError as error:
        why = f"it cannot be read ({reason(error)})"
    if why:
        _warn(path, why)
    return not why


def _identity(folder: Path) -> list[tuple[int, int]]:
    """Another value when the folder, names in it or the manifest are others: inodes, times of change."""
    return [(about.st_ino, about.st_ctime_ns) for about in (folder.stat(), (folder / FILE).stat())]


def _other_run(path: Path, newest: CheckpointManifest) -> str:
    """Why a checkpoint is not of the run that has written `newest`; empty: it is, or it is damaged."""
    try:
        manifest = read_checkpoint_manifest(path)
    except VersionError:
        return "its format is that of another version of mythos_dist"
    except UserError:
        return ""
    other = [name for name, *_ in differences(config_from(newest.config), manifest.config)]
    return f"it was saved with another {', '.join(other[:3])}" if other else ""


def _warn(path: Path, why: str) -> None:
    if path not in _warned:
        _warned.add(path)
        log.warning("%s is not deleted: %s, so this run did not write it", path, why)


@contextmanager
def _failure_is_a_warning(path: Path) -> Iterator[None]:
    """For removals: what cannot be removed takes room, but is no reason to stop."""
    try:
        yield
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)


def _free_name(path: Path) -> Path:
    """`path`, or if it is taken with a number behind it."""
    number = itertools.count(2)
    free = path
    while os.path.lexists(free):
        free = path.with_name(f"{path.name}-{next(number)}")
    return free
