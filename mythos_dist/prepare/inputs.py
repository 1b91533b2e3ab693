"""Input files: found by path, folder, pattern or URL, told apart by size and hash, and opened, unpacked on the way.

Local files and everything that fsspec knows (https://, hf://, s3://, gs://, …). What a file holds follows from its
name: parquet, JSON lines, or plain text, the latter two also compressed (names.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from mythos_dist.data.manifest import LeftOut, file_sha256
from mythos_dist.data.unpack import TooLarge, unpack
from mythos_dist.errors import UserError, redact
from mythos_dist.prepare.encoding import check_encoding
from mythos_dist.prepare.listing import filesystem_of, list_files, shown
from mythos_dist.prepare.names import KIND_NAMES, KNOWN, Kind, as_text, is_url, kind_of, on_console
from mythos_dist.units import count as count_of

READ_BYTES = 1 << 20
# A file may unpack to MAX_RATIO times its size, or to MIN_UNPACKED if that is more: text takes 3 to 10 times.
MAX_RATIO = 100.0
MIN_UNPACKED = 64 << 20
MAX_REASONS = 8  # a line each, on the console
Inputs = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Source:
    """One input file: where it is, what it is called in a manifest, what it holds, its size on disk in bytes."""

    path: str
    name: str
    kind: Kind
    compression: str | None
    size: int
    max_ratio: float = MAX_RATIO

    @property
    def unpack_limit(self) -> int:
        """The most bytes of text that it may hold; a small file may unpack to any size."""
        return max(MIN_UNPACKED, int(min(self.size * self.max_ratio, 1 << 62)))

    @property
    def remote(self) -> bool:
        return is_url(self.path)


class Unreadable(UserError):
    """A file could not be read this time: over a network it may be possible the next."""


@dataclass(frozen=True)
class Listing:
    """What the inputs stand for: the files that are read, and what folders and patterns held besides."""

    sources: list[Source]
    left_out: list[LeftOut]
    unreadable: list[LeftOut]  # folders
    named: bool  # whether every input is a file

    def lines(self) -> list[str]:
        """For the console; nothing where the files that were named are the files that are read."""
        if self.named and not self.left_out:
            return []
        kinds = Counter(KIND_NAMES[source.kind] for source in self.sources)
        of = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        total = sum(source.size for source in self.sources)
        lines = [f"inputs: {count_of(len(self.sources), 'file')} ({of}), {total / 1e6:,.1f} MB"]
        if texts := [one.name for one in self.sources if one.kind == "text"] if len(kinds) > 1 else []:
            lines.append(f"note: plain text is read beside records: {_some(texts)}; give a pattern if it is not meant")
        reasons = Counter(one.reason for one in self.left_out).most_common()
        for reason, count in reasons[:MAX_REASONS]:
            some = [one.name for one in self.left_out if one.reason == reason]
            lines.append(f"not taken: {count:,} {reason}: {_some(some)}")
        if len(reasons) > MAX_REASONS:
            lines.append(f"not taken for {len(reasons) - MAX_REASONS} more reasons")
        return lines


def _some(names: list[str]) -> str:
    return redact(", ".join(map(on_console, names[:3])) + " …" * (len(names) > 3))


def list_inputs(inputs: Inputs, out: str | Path | None = None, max_ratio: float = MAX_RATIO) -> Listing:
    """The files that paths, folders (with all below them), patterns and URLs stand for: each once, in order.

    A folder's and a pattern's files are sorted by name. `out`: a folder that is not read. Raises UserError with every
    input that stands for nothing.
    """
    given = [str(one) for one in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    files, problems = list_files(given, None if out is None else str(out))
    if not given:
        problems = ["no input files; name some"]
    if not max_ratio >= 1:
        problems.insert(0, f"max_unpack_ratio={max_ratio} must be at least 1; inf allows everything")
    problems += [
        f"{one.path}: what it holds cannot be told from its name; call it {KNOWN}"
        for one in files.found
        if not kind_of(one.path)
    ]
    if problems:
        raise UserError(problems)
    names = _names([one.path for one in files.found])
    sources = [
        Source(one.path, name, kind, compression, one.size, max_ratio)
        for one, name in zip(files.found, names, strict=True)
        for kind, compression in [kind_of(one.path) or ("text", None)]
    ]
    named = len(files.found) == len(given) and all(len(one.parts) == 1 for one in files.found)
    return Listing(sources, [_redacted(one) for one in files.left_out], files.unreadable, named)


def find_sources(inputs: Inputs) -> list[Source]:
    """The files of `list_inputs`. Raises UserError also for a folder that cannot be read."""
    listing = list_inputs(inputs)
    if listing.unreadable:
        raise UserError([f"{one.name}: {one.reason} ({one.detail})" for one in listing.unreadable])
    return listing.sources


def _redacted(one: LeftOut) -> LeftOut:
    return LeftOut(as_text(redact(one.name)), one.reason, as_text(redact(one.detail)))


def content_hash(source: Source) -> str:
    """sha256 of a local file; of a remote one what its server knows without a download, or "" if it knows nothing."""
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
    """Whatever a file system or a network library raises in here becomes an Unreadable that names the file."""
    try:
        yield
    except (UserError, AssertionError):
        raise
    except Exception as error:  # every file system has errors of its own
        fault = f"cannot be read ({shown(error)}); fetch the file again, or leave it out"
        raise Unreadable(fault, source.path) from None


def open_bytes(source: Source, offset: int = 0) -> IO[bytes]:
    """The file's bytes from `offset` on, as stored."""
    if source.remote:
        filesystem, path = filesystem_of(source.path)
        stream = filesystem.open(path, "rb", block_size=8 * READ_BYTES)
    else:
        stream = open(source.path, "rb")  # noqa: SIM115
    if offset:
        stream.seek(offset)
    return stream


def read_pieces(source: Source, offset: int = 0) -> Iterator[bytes]:
    """The file's bytes in pieces of about a megabyte, unpacked if it is compressed.

    Raises OSError (or what the network's library raises) if the file cannot be read or unpacked to its end, or if it
    unpacks to more than its limit; what comes before has been yielded then.
    """
    if source.compression:
        if not source.size:
            raise OSError("0 bytes; a compressed file has at least a header, so it was not written or copied whole")
        try:
            yield from unpack(lambda: open_bytes(source), source.compression, source.unpack_limit, READ_BYTES)
        except TooLarge:
            raise OSError(too_large(source, source.unpack_limit)) from None
        return
    with open_bytes(source, offset) as stream:
        while piece := stream.read(READ_BYTES):
            yield piece


def too_large(source: Source, limit: int) -> str:
    """What is wrong with a file that holds more than `limit` bytes."""
    of = f"{source.max_ratio:g} times its size" if limit > MIN_UNPACKED else f"the limit for {source.size:,} bytes"
    return f"unpacks to more than {limit:,} bytes, {of}; if that is right, allow more with --max-unpack-ratio"


def read_text(source: Source, offset: int = 0) -> Iterator[bytes]:
    """`read_pieces` of a file that holds text. Raises WrongEncoding if it is not UTF-8 from `offset` on."""
    pieces = read_pieces(source, offset)
    if first := next(pieces, b""):
        check_encoding(first, offset)
        yield first
    yield from pieces


def _names(paths: list[str]) -> list[str]:
    """Paths below the folder that all share, so that a moved corpus keeps its names; of a URL without its query and its
    user, which may hold a secret."""
    parts = [_plain_url(path).split("/") if is_url(path) else path.split("/") for path in paths]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [as_text("/".join(part[shared:])) for part in parts]


def _plain_url(url: str) -> str:
    parts = urlsplit(url)
    return redact(parts._replace(query="", fragment="").geturl()).replace("***@", "")
