"""An input file, local or remote (through fsspec): its identity, and its bytes, decompressed while they are read.

Decisions: DATA-9.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mythos_dist.data.decompress import TooLarge, decompress, decompress_intact
from mythos_dist.data.manifest import file_sha256
from mythos_dist.errors import UserError
from mythos_dist.prepare.encoding import check_encoding
from mythos_dist.prepare.names import FileKind
from mythos_dist.prepare.remote_files import describe_error, filesystem_of
from mythos_dist.urls import is_url

READ_BYTES = 1 << 20
# A file may unpack to MAX_RATIO times its size, or to MIN_UNPACKED bytes if that is more. Text takes 3 to 10 times.
MAX_RATIO = 100.0
MIN_UNPACKED = 64 << 20
Inputs = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Source:
    """An input file: its path or URL, name in the manifest, format, compression and size on disk in bytes."""

    path: str
    name: str
    kind: FileKind
    compression: str | None
    size: int
    max_ratio: float = MAX_RATIO
    only_intact: bool = False  # of a damaged compressed file, only what is certainly right; reads it twice

    @property
    def unpack_limit(self) -> int:
        """The maximum size of the unpacked file in bytes."""
        return max(MIN_UNPACKED, int(min(self.size * self.max_ratio, 1 << 62)))

    @property
    def remote(self) -> bool:
        return is_url(self.path)


class Unreadable(UserError):
    """A file could not be read; over a network another attempt may succeed."""


def content_hash(source: Source) -> str:
    """sha256 of a local file; of a remote file, what its server provides without a download, or "" if nothing."""
    with reading(source):
        if not source.remote:
            return f"sha256:{file_sha256(Path(source.path))}"
        filesystem, path = filesystem_of(source.path)
        info = filesystem.info(path)
    lfs = info.get("lfs")  # huggingface_hub
    if sha256 := (lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)):
        return f"sha256:{sha256}"
    etag = info.get("ETag") or info.get("etag")
    return f"etag:{etag}".replace('"', "") if etag else ""


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn any error of a file system or network library in the block into an Unreadable that names the file."""
    try:
        yield
    except (UserError, AssertionError):
        raise
    except Exception as error:  # each file system has its own exceptions
        problem = f"cannot be read ({describe_error(error)}); fetch the file again, or leave it out"
        raise Unreadable(problem, source.path) from None


def open_bytes(source: Source, offset: int = 0) -> IO[bytes]:
    """The file's stored bytes from `offset` on."""
    if source.remote:
        filesystem, path = filesystem_of(source.path)
        stream = filesystem.open(path, "rb", block_size=8 * READ_BYTES)
    else:
        stream = open(source.path, "rb")  # noqa: SIM115
    if offset:
        stream.seek(offset)
    return stream


def read_pieces(source: Source, offset: int = 0) -> Iterator[bytes]:
    """The file's bytes in pieces of about a megabyte, decompressed.

    Raises OSError (or the network library's error) if the file cannot be read or decompressed to its end, or if it
    unpacks to more than its limit; the pieces before that have been yielded. Of a damaged compressed file they may be
    wrong, except with `only_intact`.
    """
    if source.compression:
        if not source.size:
            raise OSError(
                "0 bytes; a compressed file has at least a header, so it was not written or copied completely"
            )
        try:
            read = decompress_intact if source.only_intact else decompress
            yield from read(lambda: open_bytes(source), source.compression, source.unpack_limit, READ_BYTES)
        except TooLarge:
            raise OSError(too_large(source, source.unpack_limit)) from None
        return
    with open_bytes(source, offset) as stream:
        while piece := stream.read(READ_BYTES):
            yield piece


def too_large(source: Source, limit: int) -> str:
    """The message for a file that unpacks to more than `limit` bytes."""
    by_ratio = limit > MIN_UNPACKED
    meaning = f"{source.max_ratio:g} times its size" if by_ratio else f"the limit for {source.size:,} bytes"
    return f"unpacks to more than {limit:,} bytes, {meaning}; if this is intended, raise --max-unpack-ratio"


def read_source(source: Source, offset: int = 0) -> Iterator[bytes]:
    """`read_pieces` of a file that holds text. Raises WrongEncoding if it is not UTF-8 from `offset` on."""
    pieces = read_pieces(source, offset)
    if first := next(pieces, b""):
        check_encoding(first, offset)
        yield first
    yield from pieces
