"""Local copies of token files that are in stores. Their readers map files into memory and read them at any position, so
the files are copied to the scratch folder first, and removed when the import is complete.

s3://bucket/folder             all files below it
s3://bucket/folder/PREFIX      Megatron: PREFIX.bin and PREFIX.idx, of which one may be named
s3://bucket/folder/NAME.ds     nanoset: with its index and metadata

Over https there are no folders: one of the latter two. An interrupted copy resumes with the files that are missing.

Decisions: DATA-34.
"""

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from mythos_dist.errors import UserError, redact
from mythos_dist.files import existing_folder
from mythos_dist.prepare.inputs import Inputs
from mythos_dist.prepare.remote_files import describe_error, filesystem_of
from mythos_dist.private import scratch_folder
from mythos_dist.progress import Bar
from mythos_dist.store.fetch import WrongContent, fetch
from mythos_dist.store.write import local_path
from mythos_dist.units import count, short_bytes
from mythos_dist.urls import is_url, scheme_of

THREADS = 8
_WEB = ("http", "https")


class TokenCopies:
    """The copies of an import. `scratch`: None: below the system's temporary folder."""

    def __init__(self, scratch: str | Path | None):
        self._scratch = scratch
        self._folders: list[Path] = []

    def local(self, inputs: Inputs, quiet: bool) -> list[str]:
        """The inputs, with the paths of copies in place of URLs. Raises UserError."""
        given = [str(one) for one in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
        return [self._local(one, quiet) if is_url(one) else one for one in given]

    def remove(self) -> None:
        """Remove the copies: the import is complete."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _local(self, url: str, quiet: bool) -> str:
        if scheme_of(url) == "file":
            return str(local_path(url))
        try:
            parent, files = _files_of(url.rstrip("/"))
        except UserError:
            raise
        except Exception as error:  # each file system has its own exceptions
            raise UserError(f"cannot be found or reached ({describe_error(error)})", redact(url)) from None
        if not files:
            raise UserError("no such file, folder or prefix in the store; check the URL", redact(url))
        folder = scratch_folder(url, self._scratch, "tokens")
        self._folders.append(folder)
        _copy(parent, files, folder, quiet)
        return str(folder / _last(url))


def _last(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


def _files_of(url: str) -> tuple[str, dict[str, int]]:
    """The URL of the folder above, and the bytes of each file by its name below that."""
    parent, _, name = url.rpartition("/")
    filesystem, path = filesystem_of(url)
    above = path.rstrip("/").rpartition("/")[0]
    if scheme_of(url) not in _WEB:
        below = {one: about for one, about in filesystem.find(path, detail=True).items() if one != path}
        if below:
            return parent, _sizes(below, above)
    sizes: dict[str, int] = {}
    for one in _names_of(name):
        with suppress(FileNotFoundError):
            sizes[one] = _size(one, filesystem.info(f"{above}/{one}"))
    return parent, sizes


def _names_of(name: str) -> Iterable[str]:
    """The names of the files that belong to one."""
    if name.endswith(".ds"):
        return name, f"{name}.index", f"{name}.metadata"
    prefix = name.removesuffix(".idx").removesuffix(".bin")
    return f"{prefix}.bin", f"{prefix}.idx"


def _sizes(listed: dict[str, Any], above: str) -> dict[str, int]:
    names = {path[len(above) :].strip("/"): about for path, about in listed.items()}
    for name in names:
        if ".." in PurePosixPath(name).parts:  # the store's owner may be another than this machine's
            raise UserError(f"{name!r} would be written outside of the scratch folder; rename it")
    return {name: _size(name, about) for name, about in names.items() if about.get("type") != "directory"}


def _size(name: str, about: dict[str, Any]) -> int:
    if about.get("size") is None:
        raise UserError(f"the server does not report the size of {name}; copy it to a disk, and name that")
    return int(about["size"])


def _copy(parent: str, files: dict[str, int], folder: Path, quiet: bool) -> None:
    missing = {name: size for name, size in files.items() if not _is_complete(folder / name, size)}
    total = sum(missing.values())
    free = shutil.disk_usage(existing_folder(folder)).free
    if total > free:
        raise UserError(
            f"{count(len(missing), 'file')} of {short_bytes(total)} are copied before the import, and {folder} has "
            f"room for {short_bytes(free)}; name a folder on a larger disk with --scratch",
            redact(parent),
        )
    with (
        Bar("copying", total, quiet=quiet, log_lines=True) as bar,
        ThreadPoolExecutor(THREADS, "copy") as pool,
    ):
        for size in pool.map(lambda name: _copy_file(f"{parent}/{name}", folder / name, files[name]), missing):
            bar.update(size)


def _is_complete(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _copy_file(url: str, file: Path, size: int) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w+b") as stream:

        def check() -> None:
            if stream.tell() != size:
                raise WrongContent(f"it has {stream.tell():,} bytes, and the store lists {size:,}")

        fetch(url, stream, size, check=check)
    os.replace(partial, file)
    return size
