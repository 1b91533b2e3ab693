"""Write, list and remove files of a store, with the retries and messages of fetch.py.

s3 with botocore, `file://` for folders that are mounted; the other schemes are only read. A file is there completely or
not at all: s3 shows an object when its last byte has arrived and its MD5 is right, and a local file is renamed.

Decisions: DATA-30.
"""

import base64
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from mythos_dist.errors import UserError
from mythos_dist.files import write_atomically
from mythos_dist.store import s3
from mythos_dist.store.backends import check_scheme
from mythos_dist.store.fetch import SHARD_PATIENCE, retry
from mythos_dist.urls import scheme_of

WRITABLE = ("s3", "file")
KEYS_PER_REQUEST = 1000  # of DeleteObjects


def check_writable(url: str) -> None:
    """Raises UserError for a URL that `put` does not write."""
    check_scheme(url)
    if scheme_of(url) not in WRITABLE:
        raise UserError(
            f"{scheme_of(url)}:// is read, but not written; use s3:// (also of other stores, with AWS_ENDPOINT_URL: "
            "https://storage.googleapis.com, for example), or a folder, and copy it there",
            url,
        )


def put(
    url: str,
    content: bytes | Path,
    patience: float = SHARD_PATIENCE,
    *,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Write a file of at most 5 GB in one request; an existing one is replaced. Raises Unavailable, or OSError if the
    local file cannot be read."""
    check_writable(url)
    if scheme_of(url) == "file":
        retry(url, lambda: _put_locally(local_path(url), content), patience, "written", wait=wait)
        return
    bucket, key = s3.bucket_and_key(url)
    digest = base64.b64encode(_md5(content)).decode()

    def upload() -> None:
        with _open(content) as body:
            s3.client().put_object(Bucket=bucket, Key=key, Body=body, ContentMD5=digest)

    retry(url, upload, patience, "written", wait=wait)


def list_files(url: str, patience: float = SHARD_PATIENCE) -> dict[str, int]:
    """Bytes of all files below the folder `url`, by their names below it; empty if there is no such folder."""
    check_writable(url)
    if scheme_of(url) == "file":
        return retry(url, lambda: dict(_list_locally(local_path(url))), patience, "listed")
    _, objects = retry(url, lambda: s3.list_objects(url, recursive=True), patience, "listed")
    return {name: one.bytes for name, one in objects.items()}


def remove(urls: Iterable[str], patience: float = SHARD_PATIENCE) -> None:
    """Remove files of one bucket or folder; those that do not exist are ignored."""
    given = list(urls)
    for begin in range(0, len(given), KEYS_PER_REQUEST):
        _remove(given[begin : begin + KEYS_PER_REQUEST], patience)


def _remove(urls: list[str], patience: float) -> None:
    check_writable(urls[0])
    if scheme_of(urls[0]) == "file":
        for url in urls:
            retry(url, lambda url=url: local_path(url).unlink(missing_ok=True), patience, "removed")
        return
    bucket, _ = s3.bucket_and_key(urls[0])
    keys = [{"Key": s3.bucket_and_key(url)[1]} for url in urls]

    def delete() -> None:
        answer = s3.client().delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        if errors := answer.get("Errors"):
            code = errors[0].get("Code", "")
            raise (PermissionError if code == "AccessDenied" else RuntimeError)(f"{code}: {errors[0].get('Message')}")

    retry(urls[0], delete, patience, "removed")


def _md5(content: bytes | Path) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    with _open(content) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def _open(content: bytes | Path) -> IO[bytes]:
    return io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")


def local_path(url: str) -> Path:
    """The path of a file:// URL. As fsspec reads it: nothing is quoted."""
    return Path(url.removeprefix("file://"))


def _put_locally(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content if isinstance(content, bytes) else content.read_bytes())


def _list_locally(root: Path) -> Iterator[tuple[str, int]]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path.stat().st_size
