"""Upload a run's checkpoints to `checkpoint.remote`, in a process of its own (`upload_process.py`).

Each node uploads its share of a checkpoint's files, which all nodes see in the run folder. Node 0 then checks that
every file is in the store, with the size and the hash that the manifest says, uploads the run's logs, and last the
manifest. Until the manifest is there, the upload does not count as a checkpoint; the next upload completes it, file by
file. If the run rolled back and saves a step again, the stored manifest is removed before any of its files is replaced.

A suspended or disconnected start may continue hours later. So nothing appears in the store before its uploader has
checked, after it began the upload, that its start is the newest one; and each start aborts all unfinished uploads after
it has taken over. See `store/upload.py` and `fence.py`.

Decisions: CHECKPOINT-15, CHECKPOINT-16, CHECKPOINT-17.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mythos_dist.checkpoint.fence import newest_start
from mythos_dist.checkpoint.manifest import CheckpointManifest, FileEntry, read_checkpoint_manifest
from mythos_dist.checkpoint.names import DATA_FILE, MANIFEST_FILE, folder_name, is_pinned, step_of
from mythos_dist.checkpoint.reader import checkpoints_of
from mythos_dist.checkpoint.remote import CHECKPOINTS, LOGS, WRITER, UploadSettings, read_writer, step_url
from mythos_dist.errors import UserError, first_line
from mythos_dist.store.fetch import Unavailable
from mythos_dist.store.upload import DIGEST, AbortedError, ChangedError, Stored, Uploader, abort_uploads, digest_of
from mythos_dist.store.write import list_files, remove
from mythos_dist.urls import join_url

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds until a request is given up; the process tries again later
FILES_AT_ONCE = 4
POLL_SECONDS = 3.0  # between two listings, while files of other nodes are missing
HELP_AFTER = 120.0  # seconds without another file of another node, after which node 0 uploads them itself
Identity = tuple[int, int]


class SupersededError(UserError):
    """Another start, or another run, writes to the store: this process ends."""


class CheckpointUploader:
    """Uploads what is not there yet. `report`: called with what happened, as JSON values."""

    def __init__(self, settings: UploadSettings, report: Callable[[dict[str, Any]], None], patience: float = PATIENCE):
        self._settings, self._report, self._patience = settings, report, patience
        self._run_dir = Path(settings.run_dir)
        self._uploader = Uploader(patience)
        self._done: dict[str, Identity] = {}  # checkpoints that need no upload (any more), with their identity
        self._logs: dict[str, str] = {}  # digests of the logs as they were uploaded
        self._claimed = settings.node > 0  # node 0 does it
        self._remote_steps: set[int] = set()  # of complete checkpoints in the store

    def upload_all(self) -> None:
        """Upload all checkpoints that are complete here, and not in the store, from the newest.

        Raises Unavailable if the store fails, SupersededError if another start has taken over.
        """
        if not self._claimed:
            self._claim()
        while folder := next(iter(self._waiting()), None):
            self._check_local_fence()
            self._upload(folder)
        if self._settings.node == 0:
            self._prune()

    def _waiting(self) -> list[Path]:
        """Local checkpoints that are not known to be in the store, from the newest."""
        folders = {step: path for path in self._local() if (step := step_of(path.name)) is not None}
        return [folders[step] for step in sorted(folders, reverse=True) if not self._is_done(folders[step])]

    def _local(self) -> list[Path]:
        return checkpoints_of(self._run_dir / CHECKPOINTS)

    def _is_done(self, folder: Path) -> bool:
        identity = _identity(folder)
        return identity is None or self._done.get(folder.name) == identity

    def _claim(self) -> None:
        """On node 0: make this the newest start in the store, then end what earlier ones were about to do there."""
        settings = self._settings
        self._check_fences()
        about = newest_start(self._run_dir) | {"run": settings.run, "start": settings.start, "token": settings.token}
        self._put(WRITER, json.dumps(about | {"run_dir": str(self._run_dir.resolve())}).encode() + b"\n")
        if number := abort_uploads(settings.url, self._patience):
            log.info("aborted %d unfinished uploads of earlier starts", number)
        self._upload_logs()
        self._read_remote_steps()
        self._claimed = True

    def _read_remote_steps(self) -> None:
        """List what is in the store, and remove what is left there of checkpoints that will not be completed."""
        by_name: dict[str, list[str]] = {}
        for file in list_files(join_url(self._settings.url, CHECKPOINTS), self._patience):
            name, _, inner = file.partition("/")
            if step_of(name) is not None:
                by_name.setdefault(name, []).append(inner)
        local = {path.name for path in self._local()}
        for name, files in by_name.items():
            if MANIFEST_FILE in files:
                self._remote_steps.add(step_of(name) or 0)
            elif name not in local:
                self._remove(name, files)

    def _upload(self, folder: Path) -> None:
        """Upload this node's share of a checkpoint, and on node 0 its manifest."""
        began, identity = time.monotonic(), _identity(folder)
        try:
            content, manifest = (folder / MANIFEST_FILE).read_bytes(), read_checkpoint_manifest(folder)
            if identity is None or _identity(folder) != identity:
                return  # it was replaced, or removed
            size = self._upload_checkpoint(folder, manifest, content)
        except (ChangedError, OSError) as error:
            if _identity(folder) == identity:
                self._skip(folder, identity, str(error))
            return
        except (Unavailable, SupersededError):
            raise
        except AbortedError:
            return  # by node 0, which began after this node: again
        except UserError as error:
            self._skip(folder, identity, first_line(error))
            return
        self._done[folder.name] = identity
        if self._settings.node == 0:
            self._remote_steps.add(manifest.step)
            seconds = time.monotonic() - began
            event = "uploaded" if size else "present"
            self._report({"event": event, "step": manifest.step, "bytes": size, "seconds": round(seconds, 2)})
            self._prune()

    def _skip(self, folder: Path, identity: Identity | None, why: str) -> None:
        """A checkpoint that cannot be uploaded: it is damaged."""
        if identity is not None:
            self._done[folder.name] = identity
            self._report({"event": "damaged", "step": step_of(folder.name), "reason": why})

    def _upload_checkpoint(self, folder: Path, manifest: CheckpointManifest, content: bytes) -> int:
        """Returns the bytes that were sent by this node."""
        settings, base, digest = self._settings, step_url(self._settings.url, folder.name), digest_of(content)
        there = list_files(base, self._patience)
        if MANIFEST_FILE in there:
            if self._find(base, MANIFEST_FILE) == Stored(len(content), digest):
                return 0
            self._check_fences()
            remove([join_url(base, MANIFEST_FILE)], self._patience)
            self._remote_steps.discard(manifest.step)
        names = sorted(manifest.files)
        sent = self._upload_files(folder, manifest, names[settings.node :: settings.nodes], there)
        if settings.node == 0:
            sent += self._complete_files(folder, manifest)
            self._upload_logs()
            sent += self._uploader.upload(join_url(base, MANIFEST_FILE), content, digest, self._check_fences)
        return sent

    def _upload_files(
        self, folder: Path, manifest: CheckpointManifest, names: Iterable[str], there: Iterable[str]
    ) -> int:
        """Upload files that are not `there`, or are others there; returns the bytes that were sent."""
        base, present = step_url(self._settings.url, folder.name), set(there)

        def upload(name: str) -> int:
            entry = manifest.files[name]
            if name in present and self._find(base, name) == Stored(entry.bytes, entry.hash):
                return 0
            return self._uploader.upload(join_url(base, name), folder / name, entry.hash, self._check_fences)

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            return sum(pool.map(upload, names))

    def _complete_files(self, folder: Path, manifest: CheckpointManifest) -> int:
        """On node 0: wait until the store has all files as the manifest says; upload those that do not come.

        Raises UserError if the store does not return the digest of a file that this node has uploaded.
        """
        base, sent = step_url(self._settings.url, folder.name), 0
        incomplete = set(manifest.files)  # not yet in the store as the manifest says
        uploaded = set(manifest.files) if self._settings.nodes == 1 else set[str]()  # by this node
        changed = time.monotonic()
        while True:
            there = list_files(base, self._patience) if self._settings.nodes > 1 else manifest.files
            complete, differing = self._compare_with_store(base, manifest, incomplete.intersection(there))
            if complete:
                incomplete -= complete
                changed = time.monotonic()
            if lost := sorted(uploaded & differing.keys()):
                self._check_fences()  # else a newer start has replaced it
                raise UserError(_lost_digest(join_url(base, lost[0]), differing[lost[0]], manifest.files[lost[0]]))
            if not incomplete:
                return sent
            if self._settings.nodes == 1 or time.monotonic() - changed > HELP_AFTER:
                names = sorted(incomplete)
                log.info("%s of %s were not uploaded by their nodes", ", ".join(names[:5]), folder.name)
                sent += self._upload_files(folder, manifest, names, there)
                uploaded.update(names)
                changed = time.monotonic()
            else:
                time.sleep(POLL_SECONDS)
            self._check_local_fence()

    def _compare_with_store(
        self, base: str, manifest: CheckpointManifest, names: Iterable[str]
    ) -> tuple[set[str], dict[str, Stored]]:
        """The files that the store has as the manifest says, and those that it has with another content."""
        complete, differing, names = set[str](), dict[str, Stored](), sorted(names)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            for name, stored in zip(names, pool.map(lambda name: self._find(base, name), names), strict=True):
                if stored == Stored(manifest.files[name].bytes, manifest.files[name].hash):
                    complete.add(name)
                elif stored is not None:
                    differing[name] = stored
        return complete, differing

    def _find(self, base: str, name: str) -> Stored | None:
        return self._uploader.find(join_url(base, name))

    def _upload_logs(self) -> None:
        for name in LOGS:
            content = None
            with suppress(OSError):  # not written yet; or it cannot be read, which the run reports
                content = (self._run_dir / name).read_bytes()
            if content is not None:
                self._put(name, content)

    def _put(self, name: str, content: bytes) -> None:
        """Write a file of the run, if it has changed."""
        digest = digest_of(content)
        if self._logs.get(name) != digest:
            self._uploader.upload(join_url(self._settings.url, name), content, digest, self._check_fences)
            self._logs[name] = digest

    def _check_fences(self) -> None:
        self._check_local_fence()
        self._check_remote_fence()

    def _check_local_fence(self) -> None:
        """Raises SupersededError if the run was started again in its folder."""
        settings, newest = self._settings, newest_start(self._run_dir)
        number, token = newest.get("start", settings.start), newest.get("token", settings.token)
        if number > settings.start or (number == settings.start and settings.token and token != settings.token):
            raise SupersededError(f"start {number} of this run has taken over its folder")

    def _check_remote_fence(self) -> None:
        """Raises SupersededError if another run, or a newer start in another folder, writes to the store."""
        settings, about = self._settings, read_writer(self._settings.url, self._patience)
        if about is None or about["token"] == settings.token:
            return
        where = f"{about.get('run_dir', '?')} on {about.get('host', '?')}"
        if about["run"] != settings.run:
            raise SupersededError(f"another run writes there, in {where}; give each run a folder of its own")
        if about["start"] >= settings.start:
            raise SupersededError(f"start {about['start']} of this run, in {where}, has taken over")

    def _prune(self) -> None:
        """Remove the oldest checkpoints of the store beyond `keep`, as `publish.prune` does in the run folder."""
        settings, local = self._settings, [step_of(path.name) or 0 for path in self._local()]
        if settings.keep is None or not local:
            return
        newest = max(local)  # later ones were saved before the run went back, and will be replaced
        kept = [step for step in sorted(self._remote_steps, reverse=True) if step <= newest]
        removable = [step for step in kept if not is_pinned(step, settings.pin, settings.pin_every)]
        for step in removable[settings.keep :]:
            name = folder_name(step)
            self._remove(name, list_files(step_url(settings.url, name), self._patience))
            self._remote_steps.discard(step)
            self._report({"event": "removed", "step": step})

    def _remove(self, name: str, files: Iterable[str]) -> None:
        """Remove a checkpoint from the store, its manifest first; files that no run writes stay."""
        base, ours = step_url(self._settings.url, name), [file for file in files if DATA_FILE.fullmatch(file)]
        self._check_fences()
        remove([join_url(base, MANIFEST_FILE)], self._patience)
        remove([join_url(base, file) for file in ours], self._patience)


def _lost_digest(url: str, stored: Stored, sent: FileEntry) -> str:
    """Why a file that was uploaded is not taken for what was sent."""
    if stored.bytes == sent.bytes and not stored.digest:
        return (
            f"{url} was stored without the digest that was sent as its metadata ({DIGEST}), by which uploads are "
            "checked; set checkpoint.remote to a store that keeps the metadata of objects"
        )
    return (
        f"{url} is not what was uploaded: {stored.bytes} bytes with the digest {stored.digest or 'none'} instead of "
        f"{sent.bytes} with {sent.hash}; give each run a folder of its own"
    )


def _identity(folder: Path) -> Identity | None:
    """A value that changes when a local checkpoint is saved again; None if it is not complete, or was removed."""
    try:
        status = (folder / MANIFEST_FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
