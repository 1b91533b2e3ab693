"""Make files, and the names of files, survive a power cut: fsync of a file, of a folder, of new folders' parents."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

# What file systems answer that cannot sync a folder; everything else (EIO, ENOSPC …) is a failure.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def file_to_disk(stream: IO[Any]) -> None:
    """Flush and fsync an open file. OSError if it did not reach the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def folder_to_disk(folder: Path) -> None:
    """Fsync a folder, so that new names in it survive. OSError if they did not reach the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """Why the system refused, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def make_folders(folder: Path) -> None:
    """Make a folder and its parents, each on disk. OSError if there is a file of that name, or no right to."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folders(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():  # or another process was faster
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    with suppress(PermissionError):  # a parent may be closed to reading
        folder_to_disk(folder.parent)


def write_to_disk(file: Path, text: str) -> None:
    """Write a text file and fsync it."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        file_to_disk(stream)
