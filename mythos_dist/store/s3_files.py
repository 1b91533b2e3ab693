"""s3 as a file system of fsspec, for programs that list folders and read parts of files: the converter's inputs.

Package s3fs does the same, but pins botocore to a version that boto3, which streaming requires, often does not have;
and it reads neither S3_ENDPOINT_URL nor public buckets without a setting.

Decisions: DATA-30.
"""

from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from mythos_dist.store import s3
from mythos_dist.store.fetch import SHARD_PATIENCE, START_PATIENCE, Unavailable, retry


class S3Files(AbstractFileSystem):
    """Reads only. Paths are bucket/key."""

    protocol = "s3"
    cachable = False  # listings are not kept, so an instance has no state

    def ls(self, path: str, detail: bool = True, **options: Any) -> list:
        """The files and folders in a folder, or the file `path`. Raises FileNotFoundError."""
        path = str(self._strip_protocol(path))
        url = f"s3://{path}"
        folders, objects = retry(url, lambda: s3.list_objects(url, recursive=False), START_PATIENCE, "listed")
        prefix = "/".join(s3.bucket_and_prefix(url))
        entries = [_folder(f"{prefix}{name}") for name in folders]
        entries += [_file(f"{prefix}{name}", one) for name, one in objects.items()]
        entries = entries or [self._file(path)]
        return entries if detail else [one["name"] for one in entries]

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
        url = f"s3://{path}"
        if not s3.bucket_and_key(url)[1]:
            raise FileNotFoundError(path)
        return _file(path, _retry(path, lambda: s3.head(url)))

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
        def read() -> bytes:
            with s3.open_object(f"s3://{self.path}", start, end) as body:
                return body.read()

        return _retry(self.path, read, SHARD_PATIENCE)


def _folder(path: str) -> dict[str, Any]:
    return {"name": path, "size": 0, "type": "directory"}


def _file(path: str, one: s3.Object) -> dict[str, Any]:
    return {"name": path, "size": one.bytes, "type": "file", "ETag": one.etag}


def _retry(path: str, run: Any, patience: float = START_PATIENCE) -> Any:
    try:
        return retry(f"s3://{path}", run, patience)
    except Unavailable as error:
        if error.kind == "missing":
            raise FileNotFoundError(error.problems[0]) from None
        raise
