"""The files that a URL selects, through fsspec: https://, hf://, s3://, gs:// and others."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from mythos_dist.data.manifest import LeftOut
from mythos_dist.errors import UserError
from mythos_dist.prepare.file_list import HIDDEN, FileList, ListedFile, leave_out_non_data
from mythos_dist.prepare.names import file_kind, is_hidden, suffix_of
from mythos_dist.prepare.patterns import START, advance, is_pattern, names_hidden
from mythos_dist.urls import has_query, is_url, scheme_of, without_secrets


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Raises UserError if the protocol's package is missing."""
    import fsspec

    if scheme_of(url) == "s3":
        from mythos_dist.store.s3_files import S3Files

        return S3Files(), url.removeprefix("s3://").rstrip("/")

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url.split('://')[0]}:// needs another package: {error}") from None
    except ValueError as error:
        raise UserError(f"cannot be opened: {error}") from None


def describe_error(error: Exception) -> str:
    """The type and message of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def list_url(url: str) -> FileList:
    """The files of a URL: a file, a folder or a pattern. Raises UserError if there are none."""
    try:
        filesystem, path = filesystem_of(url)
        if is_pattern(path) and not has_query(url):
            parts = path.split("/")
            first = next(i for i, part in enumerate(parts) if is_pattern(part))
            return _list_below(filesystem, "/".join(parts[:first]), parts[first:])
        if file_kind(url):  # do not check whether it is a folder: over HTTP that would fetch the complete file
            return FileList([_remote_file(filesystem, path, (urlsplit(path).path.rpartition("/")[2],))])
        return _list_below(filesystem, path, [])
    except UserError:
        raise
    except Exception as error:  # each file system has its own exceptions
        raise UserError(f"cannot be found or reached ({describe_error(error)})") from None


def _remote_file(filesystem: Any, path: str, parts: tuple[str, ...], info: dict[str, Any] | None = None) -> ListedFile:
    size = (info or {}).get("size")
    if size is None:
        size = filesystem.info(path).get("size")
    if size is None:
        raise UserError(f"the server does not report the size of {path}; download it first")
    url = str(filesystem.unstrip_protocol(path))
    return ListedFile(url, parts, int(size), without_secrets(url))


def _list_below(filesystem: Any, base: str, pattern: list[str]) -> FileList:
    listed = FileList()
    depth = None if not pattern or "**" in pattern else len(pattern)
    for path, info in _matching_files(filesystem, base, pattern, depth):
        parts = _parts_below(base, path)
        hidden = next((i for i, part in enumerate(parts) if is_hidden(part) and not names_hidden(pattern, part)), None)
        if hidden is not None:
            if depth is not None and hidden < depth - 1:
                continue  # the pattern selects files further down, and like the shell it does not enter hidden folders
            name = "/".join(parts[: hidden + 1])
            if hidden < len(parts) - 1:
                name += "/"
            listed.left_out.append(LeftOut(name, HIDDEN))
        elif file_kind(path):
            listed.files.append(_remote_file(filesystem, path, parts, info))
        else:
            listed.left_out.append(LeftOut("/".join(parts), f"format not read ({suffix_of(parts[-1])})"))
    listed.left_out = list(dict.fromkeys(listed.left_out))  # a hidden folder is listed once
    return leave_out_non_data(listed, pattern)


def _matching_files(
    filesystem: Any, base: str, pattern: list[str], depth: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, info) of all files below `base` that match, and of those in folders that match."""
    entries = filesystem.find(base, maxdepth=depth, withdirs=depth is not None, detail=True)
    for path, info in entries.items():
        if path.rstrip("/") == base.rstrip("/") and info.get("type") == "directory":
            continue  # some file systems list a folder as its own entry
        states = START
        for part in _parts_below(base, path):
            states = advance(pattern, states, part)
        if len(pattern) not in states:
            continue
        if depth is not None and info.get("type") == "directory":
            if len(_parts_below(base, path)) == depth:  # entries above are in `entries` themselves
                yield from filesystem.find(path, detail=True).items()
        else:
            yield path, info


def _parts_below(base: str, path: str) -> tuple[str, ...]:
    base = base.rstrip("/")
    below = path[len(base) :].strip("/") if path.startswith(base) else path
    below = urlsplit(below).path if is_url(path) else below
    return tuple(below.split("/")) if below else (path.rpartition("/")[2],)
