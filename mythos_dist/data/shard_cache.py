"""The shards of stores on this node: each is downloaded once, whatever the number of processes, and verified.

`CACHE/stores/FINGERPRINT/SPLIT/NAME` is a complete shard, `NAME.partial` one that a process downloads: it holds an
exclusive flock on that file, has allocated its full size, and renames it when its hash is right. The kernel releases
the locks of a killed process, so another one takes the partial file over. Nothing else is shared between processes,
ranks or jobs.

With a limit, a process that reads a shard holds a shared flock on it, and a shard is only removed under an exclusive
one. Sizes are added up under a lock of the folder.

The trap: a file can be removed or renamed between its opening and its locking, so after locking, the name is looked up
again.

Decisions: DATA-28, DATA-29.
"""

import contextlib
import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from mythos_dist.data.remote import STORES
from mythos_dist.data.shard import DamagedFile, Shard, check_hash, chunks_of, decompressed_chunks
from mythos_dist.errors import UserError
from mythos_dist.files import os_user_error
from mythos_dist.store.fetch import SHARD_PATIENCE, WrongContent, fetch
from mythos_dist.units import short_bytes
from mythos_dist.urls import join_url

log = logging.getLogger(__name__)

PARTIAL = ".partial"
POLL = 0.02  # seconds
IN_USE = 60.0  # seconds since its last use within which a shard of another job is not removed for a prefetch
NextUse = Callable[[str], float]  # the path of a shard below the cache -> when it is needed; inf: unknown or never
Wait = Callable[[float], object]


class Plan(NamedTuple):
    """When a process needs its shards. A forked process has a copy that no longer changes, and does not use it."""

    process: int
    next_use: NextUse
    folders: set[str]  # of the job's corpora


class NoRoom(Exception):
    """Only shards that are needed earlier could be removed."""


class ShardCache:
    """Downloaded shards in a folder of this node. Thread-safe; any number of processes may use the folder."""

    def __init__(self, root: Path, limit: int | None = None):
        """`root`: data.cache. `limit` in bytes; None: shards are never removed."""
        self.root, self.limit = root, limit
        self.folder = root / STORES
        self._plan: Plan | None = None

    def set_plan(self, next_use: NextUse, fingerprints: Iterable[str]) -> None:
        """In this process, remove shards of these corpora by their next use."""
        self._plan = Plan(os.getpid(), next_use, {fingerprint[:16] for fingerprint in fingerprints})

    def path(self, shard: Shard) -> Path:
        """Where the shard is, or will be, uncompressed."""
        return self.folder / self.key(shard)

    def key(self, shard: Shard) -> str:
        """The path of a shard below `folder`."""
        return f"{shard.fingerprint[:16]}/{shard.folder.name}/{shard.entry['raw_data']['basename']}"

    def has(self, shard: Shard) -> bool:
        """Whether the shard is complete."""
        return self.path(shard).exists()

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard, downloaded if it is missing; with a limit, the shard is not removed until it is
        closed. Raises UserError."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                if (file := self._open_existing(shard)) is not None:
                    return file
            self.download(shard)

    def _open_existing(self, shard: Shard) -> int | None:
        """None: it was removed just now. FileNotFoundError: it is not there."""
        file = os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if self.limit is not None:
                fcntl.flock(file, fcntl.LOCK_SH)
                if os.fstat(file).st_nlink == 0:
                    os.close(file)
                    return None
                os.utime(file)  # its last use
            return file
        except BaseException:
            os.close(file)
            raise

    def discard(self, shard: Shard) -> None:
        """Remove a shard that turned out to be damaged."""
        self.path(shard).unlink(missing_ok=True)

    def download(self, shard: Shard, needed: float = -math.inf, wait: Wait = time.sleep) -> None:
        """Download a shard unless it is there; if another process downloads it, wait for that.

        needed: only shards that are needed later than that are removed; raises NoRoom if there are none. wait: see
        `fetch`. Raises UserError.
        """
        path = self.path(shard)
        partial = path.with_name(path.name + PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(partial, wait) as file:
                if path.exists():
                    partial.unlink()
                    return
                self._download(shard, partial, file, needed, wait)
                os.utime(partial)
                os.replace(partial, path)
        except OSError as error:
            raise os_user_error(error, path, "cannot be written (data.cache)") from None

    def _download(self, shard: Shard, partial: Path, file: IO[bytes], needed: float, wait: Wait) -> None:
        """Write the uncompressed shard to `file`, verified and fsynced; remove it if that fails."""
        began = time.monotonic()
        try:
            raw, stored = shard.entry["raw_data"], shard.stored
            source = join_url(shard.url, shard.folder.name, stored["basename"])
            if shard.entry["zip_data"] is None:
                self._allocate(file, raw["bytes"], needed, wait)
                fetch_shard(source, file, stored, wait)
            else:
                compressed = partial.with_name(f"{partial.name.removesuffix(PARTIAL)}.zip{PARTIAL}")
                with _locked(compressed, wait) as packed:
                    try:
                        self._allocate(packed, stored["bytes"], needed, wait)
                        fetch_shard(source, packed, stored, wait)
                        self._allocate(file, raw["bytes"], needed, wait)
                        for chunk in decompressed_chunks(shard, compressed, raw["bytes"], verify=False):
                            file.write(chunk)
                    finally:
                        compressed.unlink(missing_ok=True)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.monotonic() - began
            size = stored["bytes"]
            rate = short_bytes(size / max(seconds, 1e-9))
            log.info("%s: %s in %.2f s, %s/s", source, short_bytes(size), seconds, rate)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _allocate(self, file: IO[bytes], size: int, needed: float, wait: Wait) -> None:
        """Make room for `size` bytes and reserve them: the size of a file is counted from now on."""
        file.truncate(0)
        deadline = time.monotonic() + SHARD_PATIENCE
        while not self._reserve(file, size, needed, wait):
            if needed > -math.inf:
                raise NoRoom
            if time.monotonic() > deadline:
                raise UserError(
                    f"data.cache_limit={short_bytes(self.limit or 0)} has no room for a shard of {short_bytes(size)}: "
                    "all others are being read or downloaded; set a larger one"
                )
            wait(POLL)  # readers hold a shard for milliseconds
        file.seek(0)

    def _reserve(self, file: IO[bytes], size: int, needed: float, wait: Wait) -> bool:
        if self.limit is None:
            _allocate(file, size)
            return True
        with _locked(self.folder / ".size.lock", wait):
            if not self._make_room(size, needed):
                return False
            _allocate(file, size)
            return True

    def _make_room(self, size: int, needed: float) -> bool:
        """Remove shards, those needed last first, until `size` more bytes fit."""
        assert self.limit is not None
        files = self._files()
        excess = sum(status.st_size for status in files.values()) + size - self.limit
        if excess <= 0:
            return True
        for key in self._victims(files, needed):
            if _remove_unused(self.folder / key):
                excess -= files[key].st_size
                if excess <= 0:
                    return True
        return False

    def _files(self) -> dict[str, os.stat_result]:
        """All shards in the folder, complete or not, by their path below it."""
        files = {}
        for folder, _, names in os.walk(self.folder):
            below = os.path.relpath(folder, self.folder)
            if below.partition("/")[2].partition("/")[0] in ("train", "heldout"):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        if name != "index.json":
                            files[f"{below}/{name}"] = os.stat(f"{folder}/{name}")
        return files

    def _victims(self, files: dict[str, os.stat_result], needed: float) -> list[str]:
        """What may be removed, in order: partial files of killed processes, shards of other jobs that are not in use,
        own shards by farthest next use. Of own shards without a known use, the one that was used last is needed last:
        an epoch reads all others before it. Shards in use by others come last, and only for a reader that waits."""
        plan = self._plan if self._plan and self._plan.process == os.getpid() else None
        now, order = time.time(), []
        for key, status in files.items():
            age = now - status.st_mtime
            if key.endswith(PARTIAL):
                order.append((0, 0.0, 0.0, key))
            elif plan and key.partition("/")[0] in plan.folders:
                if (next_use := plan.next_use(key)) > needed:
                    order.append((2, -next_use, age, key))
            elif plan is None or age > IN_USE or needed == -math.inf:
                order.append((1 if age > IN_USE else 3, -age, 0.0, key))
        return [key for *_, key in sorted(order)]


def _allocate(file: IO[bytes], size: int) -> None:
    """Give an empty file its size. OSError if the disk is full."""
    if size:
        os.posix_fallocate(file.fileno(), 0, size)


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process has locked it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # a reader may have opened it, and waits; see `_locked`
        os.close(file)


@contextlib.contextmanager
def _locked(path: Path, wait: Wait) -> Iterator[IO[bytes]]:
    """The file `path`, created if it does not exist, open and locked.

    The lock is released explicitly: loader processes that were forked meanwhile have a copy of the descriptor, and the
    lock would be held until they close it.
    """
    deadline = time.monotonic() + 2 * SHARD_PATIENCE
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{path} is locked by another process; end it, or set another data.cache") from None
                wait(POLL)
                continue
            try:
                if _is_at(file, path):  # else another process has just renamed or removed it
                    yield file
                    return
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def fetch_shard(url: str, file: IO[bytes], expected: dict, wait: Wait = time.sleep) -> None:
    """Write the shard file `url` to `file`, an empty or longer one. `expected`: `bytes` and `hashes`, as in index.json.

    The hash is checked even with data.verify=false: a transfer can corrupt data. Raises Unavailable.
    """

    def check() -> None:
        file.flush()
        try:
            if file.tell() != expected["bytes"]:
                raise DamagedFile(f"has {file.tell()} bytes, but index.json says {expected['bytes']}")
            check_hash(chunks_of(file.fileno()), expected["hashes"])
        except DamagedFile as problem:
            raise WrongContent(str(problem)) from None

    fetch(url, file, expected["bytes"], check=check, wait=wait)
