"""s3 as a file system of fsspec, for programs that list folders and read parts of files: the converter's inputs.

Package s3fs does the same, but pins botocore to a version that boto3, which streaming requires, often does not have;
and it reads neither S3_ENDPOINT_URL nor public buckets without a setting.

Decisions: DATA-30.
"""

from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from mythos_dist.store.backends import bucket_and_key, s3_client
from mythos_dist.store.fetch import SHARD_PATIENCE, START_PATIENCE, Unavailable, retry


class S3Files(AbstractFileSystem):
    """Reads only. Paths are bucket/key."""

    protocol = "s3"
    cachable = False  # listings are not kept, so an instance has no state

    def ls(self, path: str, detail: bool = True, **options: Any) -> list:
        """The files and folders in a folder, or the file `path`. Raises FileNotFoundError."""
        path = str(self._strip_protocol(path))
        bucket, key = bucket_and_key(f"s3://{path}")
        prefix = f"{key.rstrip('/')}/" if key else ""

        def list_pages() -> list[dict[str, Any]]:
            pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
            found = []
            for page in pages:
                found += [_folder(f"{bucket}/{one['Prefix']}") for one in page.get("CommonPrefixes", ())]
                files = [one for one in page.get("Contents", ()) if one["Key"] != prefix]
                found += [_file(f"{bucket}/{one['Key']}", one["Size"], one["ETag"]) for one in files]
            return found

        found = retry(f"s3://{path}", list_pages, START_PATIENCE, "listed") or [self._file(path)]
        return found if detail else [one["name"] for one in found]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Name, size, type and ETag. Raises FileNotFoundError."""
        path = str(self._strip_protocol(path))
        try:
            return self._file(path)
        except FileNotFoundError:
            if any(one["name"] != path for one in self.ls(path)):
                return _folder(path)
            raise

    def _file(self, path: str) -> dict[str, Any]:
        bucket, key = bucket_and_key(f"s3://{path}")
        if not key:
            raise FileNotFoundError(path)
        found = _retry(path, lambda: s3_client().head_object(Bucket=bucket, Key=key))
        return _file(path, found["ContentLength"], found["ETag"])

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: Any = None,
        autocommit: bool = True,
        cache_options: Any = None,
        **options: Any,
    ) -> "_S3File":
        return _S3File(self, path, mode, block_size or "default", autocommit, cache_options=cache_options)


class _S3File(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        bucket, key = bucket_and_key(f"s3://{self.path}")

        def read() -> bytes:
            return s3_client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")["Body"].read()

        return _retry(self.path, read, SHARD_PATIENCE)


def _folder(path: str) -> dict[str, Any]:
    return {"name": path.rstrip("/"), "size": 0, "type": "directory"}


def _file(path: str, size: int, etag: str) -> dict[str, Any]:
    return {"name": path, "size": size, "type": "file", "ETag": etag}


def _retry(path: str, run: Any, patience: float = START_PATIENCE) -> Any:
    try:
        return retry(f"s3://{path}", run, patience)
    except Unavailable as error:
        if error.kind == "missing":
            raise FileNotFoundError(error.problems[0]) from None
        raise
