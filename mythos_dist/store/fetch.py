"""Read files of a store until they are complete: retries with backoff and jitter, then one message that names the file.
`retry` is the one place of retries, also of those that write (write.py).

A file that is missing or that may not be read is tried twice (stores list and grant with a delay), everything else
until `patience` seconds have passed. A retry on s3 resumes after the last byte received.

Decisions: DATA-26, DATA-27.
"""

import errno
import io
import logging
import random
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

from mythos_dist.errors import UserError, redact
from mythos_dist.store.backends import LongerThanExpected, check_scheme, read_into
from mythos_dist.urls import scheme_of

log = logging.getLogger(__name__)
T = TypeVar("T")

START_PATIENCE = 20.0  # seconds, of what a run reads before it starts: a wrong address should not take minutes
SHARD_PATIENCE = 120.0  # of shards: two attempts one after the other are shorter than faults.hang_after
ATTEMPTS = {"damaged": 3}  # of errors that time does not cure; others: 2
FIRST_DELAY, LONGEST_DELAY = 0.25, 15.0  # seconds between attempts
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws, or the instance's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GCS_KEY and GCS_SECRET",
    "oci": "~/.oci/config",
    "azure": "AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
    "azure-dl": "AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
    "hf": "HF_TOKEN, or `hf auth login`",
    "sftp": "COMPOSER_SFTP_KEY_FILE and COMPOSER_SFTP_KNOWN_HOSTS_FILE",
}


_ALLOWS = {  # by action: what the credentials must allow
    "read": "read it",
    "written": "write there",
    "listed": "list the folder",
    "removed": "remove files there",
    "searched for unfinished uploads": "list and abort multipart uploads",
}


class Unavailable(UserError):
    """A file of a store could not be read or written."""

    kind = ""  # see `error_kind`

    @property
    def missing(self) -> bool:
        """Whether the store says that there is none."""
        return self.kind == "missing"


class WrongContent(Exception):
    """All bytes have arrived, and are not those that the index describes."""


def read_object(url: str, limit: int, patience: float = START_PATIENCE) -> bytes:
    """The content of a file of at most `limit` bytes. Raises Unavailable."""
    content = io.BytesIO()
    fetch(url, content, limit, patience)
    content.truncate()
    return content.getvalue()


def fetch(
    url: str,
    file: IO[bytes],
    limit: int,
    patience: float = SHARD_PATIENCE,
    *,
    check: Callable[[], None] = lambda: None,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Write the content of `url` to `file`, from its position 0 to where it stays. What it had after that is kept.

    check: called on the complete file; if it raises WrongContent, the file is read again from its beginning.
    wait: called with the seconds before the next attempt; an exception of it ends the attempts. Raises Unavailable.
    """

    def read() -> None:
        read_into(url, file, limit)
        check()

    def on_failure(error: Exception) -> None:
        if error_kind(error) == "damaged":
            file.seek(0)

    retry(url, read, patience, wait=wait, on_failure=on_failure)


def retry(
    url: str,
    run: Callable[[], T],
    patience: float,
    action: str = "read",
    *,
    wait: Callable[[float], object] = time.sleep,
    on_failure: Callable[[Exception], object] = lambda error: None,
) -> T:
    """`run()`, repeated while the store fails, for at most `patience` seconds. `action`: what it does, for the message.

    Errors of the local disk are raised as they are; everything else as Unavailable.
    """
    check_scheme(url)
    began, attempt, of_this_kind = time.monotonic(), 0, 0
    while True:
        attempt += 1
        try:
            return run()
        except (OSError, UserError) as error:
            if isinstance(error, UserError) or _is_local(error):
                raise
            failure: Exception = error
        except Exception as error:  # each library has its own
            failure = error
        kind = error_kind(failure)
        on_failure(failure)
        of_this_kind = of_this_kind + 1 if kind != "transient" else 0
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
        seconds = time.monotonic() - began
        if of_this_kind >= ATTEMPTS.get(kind, 2) or seconds + delay > patience:
            raise _unavailable(url, failure, kind, action, attempt, seconds)
        log.info("%s: %s; attempt %d follows in %.1f s", redact(url), describe(failure), attempt + 1, delay)
        wait(delay)


def _is_local(error: OSError) -> bool:
    """Whether the disk of this node failed, not the network: a full disk, an I/O error."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


def error_kind(error: BaseException) -> str:
    """The kind of an error: "transient", or one that time does not cure."""
    from_s3 = type(error).__name__ == "FlexibleChecksumError"
    if isinstance(error, LongerThanExpected | WrongContent) or from_s3:
        return "damaged"
    code, status = _code(error), _status(error)
    if status == 416:  # a range after the end
        return "damaged"
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        return "clock"
    if code in ("QuotaExceeded", "XMinioStorageFull") or status == 507:  # Ceph's and MinIO's names
        return "full"
    if isinstance(error, FileNotFoundError) or status == 404 or code in ("NoSuchKey", "NoSuchBucket"):
        return "missing"
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ == "NoCredentialsError":
        return "denied"
    if code == "NotImplemented" or status in (405, 501):
        return "unimplemented"
    if isinstance(error, ImportError | NotImplementedError):
        return "unsupported"
    return "transient"


def _code(error: BaseException) -> str:
    """The store's name of an error, such as NoSuchKey; "" if it has none."""
    response: Any = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _status(error: BaseException) -> int:
    """The HTTP status of an error of boto3, aiohttp, requests, Google's, Azure's or Oracle's library; 0 if none."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    values = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    values.append(getattr(response, "status_code", None))
    return next((int(value) for value in values if isinstance(value, int) and 100 <= value < 600), 0)


def describe(error: BaseException) -> str:
    """The kind and message of an error in one line of at most 300 characters, without secrets."""
    text = " ".join(str(error).replace(" (reached max retries: 0)", "").split())
    return redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)[:300]


def _unavailable(url: str, error: Exception, kind: str, action: str, attempts: int, seconds: float) -> Unavailable:
    scheme, reads = scheme_of(url), action == "read"
    credentials = _CREDENTIALS.get(scheme, "the server's settings")
    endpoint = "" if scheme != "s3" else " and AWS_ENDPOINT_URL"
    missing = "file; check the URL{}, or copy the whole folder there" if reads else "bucket or folder; check the URL{}"
    damaged = "in the store is damaged; copy it there again, or convert again" if reads else "that arrived is damaged"
    remedy = {
        "missing": f"there is no such {missing.format(endpoint)}",
        "denied": f"access is denied; check the credentials ({credentials}) and that they may {_ALLOWS[action]}",
        "clock": "the clock of this node differs from the store's; synchronize it (chrony, NTP)",
        "unsupported": "install that package",
        "unimplemented": "the store does not implement that request; use a newer version of it, or another store",
        "full": "the store is full, or a quota of it is used up; free space there",
        "damaged": f"the copy {damaged}",
        "transient": f"check the network, the store{endpoint}, and run the same command again",
    }[kind]
    tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    problem = Unavailable(f"cannot be {action} after {tries} in {seconds:.0f} s ({describe(error)}); {remedy}", url)
    problem.kind = kind
    return problem
