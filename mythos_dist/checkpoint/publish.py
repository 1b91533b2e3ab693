"""On rank 0, or in a tool: rename a finished folder to its final name, and remove what is no longer needed.

A failure at any point (a kill, a full disk, EIO from fsync or rename) loses no checkpoint: nothing is removed before
its replacement is on disk. Files that this run did not write are never removed (patterns: `names.py`).
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mythos_dist.checkpoint.manifest import CheckpointManifest, VersionError, read_checkpoint_manifest
from mythos_dist.checkpoint.names import (
    LATEST,
    MANIFEST_FILE,
    Unfinished,
    folder_name,
    foreign_files,
    is_folder_without_link,
    parse_unfinished,
    remove_checkpoint,
    start_of_unfinished_latest,
    step_of,
    temporary_name,
)
from mythos_dist.checkpoint.signature import Key
from mythos_dist.config.compare import WIDTHS, differences
from mythos_dist.config.load import config_from
from mythos_dist.errors import UserError
from mythos_dist.files import fsync_folder, reason, write_and_fsync, write_atomically

log = logging.getLogger(__name__)
_warned: set[Path] = set()  # paths that are not deleted: one warning each
_published: dict[Path, list[tuple[int, int]]] = {}  # by this process, with `_identity`: need not be read again


def publish(
    temporary: Path,
    manifest: CheckpointManifest,
    key: Key | None = None,
    check_fence: Callable[[], None] = lambda: None,
) -> Path:
    """Make a folder whose files are all on disk the newest checkpoint: write its manifest, rename it, write `latest`.

    An earlier checkpoint of the same step is replaced; anything else of that name is renamed. `key`: sign the manifest.
    `check_fence` raises UserError if a newer start has taken the run over; it is called before the renames.

    Returns the checkpoint's folder. Raises OSError if something did not reach the disk; earlier checkpoints stay then.
    """
    write_and_fsync(temporary / MANIFEST_FILE, manifest.to_text(key))
    fsync_folder(temporary)
    folder = temporary.parent
    final = folder / folder_name(manifest.step)
    replaced = folder / f"{final.name}.replaced-by-{manifest.start}"
    check_fence()
    is_replaced = os.path.lexists(final)
    if is_replaced:
        if not _may_remove(final, manifest):
            replaced = _free_name(folder / f"{final.name}.kept")
            log.warning("%s is not a checkpoint of this run; renamed to %s", final, replaced)
        elif os.path.lexists(replaced) and not remove_checkpoint(replaced):  # from a publication that failed half-way
            replaced = _free_name(replaced)
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if is_replaced:
            replaced.rename(final)
        raise
    _published[final] = _identity(final)
    fsync_folder(folder)  # before `latest` is written: a power failure must not undo the rename that it relies on
    write_atomically(folder / LATEST, final.name + "\n", f".tmp-{manifest.start}", before_rename=check_fence)
    if is_replaced and parse_unfinished(replaced.name):
        with suppress(OSError):  # the next start tries again
            remove_checkpoint(replaced)
    return final


def prune(
    folder: Path,
    newest: CheckpointManifest,
    keep: int,
    is_pinned: Callable[[int], bool] = lambda step: False,
    is_waiting: Callable[[int], bool] = lambda step: False,
    backlog: int = 0,
) -> None:
    """Delete this run's checkpoints except the last `keep`, counted from the just published `newest`, pinned ones, and
    the last `backlog` of the others that wait for their upload.

    Checkpoints of later steps stay: the run went back to an earlier step, and will replace them when it gets there.
    Folders that this run did not write stay, too, and do not count.
    """
    steps = {path: step for path in folder.iterdir() if (step := step_of(path.name)) is not None}
    to_keep, to_wait = keep, backlog
    for path, step in sorted(steps.items(), key=lambda item: -item[1]):
        if step > newest.step or is_pinned(step):
            continue
        if to_keep and is_folder_without_link(path) and (path / MANIFEST_FILE).is_file():
            to_keep -= 1
        elif not to_keep and to_wait and is_waiting(step):
            to_wait -= 1
        elif not to_keep and _may_remove(path, newest):
            if is_waiting(step):
                log.warning("%s is deleted before its upload: checkpoint.remote_backlog=%d", path.name, backlog)
            with _failure_is_a_warning(path):
                # Renamed first: a kill in the middle must not leave half a checkpoint under a checkpoint's name.
                remove_checkpoint(path.rename(path.with_name(temporary_name(step, newest.start))))


def remove_unfinished(folder: Path, start: int) -> None:
    """Remove what starts up to `start` left when they were interrupted; a checkpoint that was being replaced gets its
    name back. Raises OSError if the folder cannot be listed."""
    paths = list(folder.iterdir())
    for path in paths:
        of_start = start_of_unfinished_latest(path.name)
        if of_start is not None and of_start <= start and path.is_file():
            with _failure_is_a_warning(path):
                path.unlink()
    unfinished = [(path, parsed) for path in paths if (parsed := parse_unfinished(path.name)) and parsed.start <= start]
    for path, parsed in sorted(unfinished, key=lambda item: -item[1].start):  # that of `start` before its name is used
        if is_folder_without_link(path):
            with _failure_is_a_warning(path):
                _remove_one_unfinished(path, parsed, start)


def _remove_one_unfinished(path: Path, unfinished: Unfinished, start: int) -> None:
    final = path.with_name(unfinished.checkpoint)
    if unfinished.state == "replaced-by" and not os.path.lexists(final):
        path.rename(final)
        return
    if foreign := foreign_files(path):
        _warn_once(path, f"it holds {', '.join(foreign[:3])}")
        return
    if unfinished.start < start:
        # Its start may be suspended just before it renames the folder: it must not find half of it.
        step = step_of(unfinished.checkpoint)
        assert step is not None, "`parse_unfinished` checks it"
        path = path.rename(path.with_name(temporary_name(step, start)))
    remove_checkpoint(path)


def _may_remove(path: Path, newest: CheckpointManifest) -> bool:
    """Whether `path` is a checkpoint of the run that wrote `newest`, without other files. Warns if not."""
    try:
        if not is_folder_without_link(path):
            why_not = "it is a link or a file"
        elif not any(path.iterdir()):
            why_not = "it is empty"
        elif foreign := foreign_files(path):
            why_not = f"it holds {', '.join(foreign[:3])}"
        elif path in _published and _published[path] == _identity(path):
            why_not = ""
        else:
            why_not = _why_of_other_run(path, newest)
    except OSError as error:
        why_not = f"it cannot be read ({reason(error)})"
    if why_not:
        _warn_once(path, why_not)
    return not why_not


def _identity(folder: Path) -> list[tuple[int, int]]:
    """Inodes and change times: they differ once the folder, the names in it or the manifest change."""
    return [(status.st_ino, status.st_ctime_ns) for status in (folder.stat(), (folder / MANIFEST_FILE).stat())]


def _why_of_other_run(path: Path, newest: CheckpointManifest) -> str:
    """Why a checkpoint is not of the run that wrote `newest`; empty: it is, or it is damaged."""
    try:
        manifest = read_checkpoint_manifest(path)
    except VersionError:
        return "its format is that of another version of mythos_dist"
    except UserError:
        return ""
    try:
        config = config_from(newest.config)
    except UserError:
        return "the newest checkpoint has settings of another version of mythos_dist"
    stage = manifest.config.get("run", {}).get("stage", "")
    if stage and config.run.stage and stage != config.run.stage:  # an earlier stage of the run has other settings
        widths = manifest.config.get("model", {})
        is_earlier = manifest.step <= config.run.stage_begin and manifest.lineage.parents == newest.lineage.parents
        if is_earlier and all(widths.get(key) == getattr(config.model, key) for key in WIDTHS):
            return ""
        return f"it is of stage {stage} of another run"
    names = [name for name, *_ in differences(manifest.config, config)]
    return f"it was saved with another {', '.join(names[:3])}" if names else ""


def _warn_once(path: Path, why: str) -> None:
    if path not in _warned:
        _warned.add(path)
        log.warning("%s is not deleted: %s, so this run did not write it", path, why)


@contextmanager
def _failure_is_a_warning(path: Path) -> Iterator[None]:
    """For removals: what cannot be removed takes space, but is not a reason to stop the run."""
    try:
        yield
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)


def _free_name(path: Path) -> Path:
    """`path`, or `path` with a number appended if it exists."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
