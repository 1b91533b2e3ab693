"""Which files the inputs stand for, and which were not taken, and why: one rule for folders, patterns and URLs.

A folder stands for all data below it, a pattern for the files and folders that it matches. Links are followed, each
file and folder is read once. Not taken are hidden names, formats that are not read, what only describes the data, and
shards. A file that is named by itself, or spelled out in a pattern, is taken whatever it is called.
"""

import os
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from mythos_dist.data.manifest import LeftOut, count_reasons
from mythos_dist.errors import UserError
from mythos_dist.prepare.names import (
    KNOWN,
    is_documentation,
    is_hidden,
    is_metadata,
    is_url,
    kind_of,
    kind_of_query,
    suffix_of,
    without_secrets,
)

HIDDEN = "hidden (the name begins with . or _)"
NOTHING = "no such file or folder, and as a pattern it matches nothing"


@dataclass(frozen=True)
class Found:
    """A file."""

    path: str
    parts: tuple[str, ...]  # its name below the folder that was given
    size: int  # bytes
    identity: Hashable  # the same for every name of a file
    link: bool = False

    @property
    def name(self) -> str:
        return "/".join(self.parts)


@dataclass
class Files:
    """What one input stands for."""

    found: list[Found] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unreadable: list[LeftOut] = field(default_factory=list)  # folders


def list_files(inputs: Iterable[str], out: str | None = None) -> tuple[Files, list[str]]:
    """The files of all inputs, each once, in order, and all problems; a folder's and a pattern's are sorted by name.

    `out`: a folder that is not read.
    """
    result, problems = Files(), []
    taken: dict[Hashable, Found] = {}
    for one in inputs:
        try:
            local = one.removeprefix("file://")
            files = _list_url(one) if is_url(local) else _list_local(local, out)
        except UserError as error:
            problems += [f"{one}: {problem}" for problem in error.problems]
            continue
        result.left_out += files.left_out
        result.unreadable += files.unreadable
        own = [file for file in sorted(files.found, key=lambda file: file.link) if _add(taken, file, result.left_out)]
        result.found += sorted(own, key=lambda file: file.path)
    return result, problems


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Raises UserError where a package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url.split('://')[0]}:// needs another package: {error}") from None
    except ValueError as error:
        raise UserError(f"cannot be opened: {error}") from None


def shown(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _add(taken: dict[Hashable, Found], file: Found, left_out: list[LeftOut]) -> bool:
    if file.identity in taken:
        left_out.append(LeftOut(file.name, "the same file as another", taken[file.identity].name))
        return False
    taken[file.identity] = file
    return True


# --- local files


def _list_local(given: str, out: str | None) -> Files:
    if not given.strip():
        raise UserError("an empty name; name a file, a folder or a pattern")
    path = os.path.abspath(os.path.expanduser(given))
    if os.path.isfile(path):
        return Files([_local(path, (os.path.basename(path),))])
    if os.path.isdir(path):
        return _chosen(_Walk(path, [], out).run(), [])
    if os.path.islink(path):
        raise UserError("is a link to nothing")
    if os.path.exists(path):
        raise UserError("is neither a file nor a folder")
    base, pattern = _split_pattern(path)
    if not pattern or not os.path.isdir(base):
        raise UserError(NOTHING)
    return _chosen(_Walk(base, pattern, out).run(), pattern)


def _local(path: str, parts: tuple[str, ...]) -> Found:
    status = os.stat(path)
    # Some network file systems number no files.
    identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
    return Found(path, parts, status.st_size, identity, os.path.islink(path))


def _split_pattern(path: str) -> tuple[str, list[str]]:
    """The folder before the first component that is a pattern, and the components from there on."""
    *above, _ = parts = PurePath(path).parts
    base = parts[0]
    for i, part in enumerate(above[1:], 1):
        if _is_pattern(part) and not os.path.isdir(os.path.join(base, part)):
            return base, list(parts[i:])
        base = os.path.join(base, part)
    return base, list(parts[len(above) :]) if _is_pattern(parts[-1]) else []


def _is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


_Folder = tuple[str, tuple[str, ...], frozenset[int]]  # path, its name below the base, states of the pattern


class _Walk:
    """All files below a folder that match a pattern. Folders that are links come last, so real names are kept."""

    def __init__(self, base: str, pattern: list[str], out: str | None):
        self._pattern, self._files = pattern, Files()
        self._folders: deque[_Folder] = deque([(base, (), frozenset({0}))])
        self._links: deque[_Folder] = deque()
        self._seen: dict[Hashable, str] = {}
        if out is not None and os.path.isdir(out):
            status = os.stat(out)
            self._seen[status.st_dev, status.st_ino] = "the output folder"

    def run(self) -> Files:
        while self._folders or self._links:
            self._enter(*(self._folders or self._links).popleft())
        return self._files

    def _enter(self, folder: str, parts: tuple[str, ...], states: frozenset[int]) -> None:
        name = "/".join(parts) + "/"
        try:
            status = os.stat(folder)
            if reason := self._seen.get((status.st_dev, status.st_ino)):
                return self._files.left_out.append(LeftOut(name, reason))
            self._seen[status.st_dev, status.st_ino] = "a folder that was read before"
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            return self._files.unreadable.append(LeftOut(name, "cannot be read", error.strerror or str(error)))
        if any(all(os.path.isfile(os.path.join(folder, file)) for file in files) for files in _OF_SHARDS):
            return self._files.left_out.append(LeftOut(name, "shards"))
        for entry in found:
            if after := _advance(self._pattern, states, entry.name):
                self._meet(entry, (*parts, entry.name), after)
        return None

    def _meet(self, entry: os.DirEntry, parts: tuple[str, ...], states: frozenset[int]) -> None:
        name, whole = "/".join(parts), len(self._pattern) in states
        hidden = is_hidden(entry.name) and not _spells(self._pattern, entry.name)
        try:
            if entry.is_dir():
                if hidden and not (whole or any(self._pattern[state] == "**" for state in states)):
                    pass  # the pattern names files further below, as in the shell
                elif hidden:
                    self._files.left_out.append(LeftOut(f"{name}/", HIDDEN))
                else:
                    (self._links if entry.is_symlink() else self._folders).append((entry.path, parts, states))
                return
            file = _local(entry.path, parts) if entry.is_file() else None
        except OSError:  # a link in a circle
            file = None
        if not whole:
            return
        if hidden:
            self._files.left_out.append(LeftOut(name, HIDDEN))
        elif file is None:
            reason = "a link to nothing" if entry.is_symlink() else "neither a file nor a folder"
            self._files.left_out.append(LeftOut(name, reason))
        else:
            self._files.found.append(file)


_OF_SHARDS = (("manifest.json", "train/index.json"), ("unfinished/settings.json",))  # of folders of convert.py


def _advance(pattern: list[str], states: frozenset[int], name: str) -> frozenset[int]:
    """The components of `pattern` that may match what is below `name`; with len(pattern), everything matches."""
    after = set()
    for state in _with_empty(pattern, states):
        if state == len(pattern) or pattern[state] == "**":
            after.add(state)
        elif fnmatchcase(name, pattern[state]):
            after.add(state + 1)
    return _with_empty(pattern, after)


def _with_empty(pattern: list[str], states: Iterable[int]) -> frozenset[int]:
    """`**` matches no folder, too."""
    found = set(states)
    for state in sorted(found):
        while state < len(pattern) and pattern[state] == "**":
            state += 1
            found.add(state)
    return frozenset(found)


def _spells(pattern: list[str], name: str) -> bool:
    """Whether a component of the pattern begins like the hidden `name`, as in the shell."""
    return any(part[:1] == name[0] and fnmatchcase(name, part) for part in pattern)


# --- URLs


def _list_url(url: str) -> Files:
    try:
        filesystem, path = filesystem_of(url)
        if _is_pattern(path) and not kind_of_query(url):
            parts = path.split("/")
            first = next(i for i, part in enumerate(parts) if _is_pattern(part))
            files = _below(filesystem, "/".join(parts[:first]), parts[first:])
        elif kind_of(url):  # not asked whether it is a folder: over HTTP that would fetch the whole file
            files = Files([_remote(filesystem, path, (urlsplit(path).path.rpartition("/")[2],))])
        else:
            files = _below(filesystem, path, [])
    except UserError:
        raise
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot be found or reached ({shown(error)})") from None
    return files


def _remote(filesystem: Any, path: str, parts: tuple[str, ...], info: dict[str, Any] | None = None) -> Found:
    size = (info or {}).get("size")
    if size is None:
        size = filesystem.info(path).get("size")
    if size is None:
        raise UserError(f"the server does not say how large {path} is; download it first")
    url = str(filesystem.unstrip_protocol(path))
    return Found(url, parts, int(size), without_secrets(url))


def _below(filesystem: Any, base: str, pattern: list[str]) -> Files:
    files = Files()
    depth = None if not pattern or "**" in pattern else len(pattern)
    for path, info in _tree(filesystem, base, pattern, depth):
        parts = _parts_below(base, path)
        hidden = [i for i, part in enumerate(parts) if is_hidden(part) and not _spells(pattern, part)]
        if hidden and depth is not None and hidden[0] < depth - 1:
            pass  # the pattern names files further below, as in the shell
        elif hidden:
            folder = hidden[0] < len(parts) - 1
            files.left_out.append(LeftOut("/".join(parts[: hidden[0] + 1]) + "/" * folder, HIDDEN))
        elif kind_of(path):
            files.found.append(_remote(filesystem, path, parts, info))
        else:
            files.left_out.append(LeftOut("/".join(parts), f"format not read ({suffix_of(parts[-1])})"))
    files.left_out = list(dict.fromkeys(files.left_out))  # a hidden folder once
    return _chosen(files, pattern)


def _tree(filesystem: Any, base: str, pattern: list[str], depth: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, info) of all files below `base` that match, and of those in folders that match."""
    found = filesystem.find(base, maxdepth=depth, withdirs=depth is not None, detail=True)
    for path, info in found.items():
        if path.rstrip("/") == base.rstrip("/") and info.get("type") == "directory":
            continue  # some file systems list it in itself
        states: frozenset[int] = frozenset({0})
        for part in _parts_below(base, path):
            states = _advance(pattern, states, part)
        if len(pattern) not in states:
            continue
        if depth is not None and info.get("type") == "directory":
            if len(_parts_below(base, path)) == depth:  # what is above is in `found`
                yield from filesystem.find(path, detail=True).items()
        else:
            yield path, info


def _parts_below(base: str, path: str) -> tuple[str, ...]:
    base = base.rstrip("/")
    below = path[len(base) :].strip("/") if path.startswith(base) else path
    below = urlsplit(below).path if is_url(path) else below
    return tuple(below.split("/")) if below else (path.rpartition("/")[2],)


# --- what is no data


def _chosen(files: Files, pattern: list[str]) -> Files:
    """Without what only describes the data. Raises UserError if nothing is left."""
    spelled = {part for part in pattern if not _is_pattern(part)}
    data = [file for file in files.found if kind_of(file.path) and not _describes(file.parts[-1])]
    records = [file for file in data if _kind(file) != "text"]
    above = {file.parts[:i] for file in records for i in range(len(file.parts))}
    only_notes = all(suffix_of(file.parts[-1]).startswith(".md") for file in data)
    reason_of = partial(_reason, above=above, only_notes=only_notes)
    kept = []
    for file in files.found:
        if file.parts[-1] not in spelled and (reason := reason_of(file)):
            files.left_out.append(LeftOut(file.name, reason))
        else:
            kept.append(file)
    if not kept and not files.unreadable:
        why = f"; not taken: {count_reasons(files.left_out)}" if files.left_out else ""
        raise UserError(f"no file there is called {KNOWN}{why}" if why or not pattern else NOTHING)
    return Files(kept, files.left_out, files.unreadable)


def _kind(file: Found) -> str:
    kind = kind_of(file.path)
    return kind[0] if kind else ""


def _describes(name: str) -> bool:
    return is_documentation(name) or is_metadata(name)


def _reason(file: Found, above: set[tuple[str, ...]], only_notes: bool) -> str:
    """Why a file in a folder is no data; "" if it is.

    `above`: all folders with parquet or JSON lines below them. `only_notes`: all that is data is Markdown, or there is
    none; README.md may then be what is wanted.
    """
    name, kind = file.parts[-1], _kind(file)
    if not kind:
        return f"format not read ({suffix_of(name)})"
    if only_notes:
        return ""
    if kind == "text" and is_documentation(name):
        return "documentation"
    if kind == "jsonl" and is_metadata(name):
        return "metadata"
    if kind == "text" and file.parts[:-1] in above and suffix_of(name).startswith(".md"):
        return "notes (.md) beside parquet or JSON lines"
    return ""
