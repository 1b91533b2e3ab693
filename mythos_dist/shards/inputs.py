"""Input files: found by path, folder, pattern or URL, told apart by size and hash, and opened, unpacked on the way.

Local files and everything that fsspec knows (https://, hf://, s3://, gs://, …). What a file holds follows from its
name: parquet, JSON lines, or plain text, the latter two also with .gz or .zst.
"""

import glob
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa

from mythos_dist.data.manifest import file_sha256
from mythos_dist.errors import UserError

Kind = Literal["parquet", "jsonl", "text"]
SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # C4 and others name their JSON lines so
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READ_BYTES = 1 << 20
KNOWN = "name.parquet, name.jsonl or name.txt, the latter two also with .gz or .zst"
Inputs = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Source:
    """One input file: where it is, what it is called in a manifest, what it holds, its size on disk in bytes."""

    path: str
    name: str
    kind: Kind
    compression: str | None
    size: int

    @property
    def remote(self) -> bool:
        return is_url(self.path)


class Unreadable(UserError):
    """A file could not be read this time: over a network it may be possible the next."""


def is_url(path: str) -> bool:
    """Whether fsspec and not the operating system opens `path`."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def find_sources(inputs: Inputs) -> list[Source]:
    """The files that paths, folders (with all below them), patterns and URLs stand for: each once, in order.

    A folder's and a pattern's files are sorted by name. Raises UserError with every input that stands for nothing.
    """
    given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    found: dict[str, int] = {}  # path -> size
    problems: list[str] = []
    for one in map(str, given):
        try:
            found.update(dict(_expand_url(one) if is_url(one) else _expand_local(one)))
        except UserError as error:
            problems += [f"{one}: {problem}" for problem in error.problems]
    if not given:
        problems = ["no input files; name some"]
    problems += [
        f"{path}: what it holds cannot be told from its name; call it {KNOWN}" for path in found if not kind_of(path)
    ]
    if problems:
        raise UserError(problems)
    names = _names(list(found))
    return [
        Source(path, name, kind, compression, size)
        for (path, size), name in zip(found.items(), names, strict=True)
        for kind, compression in [kind_of(path) or ("text", None)]
    ]


def kind_of(path: str) -> tuple[Kind, str | None] | None:
    """What a file of this name holds and how it is compressed; None for other names."""
    stem, suffix = posixpath.splitext(urlsplit(path).path if is_url(path) else path)
    compression = COMPRESSIONS.get(suffix.lower())
    if compression:
        suffix = posixpath.splitext(stem)[1]
    kind = SUFFIXES.get(suffix.lower())
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def content_hash(source: Source) -> str:
    """sha256 of a local file; of a remote one what its server knows without a download, or "" if it knows nothing."""
    with reading(source):
        if not source.remote:
            return f"sha256:{file_sha256(Path(source.path))}"
        filesystem, path = _filesystem(source.path)
        info = filesystem.info(path)
    lfs = info.get("lfs")  # huggingface_hub
    if sha256 := (lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)):
        return f"sha256:{sha256}"
    etag = info.get("ETag") or info.get("etag")
    return f"etag:{etag}".replace('"', "") if etag else ""


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Whatever a file system or a network library raises in here becomes an Unreadable that names the file."""
    try:
        yield
    except (UserError, AssertionError):
        raise
    except Exception as error:  # every file system has errors of its own
        fault = f"cannot be read ({_shown(error)}); fetch the file again, or leave it out"
        raise Unreadable(fault, source.path) from None


def open_bytes(source: Source, offset: int = 0) -> IO[bytes]:
    """The file's bytes from `offset` on, as stored."""
    if source.remote:
        filesystem, path = _filesystem(source.path)
        stream = filesystem.open(path, "rb", block_size=8 * READ_BYTES)
    else:
        stream = open(source.path, "rb")  # noqa: SIM115
    if offset:
        stream.seek(offset)
    return stream


def read_pieces(source: Source, offset: int = 0) -> Iterator[bytes]:
    """The file's bytes in pieces of about a megabyte, unpacked if it is compressed.

    Raises OSError (or what the network's library raises) if the file cannot be read or unpacked to its end.
    """
    with open_bytes(source, offset) as stored:
        stream: Any = pa.input_stream(stored, compression=source.compression) if source.compression else stored
        while piece := stream.read(READ_BYTES):
            yield piece


def _expand_local(path: str) -> list[tuple[str, int]]:
    path = os.path.abspath(os.path.expanduser(path))  # a file given in two ways is one file
    if os.path.isfile(path):
        found = [path]
    elif os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if file.is_file() and kind_of(str(file)))
        if not found:
            raise UserError(f"the folder holds no file called {KNOWN}")
    else:
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise UserError("no such file or folder, and as a pattern it matches nothing")
    return [(file, os.path.getsize(file)) for file in found]


def _expand_url(url: str) -> list[tuple[str, int]]:
    try:
        filesystem, path = _filesystem(url)
        if any(sign in path for sign in "*?[") and not kind_of_query(url):
            found = sorted(file for file in filesystem.glob(path))
        elif kind_of(url):  # not asked whether it is a folder: over HTTP that would fetch the whole file
            found = [path]
        else:
            found = sorted(file for file in filesystem.find(path) if kind_of(file))
        if not found:
            raise UserError(f"nothing there that is called {KNOWN}")
        sizes = [filesystem.info(file).get("size") for file in found]
    except UserError:
        raise
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot be found or reached ({_shown(error)})") from None
    if unknown := [file for file, size in zip(found, sizes, strict=True) if size is None]:
        raise UserError(f"the server does not say how large {unknown[0]} is; download it first")
    return [(str(filesystem.unstrip_protocol(file)), int(size)) for file, size in zip(found, sizes, strict=True)]


def kind_of_query(url: str) -> bool:
    """Whether the `?` of a URL begins its query and is no pattern: https://host/a.parquet?download=true."""
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and bool(parts.query) and not any(sign in parts.path for sign in "*[")


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Raises UserError where a package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url.split('://')[0]}:// needs another package: {error}") from None
    except ValueError as error:
        raise UserError(f"cannot be opened: {error}") from None


def _names(paths: list[str]) -> list[str]:
    """Paths below the folder that all share, so that a moved corpus keeps its names; of a URL without its query, which
    may hold a secret."""
    parts = [
        urlsplit(path)._replace(query="").geturl().split("/") if is_url(path) else os.path.abspath(path).split(os.sep)
        for path in paths
    ]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def _shown(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
