"""Files and folders of a store that are read in part: lists of names, sizes, ranges of bytes.

s3 with botocore, everything else with fsspec: streaming's downloaders read complete files only, so gs, oci and azure
need fsspec's package for each. Retries and messages are those of fetch.py.

Decisions: DATA-26, CHECKPOINT-14.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from mythos_dist.errors import UserError
from mythos_dist.store import s3
from mythos_dist.store.connection import CHUNK_BYTES, SpeedCheck, http_options
from mythos_dist.store.fetch import SHARD_PATIENCE, START_PATIENCE, Unavailable, WrongContent, retry
from mythos_dist.urls import RemotePath, scheme_of

THREADS = 16  # connections of a process; the client of s3 keeps 32
_PROTOCOLS = {"azure": "az", "azure-dl": "abfs"}  # fsspec's names of streaming's schemes


class FolderContent(NamedTuple):
    """The content of a folder."""

    folders: list[str]
    files: dict[str, int]  # bytes by name


class ByteRange(NamedTuple):
    """Bytes [begin, begin + len(buffer)) of a file, to be read into `buffer`."""

    path: RemotePath
    begin: int
    buffer: memoryview


def list_folder(path: RemotePath, patience: float = START_PATIENCE) -> FolderContent:
    """Names in a folder, without those below them; empty if there is no such folder. Raises Unavailable.

    The trap: a store may list files late, or those that were removed; what matters is asked for by its name.
    """
    try:
        return retry(path.url, lambda: _list(path), patience, "listed")
    except Unavailable as error:
        if error.missing and scheme_of(path.url) != "s3":  # s3 has no folders: it is the bucket that is missing
            return FolderContent([], {})
        raise


def size_of(path: RemotePath, patience: float = START_PATIENCE) -> int | None:
    """Bytes of a file; None if there is no such file. Raises Unavailable."""
    try:
        return retry(path.url, lambda: _size(path), patience)
    except Unavailable as error:
        if error.missing:
            return None
        raise


def version_of(path: RemotePath, patience: float = START_PATIENCE) -> str:
    """A text that changes when the file does, such as its ETag. Raises Unavailable."""
    return retry(path.url, lambda: _version(path), patience)


def read_range(wanted: ByteRange, patience: float = SHARD_PATIENCE) -> None:
    """Fill the buffer. An attempt resumes after the last byte of the one before. Raises Unavailable."""
    path, begin, buffer = wanted
    done = 0

    def attempt() -> None:
        nonlocal done
        speed = SpeedCheck()
        with _open_range(path.url, begin + done, begin + len(buffer)) as read_into:
            while done < len(buffer):
                size = read_into(buffer[done : done + CHUNK_BYTES])
                if not size:
                    raise WrongContent(f"it ends at byte {begin + done:,}")
                done += size
                speed.add(size)

    retry(path.url, attempt, patience)


def read_ranges(ranges: Iterable[ByteRange], patience: float = SHARD_PATIENCE) -> Iterator[ByteRange]:
    """Read by several threads at once; yields the ranges in their order, each when its buffer is filled.

    At most THREADS + 4 of them are begun and not yet consumed, so an iterator that allocates buffers bounds memory.
    """
    pool = ThreadPoolExecutor(THREADS, "store")
    begun: deque[tuple[ByteRange, Future[None]]] = deque()
    try:
        for one in ranges:
            begun.append((one, pool.submit(read_range, one, patience)))
            if len(begun) >= THREADS + 4:
                yield _finished(*begun.popleft())
        while begun:
            yield _finished(*begun.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(one: ByteRange, future: Future[None]) -> ByteRange:
    future.result()
    return one


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    import fsspec

    scheme, rest = scheme_of(url), url.partition("://")[2]
    options = http_options() if scheme in ("http", "https") else {}
    return fsspec.core.url_to_fs(f"{_PROTOCOLS.get(scheme, scheme)}://{rest}", **options)


def _list(path: RemotePath) -> FolderContent:
    if scheme_of(path.url) == "s3":
        folders, objects = s3.list_objects(path.url, recursive=False)
        return FolderContent(folders, {name: one.bytes for name, one in objects.items()})
    filesystem, inside = _filesystem(path.url)
    filesystem.invalidate_cache()
    entries = [(one["name"].rstrip("/").rpartition("/")[2], one) for one in filesystem.ls(inside, detail=True)]
    folders = [name for name, one in entries if one["type"] == "directory" or one["name"].endswith("/")]
    return FolderContent(folders, {name: one["size"] or 0 for name, one in entries if name not in folders})


def _size(path: RemotePath) -> int:
    if scheme_of(path.url) == "s3":
        return s3.head(path.url).bytes
    filesystem, inside = _filesystem(path.url)
    about = filesystem.info(inside)
    if about["type"] == "directory":
        raise FileNotFoundError(f"{inside} is a folder")
    return about["size"]


def _version(path: RemotePath) -> str:
    if scheme_of(path.url) == "s3":
        return s3.head(path.url).etag
    filesystem, inside = _filesystem(path.url)
    return str(filesystem.ukey(inside))


@contextmanager
def _open_range(url: str, begin: int, end: int) -> Iterator[Callable[[memoryview], int]]:
    """A function that fills a buffer with the next bytes of [begin, end), and returns how many; 0 at the end."""
    scheme = scheme_of(url)
    if scheme == "s3":
        with s3.open_object(url, begin, end) as body:
            yield body.readinto
        return
    filesystem, inside = _filesystem(url)
    if scheme in ("http", "https"):
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        # block_size 0: one request, read as it arrives; size: any, else fsspec asks for it first.
        file = filesystem.open(inside, "rb", block_size=0, size=1, headers=headers)
        if begin and file.r.status == 200:
            file.close()
            raise UserError("its server does not support ranges of bytes; copy the folder to a disk", url)
    else:
        file = filesystem.open(inside, "rb", block_size=end - begin, cache_type="readahead")
        file.seek(begin)
    with file:

        def read_into(buffer: memoryview) -> int:
            chunk = file.read(len(buffer))
            buffer[: len(chunk)] = chunk
            return len(chunk)

        yield read_into
