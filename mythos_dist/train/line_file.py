"""A file of JSON lines that one start of a run appends to: metrics.jsonl, eval.jsonl, restarts.jsonl.

An earlier start may still be running, or be suspended and resume later (`checkpoint/fence.py`). Before each line it
checks that it is the newest start. It may be suspended between that check and the write, so every start first replaces
the file by a copy and keeps the copy open: an old start then appends to an unlinked file.

Decisions: CHECKPOINT-11, CHECKPOINT-12.
"""

import errno
import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from io import FileIO
from pathlib import Path
from typing import Any

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.errors import UserError
from mythos_dist.files import json_lines, write_atomically

log = logging.getLogger(__name__)
FILES = ("metrics.jsonl", "eval.jsonl")  # a line a step; a line an evaluation
Keep = Callable[[dict[str, Any]], bool | None]  # whether to keep a line; None: it is not a line of this kind of file


class LineFile:
    """Rank 0's writer of one file. Lines that cannot be written are kept in memory and written later."""

    def __init__(self, file: Path, fence: Fence | None = None):
        """fence: of the start that writes; None: no other writer. Opens nothing before `rewind` or `append`."""
        self.file, self._fence = file, fence
        self._keep: Keep = lambda line: True
        self._stream: FileIO | None = None
        self._unwritten = b""
        self._taken_over = False

    def rewind(self, keep: Keep) -> None:
        """Remove the lines for which `keep` returns False. Lines that are not JSON objects, or for which it returns
        None, are removed with a warning.

        Raises OSError, and UserError if the run has a newer start.
        """
        self._keep, self._unwritten = keep, _kept(self._unwritten, keep)[0]
        with self._guard():
            try:
                content = self.file.read_bytes()
            except FileNotFoundError:
                return
            kept, broken = _kept(content, keep)
            if broken:
                log.warning("%s: %d invalid lines were removed", self.file, broken)
            self._replace(kept)

    def append(self, line: dict[str, Any]) -> bool:
        """Append a line. Returns False, and writes nothing, if the run has a newer start; `Fence.check` ends all ranks
        before the next step."""
        if self._taken_over:
            return False
        was_writable = not self._unwritten
        self._unwritten += json.dumps(line).encode() + b"\n"
        try:
            self.flush()
        except UserError as error:
            self._taken_over = True
            log.warning("%s", error)
            return False
        except OSError as error:
            if was_writable:
                log.warning(
                    "%s cannot be written (%s); its lines are kept in memory and written later",
                    self.file.name,
                    error.strerror,
                )
        return True

    def flush(self) -> None:
        """Write what could not be written before. Raises OSError, and UserError as `rewind`."""
        if not self._unwritten:
            return
        with self._guard():
            _append(self._opened(), self._unwritten)
        self._unwritten = b""

    def fsync(self) -> None:
        """Fsync the file. Raises OSError."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _guard(self):
        return self._fence.guard() if self._fence else nullcontext()

    def _opened(self) -> FileIO:
        """The open file. If its name refers to another file, that file is replaced by a copy of ours."""
        stream = self._stream
        if stream is None:
            try:
                self.file.open("xb").close()
                stream = self._stream = self.file.open("ab+", buffering=0)
            except FileExistsError:  # created by an old start that was suspended before
                return self._replace(_kept(self.file.read_bytes(), self._keep)[0])
        try:
            ours = os.path.samestat(os.stat(self.file), os.fstat(stream.fileno()))
        except FileNotFoundError:
            ours = False
        if ours:
            return stream
        # An old start that was suspended after its check, or an editor, has replaced the file.
        stream.seek(0)
        return self._replace(stream.readall() or b"")

    def _replace(self, content: bytes) -> FileIO:
        replace = self._fence.replace if self._fence else write_atomically
        replace(self.file, content)
        self.close()
        stream = self._stream = self.file.open("ab+", buffering=0)
        return stream


def _append(stream: FileIO, content: bytes) -> None:
    """Append all of `content` or nothing; raises OSError in the second case."""
    end = stream.seek(0, os.SEEK_END)
    if stream.write(content) < len(content):
        stream.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _kept(content: bytes, keep: Keep) -> tuple[bytes, int]:
    """The lines to keep, and the number of broken ones; a truncated last line, as a kill leaves it, is not counted."""
    kept, broken = [], 0
    lines = list(json_lines(content))
    for i, (line, parsed) in enumerate(lines):
        verdict = None if parsed is None else keep(parsed)
        if verdict:
            kept.append(line + b"\n")
        elif verdict is None and line.strip() and (i < len(lines) - 1 or content.endswith(b"\n")):
            broken += 1
    return b"".join(kept), broken
