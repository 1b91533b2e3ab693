"""Requests to s3 with botocore, one attempt each; fetch.py retries them.

The trap: a client holds connections, which do not survive a fork, so each process creates its own.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mythos_dist.store import connection


class Object(NamedTuple):
    """What s3 says of an object."""

    bytes: int
    etag: str  # changes with the content
    metadata: dict[str, str]  # empty in a list


def client() -> Any:
    """botocore's client of this process; thread-safe."""
    return _client(os.getpid())


def forget_clients() -> None:
    """The next request reads credentials, the address and the time-outs again."""
    _client.cache_clear()


@functools.lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """Without credentials, requests are not signed: public buckets.

    As boto3's, without its functions for files, and in two thirds of the time: a start waits for it.
    """
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.session import get_session

    session = get_session()
    settings = {} if session.get_credentials() else {"signature_version": UNSIGNED}
    config = Config(
        connect_timeout=connection.CONNECT_SECONDS,
        read_timeout=connection.READ_SECONDS,
        retries={"total_max_attempts": 1},  # fetch.py retries
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # other stores refuse CRC headers; write.py sends Content-MD5
        **settings,
    )
    # botocore itself reads AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_S3; S3_ENDPOINT_URL is streaming's own name.
    named = any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))
    return session.create_client("s3", config=config, endpoint_url=None if named else os.environ.get("S3_ENDPOINT_URL"))


def bucket_and_key(url: str) -> tuple[str, str]:
    """Bucket and key of an object's URL."""
    parts = urlsplit(url, allow_fragments=False)
    return parts.netloc, parts.path.lstrip("/") + (f"?{parts.query}" if parts.query else "")


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """Bucket and prefix of a folder's URL: the prefix ends with a slash, or is empty for a bucket."""
    bucket, key = bucket_and_key(url)
    return bucket, f"{key.rstrip('/')}/" if key.strip("/") else ""


def list_objects(url: str, *, recursive: bool) -> tuple[list[str], dict[str, Object]]:
    """The folders in the folder `url`, and its objects, by their names in it; recursive: of all folders below it."""
    bucket, prefix = bucket_and_prefix(url)
    wanted = {} if recursive else {"Delimiter": "/"}
    folders, objects = [], {}
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **wanted):
        folders += [one["Prefix"][len(prefix) : -1] for one in page.get("CommonPrefixes", ())]
        for one in page.get("Contents", ()):
            objects[one["Key"][len(prefix) :]] = Object(one["Size"], one["ETag"], {})
    objects.pop("", None)  # some programs write an empty object for a folder
    return folders, objects


def head(url: str) -> Object:
    """Size, tag and metadata of an object."""
    bucket, key = bucket_and_key(url)
    about = client().head_object(Bucket=bucket, Key=key)
    return Object(about["ContentLength"], about["ETag"], about.get("Metadata", {}))


@contextmanager
def open_object(url: str, begin: int = 0, end: int | None = None) -> Iterator[Any]:
    """The body of bytes [begin, end) of an object: reading it raises if it ends before its Content-Length."""
    bucket, key = bucket_and_key(url)
    wanted = {"Range": f"bytes={begin}-{'' if end is None else end - 1}"} if begin or end is not None else {}
    body = client().get_object(Bucket=bucket, Key=key, **wanted)["Body"]
    try:
        yield body
    finally:
        body.close()
