"""Where a checkpoint's files are: a local folder, or one in a store. Both are read through the same methods.

In a store, a rank requests only the ranges that it needs, several at once (`range_plan.py`). The hash of a file covers
all of it, so it is compared where one rank reads the whole file, as at the layout that saved; of other files, the
header and the size are compared with the manifest.

Decisions: CHECKPOINT-14.
"""

import hashlib
import logging
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import xxhash

from mythos_dist.checkpoint.names import MANIFEST_FILE
from mythos_dist.checkpoint.range_plan import PART_BYTES, Copy, FilePlan, merge_ranges, plan_file
from mythos_dist.checkpoint.strict_json import read_regular_file
from mythos_dist.checkpoint.tensor_file import (
    ITEM_BYTES,
    TensorFile,
    TensorHeader,
    file_hash,
    header_bytes,
)
from mythos_dist.errors import UserError
from mythos_dist.files import reason
from mythos_dist.progress import Progress
from mythos_dist.store.fetch import Unavailable, read_object
from mythos_dist.store.folder import ByteRange, list_folder, read_range, read_ranges, size_of
from mythos_dist.urls import AnyPath, RemotePath

log = logging.getLogger(__name__)
FIRST_READ = 64 << 10  # bytes of a file whose header's length is not known


class Hashes(NamedTuple):
    """The hashes of all bytes of a file."""

    xxh3: str  # xxh3_128
    sha256: str = ""  # only where it was asked for


class TensorSource(Protocol):
    """A folder of tensor files. `size`, `hashes` and `header` raise OSError or ValueError if the file is damaged,
    `copy` a UserError that names it; all raise UserError if the store fails."""

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def hashes(self, name: str, sha256: bool = False) -> Hashes:
        """Read all bytes of a file."""
        ...

    def header(self, name: str) -> TensorHeader:
        """Which tensors a file holds."""
        ...

    def copy(self, copies: Mapping[str, Sequence[Copy]], progress: Progress = lambda size: None) -> None:
        """Read all copies, by the file they come from."""
        ...


class LocalSource:
    """A local folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, TensorFile] = {}

    def size(self, name: str) -> int:
        """As `TensorSource.size`."""
        status = (self.folder / name).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        return status.st_size

    def hashes(self, name: str, sha256: bool = False) -> Hashes:
        """As `TensorSource.hashes`."""
        digest = hashlib.sha256() if sha256 else None
        return Hashes(file_hash(self.folder / name, digest), digest.hexdigest() if digest else "")

    def header(self, name: str) -> TensorHeader:
        """As `TensorSource.header`."""
        return TensorFile(self.folder / name).header

    def copy(self, copies: Mapping[str, Sequence[Copy]], progress: Progress = lambda size: None) -> None:
        """As `TensorSource.copy`."""
        for name, of_file in copies.items():
            with named(self.folder / name):
                if name not in self._files:
                    self._files[name] = TensorFile(self.folder / name)
                for tensor, source, out, target in of_file:
                    self._files[name].read(tensor, source, out, target)
                    progress(target.elements * ITEM_BYTES["F32"])


class RemoteSource:
    """A folder in a store. `expected`: bytes and hash of its files, by name."""

    def __init__(self, folder: RemotePath, expected: Mapping[str, tuple[int, str]], header_sizes: Mapping[str, int]):
        """header_sizes: an upper bound of the length of each file's header."""
        self.folder, self._expected, self._header_sizes = folder, expected, header_sizes
        self._headers: dict[str, TensorHeader] = {}
        self._listed: dict[str, int] | None = None

    def size(self, name: str) -> int:
        """As `TensorSource.size`. A file that is not listed, or with another size than it should have, is asked for
        itself: a listing may be old."""
        if self._listed is None:
            self._listed = list_folder(self.folder).files
        if self._listed.get(name) != self._expected[name][0]:
            size = size_of(self.folder / name)
            if size is None:
                raise FileNotFoundError(str(self.folder / name))
            self._listed[name] = size
        return self._listed[name]

    def hashes(self, name: str, sha256: bool = False) -> Hashes:
        """As `TensorSource.hashes`. If the hash is wrong, the file is read a second time."""
        first = self._hashes(name, sha256)
        return first if first.xxh3 == self._expected[name][1] else self._hashes(name, sha256)

    def _hashes(self, name: str, sha256: bool) -> Hashes:
        xxh3, sha = xxhash.xxh3_128(), hashlib.sha256()
        for one in read_ranges(self._parts(name, self._expected[name][0])):
            xxh3.update(one.buffer)
            if sha256:
                sha.update(one.buffer)
        return Hashes(xxh3.hexdigest(), sha.hexdigest() if sha256 else "")

    def _parts(self, name: str, size: int) -> Iterator[ByteRange]:
        for begin in range(0, size, PART_BYTES):
            buffer = memoryview(bytearray(min(PART_BYTES, size - begin)))
            yield ByteRange(self.folder / name, begin, buffer)

    def header(self, name: str) -> TensorHeader:
        """As `TensorSource.header`."""
        self._read_headers([name])
        return self._headers[name]

    def copy(self, copies: Mapping[str, Sequence[Copy]], progress: Progress = lambda size: None) -> None:
        """As `TensorSource.copy`."""
        self._read_headers(copies)
        plans = [self._plan(name, of_file) for name, of_file in copies.items() if of_file]
        merge_ranges(plans)
        damaged = read_plans(self.folder, [(one, self._digest_of(one)) for one in plans], progress)
        for plan in damaged:
            log.warning("%s: its hash is not the one in %s; reading it again", self.folder / plan.name, MANIFEST_FILE)
            if read_plans(self.folder, [(plan, self._digest_of(plan))], lambda size: None):
                raise UserError(
                    f"is damaged: its hash is not the one in {MANIFEST_FILE}; copy it to the store again, or give "
                    "another checkpoint",
                    str(self.folder / plan.name),
                )

    def _read_headers(self, names: Iterable[str]) -> None:
        sizes = {name: self._expected[name][0] for name in names if name not in self._headers}
        self._headers |= read_headers(self.folder, sizes, self._header_sizes)

    def _plan(self, name: str, copies: Sequence[Copy]) -> FilePlan:
        header = self._headers[name]
        with named(self.folder / name):
            begins = [header.check_region(copy.tensor, copy.source) for copy in copies]
        return plan_file(name, copies, begins)

    def _digest_of(self, plan: FilePlan) -> "_Digest | None":
        """None unless all of the file is read."""
        header = self._headers[plan.name].content
        size, expected = self._expected[plan.name]
        if plan.blocks != [(len(header), size)]:
            return None
        return _Digest(header, expected)


class _Digest:
    """The hash of a file that arrives in order."""

    def __init__(self, header: bytes, expected: str):
        self._xxh3, self._expected = xxhash.xxh3_128(header), expected
        self.update = self._xxh3.update

    @property
    def is_right(self) -> bool:
        return self._xxh3.hexdigest() == self._expected


def read_plans(
    folder: RemotePath, plans: Sequence[tuple[FilePlan, _Digest | None]], progress: Progress
) -> list[FilePlan]:
    """Read the planned ranges into their arrays. Returns the files whose hash is wrong."""
    requested: deque[tuple[FilePlan, int, list[tuple[int, memoryview]]]] = deque()

    def ranges() -> Iterator[ByteRange]:
        for plan, _ in plans:
            for begin, end in plan.parts():
                targets = list(plan.targets_in(begin, end))
                if len(targets) == 1 and len(targets[0][1]) == end - begin:  # read without a copy
                    requested.append((plan, end - begin, []))
                    yield ByteRange(folder / plan.name, begin, targets[0][1])
                else:
                    requested.append((plan, 0, targets))
                    yield ByteRange(folder / plan.name, begin, memoryview(bytearray(end - begin)))

    digests = {plan.name: digest for plan, digest in plans if digest}
    for one in read_ranges(ranges()):
        plan, size, targets = requested.popleft()
        if plan.name in digests:
            digests[plan.name].update(one.buffer)
        for low, target in targets:
            target[:] = one.buffer[low - one.begin : low - one.begin + len(target)]
            size += len(target)
        progress(size)
    return [plan for plan, digest in plans if digest and not digest.is_right]


def read_headers(
    folder: RemotePath, sizes: Mapping[str, int], guesses: Mapping[str, int] | None = None, any_float: bool = False
) -> dict[str, TensorHeader]:
    """The headers of files of a store, whose `sizes` are in bytes, several at once. `guesses`: an upper bound of a
    header's length, with which one request reads it. Raises UserError that names a file which is not of this format."""
    guessed = {name: min(size, guesses[name] if guesses else FIRST_READ) for name, size in sizes.items()}
    ranges = [ByteRange(folder / name, 0, memoryview(bytearray(guess))) for name, guess in guessed.items()]
    headers = {}
    for (name, size), one in zip(sizes.items(), read_ranges(ranges), strict=True):
        with named(one.path):
            content = bytes(one.buffer)
            if (missing := header_bytes(content, size) - len(content)) > 0:
                rest = memoryview(bytearray(missing))
                read_range(ByteRange(one.path, len(content), rest))
                content += bytes(rest)
            headers[name] = TensorHeader(content, size, any_float)
    return headers


@contextmanager
def named(path: AnyPath) -> Iterator[None]:
    """Errors of a file name it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({reason(error)})", str(path)) from None


def read_text(path: AnyPath, limit: int) -> str:
    """A small text file, local or in a store. Raises FileNotFoundError, OSError, ValueError, or UserError if the store
    fails."""
    if isinstance(path, Path):
        return read_regular_file(path, limit)
    try:
        return read_object(path.url, limit).decode("utf-8")
    except Unavailable as error:
        if error.missing:
            raise FileNotFoundError(str(path)) from None
        raise


def exists(path: AnyPath) -> bool:
    """Whether there is a file of this name. Raises UserError if a store fails."""
    return path.exists() if isinstance(path, Path) else size_of(path) is not None
