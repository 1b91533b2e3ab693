"""The output of a conversion in a store: parts are made in a scratch folder, and uploaded and removed as they finish.

    URL/train/part-00007/shard.00000.mds     as in a local folder, see part.py
    URL/unfinished/settings.json             the settings, uploaded first
    URL/unfinished/part-00007.json           the record of a part, uploaded after its shards
    URL/train/index.json, tokenizer.model    uploaded at the end, after the sizes of all shards were compared
    URL/manifest.json                        last; then URL/unfinished and the scratch folder are removed

What the store has is what counts: a conversion resumes from its records, also on a machine without the scratch folder,
and the records of both sides are merged. A record is removed before its part is uploaded again, so it always
describes the shards that are there.

The trap: the scratch folder must not fill up while the store is slow. So `add` blocks when parts are waiting, and the
caller then starts no new ones.

Decisions: DATA-30, DATA-31.
"""

import json
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mythos_dist.data.manifest import SPLITS, ShardManifest, read_json
from mythos_dist.data.remote import read_indexes, read_remote_manifest
from mythos_dist.data.shard_cache import fetch_shard
from mythos_dist.errors import UserError
from mythos_dist.prepare.heldout import ONE_STREAM
from mythos_dist.prepare.output import Entries, Output, manifest_text
from mythos_dist.prepare.part import UNFINISHED, ConversionPart, PartRecord, stored_file, write_atomically
from mythos_dist.prepare.resume import check_same
from mythos_dist.private import scratch_folder
from mythos_dist.store.fetch import SHARD_PATIENCE, START_PATIENCE, read_object
from mythos_dist.store.write import check_writable, list_files, put, remove
from mythos_dist.units import count
from mythos_dist.urls import join_url

THREADS = 8  # uploads at once
WAITING = 8  # parts that wait for a thread; the scratch folder holds as many, those in progress, and those of workers
PATIENCE = SHARD_PATIENCE  # seconds
POLL_SECONDS = 0.2
MAX_RECORD = 1 << 28  # bytes
SETTINGS = f"{UNFINISHED}/settings.json"
_RECORD = re.compile(rf"{UNFINISHED}/part-\d+\.json")
_SHARD = re.compile(r"(train|heldout)/part-(\d+|tails|kept|cut)/shard\.\d+\.mds(\.zstd)?")


class _Stopped(Exception):
    """The output is closed."""


class _Upload(NamedTuple):
    """Files that are uploaded one after the other, then removed here; `record`: uploaded after them, and kept."""

    files: list[str]
    record: str = ""


class StoreOutput(Output):
    """The folder `url` of a store; `out` is the scratch folder. Reads the list of its files: UserError if it cannot."""

    def __init__(self, url: str, scratch: str | Path | None = None):
        check_writable(url)
        self._url = url.rstrip("/")
        super().__init__(scratch_folder(self._url, scratch, "conversions"))
        self._sizes = list_files(self._url, START_PATIENCE)  # by name; of shards, also those uploaded later
        self._on_wait: Callable[[], None] = lambda: None
        self._pending: deque[_Upload] = deque()
        self._in_progress = 0
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    @property
    def name(self) -> str:
        return self._url

    def finished_manifest(self, settings: dict[str, Any]) -> ShardManifest | None:
        if "manifest.json" in self._sizes:
            manifest = read_remote_manifest(self._url)
            check_same(self._url, settings, manifest.to_json())
            read_indexes(self._url, manifest)  # raises if they have changed
            self._remove_unfinished(self._sizes)  # left by a kill just after the manifest was written
            return manifest
        if SETTINGS in self._sizes:
            try:
                check_same(self._url, settings, read_json(read_object(self._at(SETTINGS), MAX_RECORD)))
            except UserError:
                if any(map(_RECORD.fullmatch, self._sizes)):
                    raise
                self._forget(lambda name: name.startswith(f"{UNFINISHED}/"))  # it failed because of a wrong setting
        elif other := sorted(name for name in self._sizes if not name.startswith(f"{UNFINISHED}/")):
            raise UserError(
                f"contains {', '.join(other[:3])}{' …' if len(other) > 3 else ''}, which is not the output of a "
                "conversion; name a new folder",
                self._url,
            )
        return None

    def begin(self, settings: dict[str, Any]) -> None:
        content = json.dumps(settings, default=asdict)
        file = self.out / SETTINGS
        if SETTINGS not in self._sizes or not file.exists() or file.read_text() != content:
            self._clear_scratch()  # of another conversion, or of one that is no longer in the store
        super().begin(settings)
        if SETTINGS not in self._sizes:
            self._put_marker(SETTINGS, content, START_PATIENCE)
        wanted = [name for name in self._sizes if _RECORD.fullmatch(name) or name == f"{UNFINISHED}/{ONE_STREAM}"]
        missing = [name for name in wanted if not (self.out / name).exists()]
        with ThreadPoolExecutor(THREADS) as threads:
            for name, record in zip(missing, threads.map(self._read, missing), strict=True):
                write_atomically(self.out / name, record)

    def size_of(self, name: str) -> int:
        try:
            return super().size_of(name)
        except FileNotFoundError:
            if name not in self._sizes:
                raise
            return self._sizes[name]

    def add(self, part: ConversionPart, record: PartRecord, on_wait: Callable[[], None]) -> None:
        self._on_wait = on_wait
        upload = _Upload(_names(record.shards), f"{UNFINISHED}/{part.name}.json")
        is_here = all((self.out / name).exists() for name in upload.files)
        if is_here or upload.record not in self._sizes:
            self._add(upload)

    def begin_one_stream(self) -> None:
        self._drain()
        self._put_marker(f"{UNFINISHED}/{ONE_STREAM}", "")

    def restore(self, name: str, file: dict[str, Any]) -> Path:
        self._drain()
        path = self.out / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as stream:
                fetch_shard(self._at(name), stream, file)
        return path

    def publish(self, manifest: ShardManifest, shards: Entries) -> None:
        self._drain()
        listed = {name: size for entries in _by_split(shards) for name, size in entries}
        for name in listed:
            if (self.out / name).exists():  # the joined partial windows, and those that were moved
                self._add(_Upload([name]))
        self._drain()
        self._check_shards(listed)
        self._forget(lambda name: _SHARD.fullmatch(name) is not None and name not in listed)
        for name in (*(f"{split}/index.json" for split in SPLITS), manifest.tokenizer):
            put(self._at(name), self.out / name)
        put(self._at("manifest.json"), manifest_text(manifest).encode())
        self._remove_unfinished(list_files(self._url))

    def discard(self) -> None:
        self._drain()
        self._forget(lambda name: name.startswith(f"{UNFINISHED}/") or _SHARD.fullmatch(name) is not None)
        shutil.rmtree(self.out, ignore_errors=True)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _at(self, name: str) -> str:
        return join_url(self._url, name)

    def _put_marker(self, name: str, content: str, patience: float = SHARD_PATIENCE) -> None:
        put(self._at(name), content.encode(), patience)
        self._sizes[name] = len(content)

    def _read(self, name: str) -> bytes:
        return read_object(self._at(name), MAX_RECORD)

    def _clear_scratch(self) -> None:
        for path in self.out.iterdir():
            if path.name != UNFINISHED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (self.out / UNFINISHED).iterdir():
            if path.name != "lock":
                path.unlink()

    def _forget(self, unwanted: Callable[[str], bool]) -> None:
        """Remove files of the store."""
        names = [name for name in self._sizes if unwanted(name)]
        remove(map(self._at, names))
        for name in names:
            del self._sizes[name]

    def _remove_unfinished(self, names: Iterable[str]) -> None:
        remove(self._at(name) for name in names if name.startswith(f"{UNFINISHED}/"))
        shutil.rmtree(self.out, ignore_errors=True)

    def _check_shards(self, listed: dict[str, int]) -> None:
        """Compare the sizes in the store with the index. Raises UserError; the next start converts what is missing."""
        self._sizes = list_files(self._url)
        lost = sorted(name for name, size in listed.items() if self._sizes.get(name) != size)
        if lost:
            parts = {name.split("/")[1] for name in lost}
            remove(self._at(f"{UNFINISHED}/{part}.json") for part in parts)
            for part in parts:
                (self.out / UNFINISHED / f"{part}.json").unlink(missing_ok=True)
            raise UserError(
                f"{count(len(lost), 'shard')} that was uploaded is missing or has another size (first: {lost[0]}); is "
                "another program writing there? Run the same command again to convert what is missing",
                self._url,
            )

    # --- uploads

    def _add(self, upload: _Upload) -> None:
        while len(self._threads) < THREADS:
            self._threads.append(threading.Thread(target=self._work, name="upload", daemon=True))
            self._threads[-1].start()
        with self._changed:
            self._wait_until(lambda: len(self._pending) < WAITING)
            self._pending.append(upload)
            self._changed.notify_all()

    def _drain(self) -> None:
        """Wait until all is uploaded. Raises UserError if something cannot be."""
        with self._changed:
            self._wait_until(lambda: not self._pending and not self._in_progress)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not self._failure and not condition():
            self._changed.wait(POLL_SECONDS)
            self._on_wait()
        if self._failure:
            raise self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._pending and not self._closed:
                    self._changed.wait()
                if self._closed or self._failure:
                    return
                upload = self._pending.popleft()
                self._in_progress += 1
                self._changed.notify_all()
            try:
                self._upload(upload)
            except _Stopped:
                return
            except BaseException as error:  # raised in the main thread
                self._failure = error
            with self._changed:
                self._in_progress -= 1
                self._changed.notify_all()

    def _upload(self, upload: _Upload) -> None:
        if upload.record in self._sizes:
            remove([self._at(upload.record)])
        for name in (*upload.files, *filter(None, [upload.record])):
            put(self._at(name), self.out / name, PATIENCE, wait=self._wait)
            size = (self.out / name).stat().st_size
            with self._changed:
                self._sizes[name] = size
                self.uploaded += size
        for name in upload.files:
            (self.out / name).unlink()
            with suppress(OSError):  # not empty yet
                (self.out / name).parent.rmdir()

    def _wait(self, seconds: float) -> None:
        """Sleep between attempts, but not after `close` or the failure of another upload."""
        with self._changed:
            if self._changed.wait_for(lambda: self._closed or self._failure is not None, seconds):
                raise _Stopped


def _by_split(shards: Entries) -> list[list[tuple[str, int]]]:
    return [
        [(f"{split}/{file['basename']}", file["bytes"]) for file in map(stored_file, entries)]
        for split, entries in shards.items()
    ]


def _names(shards: Entries) -> list[str]:
    return [name for entries in _by_split(shards) for name, _ in entries]
