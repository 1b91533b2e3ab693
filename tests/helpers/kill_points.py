"""SIGKILL at one chosen call that changes a folder: fsync, rename, unlink, mkdir, rmdir, touch, or a JSON line.

In a rank, `install` counts such calls. `KILL_POINT=WHEN:LABEL` ends the process just before or just after its first
call of that label (WHEN is `before` or `after`; `half` leaves half of a line), and `KILL_POINTS_LOG` gets the label of
every call, so that the test knows which calls there are. Both count below `KILL_POINTS_IN` only.
"""

import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def install() -> None:
    """Watch this process's calls, as the environment says."""
    folder = os.path.realpath(os.environ["KILL_POINTS_IN"])
    when, _, wanted = os.environ.get("KILL_POINT", "").partition(":")
    log = os.open(os.environ["KILL_POINTS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def around(name: str, path: str, call: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        if not path.startswith(folder + "/"):
            return call()
        label = f"{name} {_without_numbers(path[len(folder) + 1 :])}"
        os.write(log, f"{label}\n".encode())
        if label == wanted and when == "before":
            kill()
        if label == wanted and when == "half":
            half()
            kill()
        result = call()
        if label == wanted and when == "after":
            kill()
        return result

    for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync"):
        _watch(name, around)
    _watch_lines(around)
    touch = Path.touch
    Path.touch = lambda path, *rest, **more: around("touch", _path(path, None), lambda: touch(path, *rest, **more))


def _watch(name: str, around: Callable) -> None:
    """Replace one function of `os`."""
    original = getattr(os, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        path = _path(arguments[1] if name in ("replace", "rename") else arguments[0], options.get("dir_fd"))
        return around(name, path, lambda: original(*arguments, **options))

    setattr(os, name, watched)


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
    """Steps, starts, pids and random names are others in each run."""
    return re.sub(r"[0-9a-f]{16}|\d+", "#", path)


def labels(log: Path) -> list[str]:
    """Of all calls that were logged, in order."""
    return log.read_text().splitlines() if log.exists() else []
