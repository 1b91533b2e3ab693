"""One attempt to read a file of a store, by the scheme of its URL. What fails is retried in fetch.py.

s3 is read with boto3, which resumes within an object; http, https, hf and file with fsspec, the others (gs, oci, azure,
azure-dl, sftp) with streaming's own downloaders. Each module is imported when its scheme is first used.

The trap: clients hold connections and threads, which do not survive a fork, so each process creates its own.

Decisions: DATA-26.
"""

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mythos_dist.errors import UserError
from mythos_dist.urls import scheme_of

CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0  # READ_SECONDS: without a byte
CHUNK_BYTES = 1 << 20
# A connection that is slower for SLOW_SECONDS is closed, and the attempt repeated: others may be fast.
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 30.0, 10_000
_FSSPEC = ("http", "https", "hf", "file")
_STREAMING = ("gs", "oci", "azure", "azure-dl", "sftp")
SCHEMES = ("s3", *_FSSPEC, *_STREAMING)


class TooLarge(Exception):
    """The file has more bytes than its index says."""


class TooSlow(Exception):
    """The connection is slower than SLOW_BYTES_PER_SECOND."""


def read_into(url: str, file: IO[bytes], limit: int) -> None:
    """Append the bytes of `url` after the first `file.tell()` ones, which the file has from an earlier attempt.

    Raises TooLarge after `limit` bytes in all, TooSlow, and whatever the backend's library raises.
    """
    begin = file.tell()
    if scheme_of(url) == "s3":
        chunks = _s3_chunks(url, begin)
    elif scheme_of(url) in _FSSPEC:
        chunks = _after(begin, _fsspec_chunks(url))
    else:
        chunks = _after(begin, _streaming_chunks(url))
    window_began, window_bytes = time.monotonic(), 0
    for chunk in chunks:
        if file.tell() + len(chunk) > limit:
            raise TooLarge(f"it has more than {limit:,} bytes")
        file.write(chunk)
        window_bytes += len(chunk)
        if (seconds := time.monotonic() - window_began) > SLOW_SECONDS:
            if window_bytes < SLOW_BYTES_PER_SECOND * seconds:
                raise TooSlow(f"only {window_bytes / seconds / 1000:.1f} kB/s for {seconds:.0f} s")
            window_began, window_bytes = time.monotonic(), 0


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
    bucket, key = bucket_and_key(url)
    wanted = {"Range": f"bytes={begin}-"} if begin else {}
    body = s3_client().get_object(Bucket=bucket, Key=key, **wanted)["Body"]
    try:
        yield from body.iter_chunks(CHUNK_BYTES)  # raises if the body ends before its Content-Length
    finally:
        body.close()


def bucket_and_key(url: str) -> tuple[str, str]:
    """Of an s3 URL."""
    parts = urlsplit(url, allow_fragments=False)
    return parts.netloc, parts.path.lstrip("/") + (f"?{parts.query}" if parts.query else "")


def s3_client() -> Any:
    """boto3's client of this process; thread-safe."""
    return _s3_client(os.getpid())


def forget_clients() -> None:
    """The next request reads credentials again."""
    _s3_client.cache_clear()


@functools.lru_cache(maxsize=1)
def _s3_client(process: int) -> Any:
    """Without credentials, requests are not signed: public buckets."""
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config

    session = Session()
    settings = {} if session.get_credentials() else {"signature_version": UNSIGNED}
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": 1},  # fetch.py retries
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # other stores refuse CRC headers; write.py sends Content-MD5
        **settings,
    )
    # boto3 itself reads AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_S3; S3_ENDPOINT_URL is streaming's own name.
    named = any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))
    return session.client("s3", config=config, endpoint_url=None if named else os.environ.get("S3_ENDPOINT_URL"))


def _fsspec_chunks(url: str) -> Iterator[bytes]:
    import fsspec

    options: dict[str, Any] = {}
    how: dict[str, Any] = {} if scheme_of(url) == "file" else {"block_size": 0}  # 0: one request, read as it arrives
    if scheme_of(url) in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        how["size"] = 1  # any: else fsspec asks for it first, and reports every failure as a missing file
        options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    with filesystem.open(path, "rb", **how) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _streaming_chunks(url: str) -> Iterator[bytes]:
    """Streaming's downloaders write a file; it is in the system's temporary folder until it is copied."""
    from streaming.base.storage import CloudDownloader

    with tempfile.TemporaryDirectory(prefix="mythos-download-") as folder:
        target = Path(folder, "object")
        CloudDownloader.direct_download(url, str(target), timeout=READ_SECONDS)
        with target.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
