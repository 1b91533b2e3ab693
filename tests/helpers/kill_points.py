"""A signal at one chosen call that changes a folder: fsync, rename, unlink, mkdir, rmdir, touch, or a JSON line.

In a rank, `install` wraps such calls. `KILL_POINT=WHEN:LABEL` ends the process just before or just after the first call
with that label (WHEN is `before` or `after`; `half` leaves half of a line). The labels of all calls are written to the
file `KILL_POINTS_LOG`, so that the test can list them. Only calls below the folder `KILL_POINTS_IN` are considered.
`KILL_SIGNAL=INT` is Ctrl-C instead: as from a terminal, all processes of the group get it, once. Files that are opened
for writing are such calls then, too.
"""

import builtins
import contextlib
import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def install() -> None:
    """Wrap the calls of this process, with the settings in environment variables."""
    folder = os.path.realpath(os.environ["KILL_POINTS_IN"])
    when, _, wanted = os.environ.get("KILL_POINT", "").partition(":")
    log = os.open(os.environ["KILL_POINTS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def around(name: str, path: str, call: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        if not path.startswith(folder + "/"):
            return call()
        label = f"{name} {_without_numbers(path[len(folder) + 1 :])}"
        os.write(log, f"{label}\n".encode())
        if label == wanted and when == "before":
            send_signal()
        if label == wanted and when == "half":
            half()
            send_signal()
        result = call()
        if label == wanted and when == "after":
            send_signal()
        return result

    for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync"):
        _watch(name, around)
    _watch_lines(around)
    if os.environ.get("KILL_SIGNAL") == "INT":
        _watch_open(around)
    touch = Path.touch

    def watched_touch(self: Path, mode: int = 0o666, exist_ok: bool = True) -> None:
        around("touch", _path(self, None), lambda: touch(self, mode, exist_ok))

    Path.touch = watched_touch


def send_signal() -> None:
    """End this process; with `KILL_SIGNAL=INT` interrupt its group, unless one of its processes has done so before."""
    if os.environ.get("KILL_SIGNAL") != "INT":
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(os.environ["KILL_POINTS_LOG"] + ".sent", os.O_CREAT | os.O_EXCL))
        os.killpg(0, signal.SIGINT)


def _watch(name: str, around: Callable) -> None:
    """Replace one function of `os`."""
    original = getattr(os, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        path = _path(arguments[1] if name in ("replace", "rename") else arguments[0], options.get("dir_fd"))
        return around(name, path, lambda: original(*arguments, **options))

    setattr(os, name, watched)


def _watch_open(around: Callable) -> None:
    """Replace `open` for files that are created or truncated: a process that cleans up can leave an empty file."""
    original = io.open

    def watched(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wx"):
            return original(file, mode, *arguments, **options)
        return around("open", _path(file, None), lambda: original(file, mode, *arguments, **options))

    io.open = builtins.open = watched


def _watch_lines(around: Callable) -> None:
    """Replace the function that appends to files of lines."""
    from mythos_dist.train import line_file

    append = line_file._append

    def watched(stream: io.FileIO, content: bytes) -> None:
        path = _path(stream.fileno(), None)
        around("append", path, lambda: append(stream, content), lambda: stream.write(content[: len(content) // 2]))

    line_file._append = watched


def _path(what: Any, folder: int | None) -> str:
    """The path of a file that is given by name, by name in an open folder, or by descriptor."""
    if isinstance(what, int):
        return os.readlink(f"/proc/self/fd/{what}")
    base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else ""
    above, name = os.path.split(os.path.join(base, os.fspath(what)))
    return os.path.join(os.path.realpath(above), name)


def _without_numbers(path: str) -> str:
    """The path with # in place of steps, starts, pids and random names, which differ between runs."""
    return re.sub(r"[0-9a-f]{16}|(?<=\d-)[0-9a-f]{8}\b|\d+", "#", path)


def labels(log: Path) -> list[str]:
    """The labels of all logged calls, in order."""
    return log.read_text().splitlines() if log.exists() else []
