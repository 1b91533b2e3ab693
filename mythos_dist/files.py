"""Write files so that they survive a kill or a power failure, and read files that may be damaged.

Rule: temporary file in the same folder, fsync, rename, fsync of the folder. A reader sees the old content or the new
one, whenever the writer is killed. Temporary files are named `NAME.tmp-PID`, in a run folder `NAME.tmp-START`; the
process that holds the folder's lock removes those of killed writers (`remove_temporaries`).
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

from mythos_dist.errors import UserError

# Errors of file systems that cannot fsync a folder; every other error (EIO, ENOSPC …) is a failure.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def replacing(file: Path, ending: str = "", before_rename: Callable[[], None] = lambda: None) -> Iterator[IO[bytes]]:
    """A temporary file, open for writing; after the block, it is fsynced and renamed to `file`, which it replaces.

    If the block, `before_rename` or the disk fails, the temporary file is removed and the old file is kept.
    `ending`: of the temporary name; default: .tmp-PID.
    """
    temporary = file.with_name(f"{file.name}{ending or f'.tmp-{os.getpid()}'}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            fsync_file(stream)
        before_rename()
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(PermissionError):  # the folder may not be readable
        fsync_folder(file.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder NAME.tmp-PID-HEX; after the block, it is fsynced and renamed to `folder`, which must not
    exist.

    If the block or the disk fails, the temporary folder is removed.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")  # no other process has it
    make_folders(folder.parent)
    temporary.mkdir()
    try:
        yield temporary
        fsync_folder(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)


def write_atomically(
    file: Path, content: str | bytes, ending: str = "", before_rename: Callable[[], None] = lambda: None
) -> None:
    """Replace `file` by `content`; on disk when this returns. Raises OSError, and keeps the old file, if it fails.

    `ending`, `before_rename`: as of `replacing`.
    """
    with replacing(file, ending, before_rename) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def fsync_file(stream: IO[Any]) -> None:
    """Flush and fsync an open file. OSError if it did not reach the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def fsync_folder(folder: Path) -> None:
    """Fsync a folder, so that created, renamed and removed names survive a power failure. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def real_path(path: Path) -> Path:
    """The path without links. As `Path.resolve`, which raises RuntimeError for a circle of links."""
    return Path(os.path.realpath(path))


def is_utf8(path: str) -> bool:
    """Whether the bytes of a file's name are UTF-8: Arrow refuses other paths, but not open files."""
    return valid_unicode(path) == path


def valid_unicode(text: str) -> str:
    """Text with names of files as valid Unicode; bytes that are not UTF-8 become \\udcff, as in Python."""
    return text.encode("utf-8", "backslashreplace").decode()


def existing_folder(path: Path) -> Path:
    """`path`, or its nearest parent folder that exists."""
    return next(folder for folder in [path, *path.parents] if os.path.isdir(folder))


def make_folders(folder: Path) -> None:
    """Create a folder and its parents, and fsync each. OSError if a file has that name, or without permission."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folders(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():  # another process may have created it
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    with suppress(PermissionError):  # a parent may not be readable
        fsync_folder(folder.parent)


def write_and_fsync(file: Path, text: str) -> None:
    """Write a text file in place and fsync it: for files in a folder that is not published yet."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        fsync_file(stream)


def remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files of killed writers of `names` in `folder`, and nothing else."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, names))})\.tmp-\d+")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def json_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of `content` and its JSON object, or None if it is not a JSON object in UTF-8.

    Raises nothing: a kill may have truncated the last line, and a disk or an editor may have damaged any other.
    """
    for line in content.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        yield line, value if isinstance(value, dict) else None


def read_json_lines(file: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects in the last `tail` bytes of a file of lines (None: all). Other lines are skipped.

    Empty if the file does not exist or cannot be read.
    """
    try:
        with file.open("rb") as stream:
            skipped = max(0, stream.seek(0, 2) - tail) if tail else 0
            stream.seek(skipped)
            content = stream.read()
    except OSError:
        return []
    lines = list(json_lines(content))
    return [value for _, value in lines[1 if skipped else 0 :] if value is not None]


def get_number(line: dict[str, Any], key: str) -> float | None:
    """The finite number under `key`; None if there is none (true and false are not numbers)."""
    value = line.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


_REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "your disk quota is used up: delete files, or have it raised",
    errno.EROFS: "this file system is mounted read-only; give another run.dir, or mount it read-write",
    errno.EACCES: "give another run.dir, or get write permission",
    errno.EPERM: "give another run.dir, or get write permission",
    errno.ENOTDIR: "a parent in this path is a file; give another run.dir",
    errno.ENAMETOOLONG: "this name is too long; give a shorter run.dir",
    errno.ELOOP: "the links in this path form a cycle; give another run.dir",
    errno.EISDIR: "it is a folder, but must be a file; move it away",
    errno.EEXIST: "it is a file, but must be a folder; move it away",
    **dict.fromkeys(
        (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK),
        "this file system may have no locks: mount it with them (Lustre: -o flock), or give another run.dir",
    ),
}


def reason(error: Exception) -> str:
    """The message of an error without file names."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


@contextmanager
def user_errors(path: Path, what: str = "cannot be written") -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the file (or `path`) and the remedy."""
    try:
        yield
    except OSError as error:
        raise os_user_error(error, path, what) from None


def os_user_error(error: OSError, path: Path, what: str = "cannot be written") -> UserError:
    """The UserError for an OSError: names the file (or `path`) and the remedy."""
    name = error.filename if isinstance(error.filename, str) else str(path)
    remedy = _REMEDIES.get(error.errno or 0, "check this folder and its file system")
    return UserError(f"{name} {what} ({error.strerror or error}); {remedy}")


def lock_file(file: Path, timeout: float = 0.0, poll: float = 0.005) -> TextIO | None:
    """Lock `file` for as long as the returned handle is open; None if another process holds the lock for `timeout` s,
    in which it is tried every `poll` s.

    Raises OSError where locks are not supported, and if the file cannot be opened.
    """
    deadline = time.monotonic() + timeout
    while True:
        handle = file.open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(file)):
                return handle
            # Another process has just replaced the file: lock the new one.
        except BlockingIOError:
            if time.monotonic() >= deadline:
                handle.close()
                return None
            time.sleep(poll)
        except FileNotFoundError:
            pass  # another process has just removed it
        except OSError:
            handle.close()
            raise
        handle.close()
