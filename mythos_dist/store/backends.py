"""One attempt to read a file of a store, by the scheme of its URL. What fails is retried in fetch.py.

s3 is read with botocore (s3.py), which resumes within an object; http, https, hf and file with fsspec, the others (gs,
oci, azure, azure-dl, sftp) with streaming's own downloaders. Each module is imported when its scheme is first used.

Decisions: DATA-26.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mythos_dist.errors import UserError
from mythos_dist.store import connection, s3
from mythos_dist.store.connection import CHUNK_BYTES, SpeedCheck, http_options
from mythos_dist.urls import scheme_of

_FSSPEC = ("http", "https", "hf", "file")
_STREAMING = ("gs", "oci", "azure", "azure-dl", "sftp")
SCHEMES = ("s3", *_FSSPEC, *_STREAMING)


class LongerThanExpected(Exception):
    """The file has more bytes than its index says."""


def read_into(url: str, file: IO[bytes], limit: int) -> None:
    """Append the bytes of `url` after the first `file.tell()` ones, which the file has from an earlier attempt.

    Raises LongerThanExpected after `limit` bytes in all, TooSlow, and whatever the backend's library raises.
    """
    begin = file.tell()
    if scheme_of(url) == "s3":
        chunks = _s3_chunks(url, begin)
    elif scheme_of(url) in _FSSPEC:
        chunks = _after(begin, _fsspec_chunks(url))
    else:
        chunks = _after(begin, _streaming_chunks(url))
    speed = SpeedCheck()
    for chunk in chunks:
        if file.tell() + len(chunk) > limit:
            raise LongerThanExpected(f"it has more than {limit:,} bytes")
        file.write(chunk)
        speed.add(len(chunk))


def check_scheme(url: str) -> None:
    """Raises UserError for a URL that no backend reads."""
    if scheme_of(url) not in SCHEMES:
        raise UserError(f"the scheme {scheme_of(url)}:// is not read; use one of {', '.join(SCHEMES)}", url)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"is not a valid URL ({error}); correct it", url) from None
    if not (parts.netloc or scheme_of(url) == "file"):
        raise UserError("names no bucket or host after ://; correct it, such as s3://bucket/folder", url)


def _after(begin: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks without the first `begin` bytes, which have been read before."""
    for chunk in chunks:
        if begin < len(chunk):
            yield chunk[begin:]
        begin = max(0, begin - len(chunk))


def _s3_chunks(url: str, begin: int) -> Iterator[bytes]:
    with s3.open_object(url, begin) as body:
        yield from body.iter_chunks(CHUNK_BYTES)


def _fsspec_chunks(url: str) -> Iterator[bytes]:
    import fsspec

    options: dict[str, Any] = {}
    how: dict[str, Any] = {} if scheme_of(url) == "file" else {"block_size": 0}  # 0: one request, read as it arrives
    if scheme_of(url) in ("http", "https"):
        how["size"] = 1  # any: else fsspec asks for it first, and reports every failure as a missing file
        options = {**http_options(), "headers": {"Accept-Encoding": "identity"}}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    with filesystem.open(path, "rb", **how) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _streaming_chunks(url: str) -> Iterator[bytes]:
    """Streaming's downloaders write a file; it is in the system's temporary folder until it is copied."""
    from streaming.base.storage import CloudDownloader

    with tempfile.TemporaryDirectory(prefix="mythos-download-") as folder:
        target = Path(folder, "object")
        CloudDownloader.direct_download(url, str(target), timeout=connection.READ_SECONDS)
        with target.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
