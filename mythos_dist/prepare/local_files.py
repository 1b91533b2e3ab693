"""The local files that a path, a folder or a pattern selects."""

import os
from collections import deque
from collections.abc import Hashable

from mythos_dist.data.manifest import LeftOut
from mythos_dist.errors import UserError
from mythos_dist.prepare.file_list import HIDDEN, NO_MATCH, FileList, ListedFile, leave_out_non_data
from mythos_dist.prepare.names import is_hidden
from mythos_dist.prepare.patterns import START, advance, names_hidden, split_pattern

# A folder with all files of one of these is the output of a conversion, finished or not.
_CONVERSION_FILES = (("manifest.json", "train/index.json"), ("unfinished/settings.json",))
_Folder = tuple[str, tuple[str, ...], frozenset[int]]  # path, its name below the base, states of the pattern


def list_local(given: str, out: str | None) -> FileList:
    """The files of `given`; the folder `out` is not read. Raises UserError if there are none."""
    if not given.strip():
        raise UserError("an empty name; name a file, a folder or a pattern")
    path = os.path.abspath(os.path.expanduser(given))
    if os.path.isfile(path):
        return FileList([_local_file(path, (os.path.basename(path),))])
    if os.path.isdir(path):
        return leave_out_non_data(_FolderWalk(path, [], out).run(), [])
    if os.path.islink(path):
        raise UserError("is a broken link")
    if os.path.exists(path):
        raise UserError("is neither a file nor a folder")
    base, pattern = split_pattern(path)
    if not pattern or not os.path.isdir(base):
        raise UserError(NO_MATCH)
    return leave_out_non_data(_FolderWalk(base, pattern, out).run(), pattern)


def _local_file(path: str, parts: tuple[str, ...]) -> ListedFile:
    status = os.stat(path)
    # Some network file systems have no inode numbers.
    identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
    return ListedFile(path, parts, status.st_size, identity, os.path.islink(path))


class _FolderWalk:
    """Lists all files below a folder that match a pattern. Linked folders come last, so real names are preferred."""

    def __init__(self, base: str, pattern: list[str], out: str | None):
        self._pattern, self._listed = pattern, FileList()
        self._folders: deque[_Folder] = deque([(base, (), START)])
        self._links: deque[_Folder] = deque()
        self._seen: dict[Hashable, str] = {}  # device and inode of a folder -> why it is not read (again)
        if out is not None and os.path.isdir(out):
            status = os.stat(out)
            self._seen[status.st_dev, status.st_ino] = "the output folder"

    def run(self) -> FileList:
        while self._folders or self._links:
            self._read_folder(*(self._folders or self._links).popleft())
        return self._listed

    def _read_folder(self, folder: str, parts: tuple[str, ...], states: frozenset[int]) -> None:
        name = "/".join(parts) + "/"
        try:
            status = os.stat(folder)
            if reason := self._seen.get((status.st_dev, status.st_ino)):
                return self._listed.left_out.append(LeftOut(name, reason))
            self._seen[status.st_dev, status.st_ino] = "a folder that was read before"
            with os.scandir(folder) as iterator:
                entries = sorted(iterator, key=lambda entry: entry.name)
        except OSError as error:
            return self._listed.unreadable.append(LeftOut(name, "cannot be read", error.strerror or str(error)))
        if any(all(os.path.isfile(os.path.join(folder, file)) for file in files) for files in _CONVERSION_FILES):
            return self._listed.left_out.append(LeftOut(name, "shards"))
        for entry in entries:
            if after := advance(self._pattern, states, entry.name):
                self._add_entry(entry, (*parts, entry.name), after)
        return None

    def _add_entry(self, entry: os.DirEntry, parts: tuple[str, ...], states: frozenset[int]) -> None:
        name, matches = "/".join(parts), len(self._pattern) in states
        hidden = is_hidden(entry.name) and not names_hidden(self._pattern, entry.name)
        try:
            if entry.is_dir():
                if not hidden:
                    queue = self._links if entry.is_symlink() else self._folders
                    queue.append((entry.path, parts, states))
                elif matches or any(self._pattern[state] == "**" for state in states):
                    self._listed.left_out.append(LeftOut(f"{name}/", HIDDEN))
                # else the pattern selects files further down, and like the shell it does not enter hidden folders
                return
            file = _local_file(entry.path, parts) if entry.is_file() else None
        except OSError:  # a cycle of links
            file = None
        if not matches:
            return
        if hidden:
            self._listed.left_out.append(LeftOut(name, HIDDEN))
        elif file is None:
            reason = "a broken link" if entry.is_symlink() else "neither a file nor a folder"
            self._listed.left_out.append(LeftOut(name, reason))
        else:
            self._listed.files.append(file)
