"""Upload files of any size to a store: several parts and files at once, and nothing under its name before all of it.

On s3 every file is a multipart upload, a small one too. It appears with its last request, which fails once the upload
was aborted: so `abort_uploads` ends what an earlier writer, perhaps a suspended one, was about to publish, as a rename
does that finds no source (`checkpoint/fence.py`). In a folder (`file://`) the temporary file is that source.

Every part is sent with its MD5, and the file's XXH3 is compared with the one that the caller expects before the last
request; the store keeps it with the object, so that `find_stored` can tell whether an object is a certain file.

Decisions: CHECKPOINT-15, CHECKPOINT-16.
"""

import base64
import hashlib
import io
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from mythos_dist.errors import UserError
from mythos_dist.files import fsync_file, reason
from mythos_dist.store import s3
from mythos_dist.store.fetch import SHARD_PATIENCE, Unavailable, retry
from mythos_dist.store.write import check_writable, local_path
from mythos_dist.urls import scheme_of

PART_BYTES, MAX_PARTS = 16 << 20, 10_000  # MAX_PARTS: of S3
THREADS = 8  # parts that are sent at once: a connection often has 20 to 80 MB/s
DIGEST = "xxh3-128"  # key of an object's metadata
_UNFINISHED = ".unfinished-"  # in names of temporary files of `file://`


class Stored(NamedTuple):
    """A file of a store."""

    bytes: int
    digest: str  # xxh3_128; "" if it was not written by `Uploader`


class ChangedError(Exception):
    """A local file does not have the expected digest: it is damaged, or was replaced meanwhile."""


class AbortedError(UserError):
    """Another writer has aborted the upload. A UserError, which is not retried."""


class Uploader:
    """Threads that send parts; used by several threads, each of which uploads a file."""

    def __init__(self, patience: float = SHARD_PATIENCE, threads: int = THREADS):
        """`patience`: seconds until a request that fails is given up."""
        self._patience = patience
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="upload")
        self._free = threading.BoundedSemaphore(threads)  # parts in memory

    def upload(
        self,
        url: str,
        source: Path | bytes,
        digest: str,
        before_last: Callable[[], None] = lambda: None,
    ) -> int:
        """Write a file; one that exists is replaced. Returns its bytes.

        before_last: called before the request, or rename, that shows the file under its name. Raises Unavailable,
        ChangedError, AbortedError, OSError if the source cannot be read, and what `before_last` raises.
        """
        check_writable(url)
        if scheme_of(url) == "file":
            return _copy(url, source, digest, before_last)
        bucket, key = s3.bucket_and_key(url)
        target: dict[str, Any] = {"Bucket": bucket, "Key": key}
        begin = s3.client().create_multipart_upload
        target["UploadId"] = self._retry(url, lambda: begin(**target, Metadata={DIGEST: digest}))["UploadId"]
        try:
            parts, size = self._send_parts(url, target, source, digest)
            before_last()
            self._complete(url, target, parts, digest)
        except BaseException:
            with suppress(Exception):  # the next start aborts it
                s3.client().abort_multipart_upload(**target)
            raise
        return size

    def find(self, url: str) -> Stored | None:
        """The size and digest of a file; None if there is none. Raises Unavailable."""
        return find_stored(url, self._patience)

    def _retry(self, url: str, request: Callable[[], Any]) -> Any:
        return retry(url, request, self._patience, "written")

    def _send_parts(self, url: str, target: dict[str, Any], source: Path | bytes, digest: str) -> tuple[list, int]:
        """Returns the list of parts for the last request, and the bytes of the file."""
        hashed, sent, size = xxhash.xxh3_128(), [], 0
        with _opened(source) as stream:
            length = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            part_bytes = max(PART_BYTES, -(-length // MAX_PARTS))
            failed = threading.Event()
            try:
                while not failed.is_set():
                    self._free.acquire()
                    block = stream.read(part_bytes)
                    if sent and not block:
                        self._free.release()
                        break
                    hashed.update(block)
                    size += len(block)
                    sent.append(self._pool.submit(self._send, url, target, len(sent) + 1, block, failed))
            finally:
                problems = [future.exception() for future in sent]
        if problem := next((one for one in problems if one), None):
            raise problem
        if hashed.hexdigest() != digest:
            raise ChangedError(f"{source if isinstance(source, Path) else url} is not what its manifest says")
        return [{"PartNumber": i, "ETag": future.result()} for i, future in enumerate(sent, 1)], size

    def _send(self, url: str, target: dict[str, Any], number: int, block: bytes, failed: threading.Event) -> str:
        """In a thread: send a part; returns the store's tag of it."""
        try:
            md5 = base64.b64encode(hashlib.md5(block, usedforsecurity=False).digest()).decode()

            def send() -> Any:
                return s3.client().upload_part(**target, PartNumber=number, Body=block, ContentMD5=md5)

            return self._retry(url, lambda: _unless_aborted(send))["ETag"]
        except BaseException:
            failed.set()
            raise
        finally:
            self._free.release()

    def _complete(self, url: str, target: dict[str, Any], parts: list[dict[str, Any]], digest: str) -> None:
        """The last request. If its answer was lost, the next attempt is refused, although the file is there."""
        attempts = 0

        def complete() -> None:
            nonlocal attempts
            attempts += 1
            try:
                client = s3.client()
                _unless_aborted(lambda: client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}))
            except AbortedError:
                stored = self.find(url) if attempts > 1 else None
                if stored is None or stored.digest != digest:
                    raise

        self._retry(url, complete)


def find_stored(url: str, patience: float = SHARD_PATIENCE) -> Stored | None:
    """The size and digest of a file, of `file://` by reading it; None if there is none. Raises Unavailable."""
    check_writable(url)

    def head() -> Stored | None:
        if scheme_of(url) == "file":
            file = local_path(url)
            return Stored(file.stat().st_size, _digest_of(file)) if file.is_file() else None
        try:
            about = s3.head(url)
        except s3.client().exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:  # HEAD has no body, so no code
                return None
            raise
        return Stored(about.bytes, about.metadata.get(DIGEST, ""))

    return retry(url, head, patience)


def abort_uploads(url: str, patience: float = SHARD_PATIENCE) -> int:
    """Abort all unfinished uploads below the folder `url`; returns their number. Raises Unavailable."""
    check_writable(url)

    def abort() -> int:
        if scheme_of(url) == "file":
            files = list(local_path(url).rglob(f".*{_UNFINISHED}*"))
            for file in files:
                file.unlink(missing_ok=True)
            return len(files)
        bucket, prefix = s3.bucket_and_prefix(url)
        client, number = s3.client(), 0
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for one in page.get("Uploads", ()):
                with suppress(AbortedError):
                    target = {"Key": one["Key"], "UploadId": one["UploadId"]}
                    _unless_aborted(lambda target=target: client.abort_multipart_upload(Bucket=bucket, **target))
                number += 1
        return number

    return retry(url, abort, patience, "searched for unfinished uploads")


def _unless_aborted(request: Callable[[], Any]) -> Any:
    """`request()`. Raises AbortedError if the store does not know the upload any more."""
    from botocore.exceptions import ClientError

    try:
        return request()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") == "NoSuchUpload":
            raise AbortedError("the upload was aborted by another start") from None
        raise


def _opened(source: Path | bytes) -> IO[bytes]:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0)


def digest_of(content: bytes) -> str:
    """The digest of a small file."""
    return xxhash.xxh3_128_hexdigest(content)


def _digest_of(file: Path) -> str:
    hashed = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(PART_BYTES):
            hashed.update(block)
    return hashed.hexdigest()


def _copy(url: str, source: Path | bytes, digest: str, before_last: Callable[[], None]) -> int:
    """As `Uploader.upload`, to a folder."""
    file = local_path(url)
    temporary = file.with_name(f".{file.name}{_UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}")
    hashed, size = xxhash.xxh3_128(), 0
    with _opened(source) as stream:
        try:
            with _store_errors(url):
                file.parent.mkdir(parents=True, exist_ok=True)
                copy = temporary.open("wb")
            with copy:
                while block := stream.read(PART_BYTES):
                    hashed.update(block)
                    size += len(block)
                    with _store_errors(url):
                        copy.write(block)
                with _store_errors(url):
                    fsync_file(copy)
            if hashed.hexdigest() != digest:
                raise ChangedError(f"{source if isinstance(source, Path) else file} is not what its manifest says")
            before_last()
            with _store_errors(url):
                os.replace(temporary, file)
        except FileNotFoundError:
            raise AbortedError("the upload was aborted by another start") from None
        finally:
            with suppress(OSError):
                temporary.unlink()
    return size


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """An OSError of the block is one of the store, except that a source of a rename is missing."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unavailable(f"cannot be written ({reason(error)}); check that folder and its file system", url) from None
