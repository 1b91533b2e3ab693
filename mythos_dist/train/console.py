"""Console output whose errors do not end a run.

With `... | tee log`, Ctrl-C also ends tee, and the next line would raise BrokenPipeError before a checkpoint is saved.
So would a closed ssh session (EIO) and `> log` on a full disk (ENOSPC). Ranks have their own logs and metrics are in
metrics.jsonl, so output that cannot be written is dropped.
"""

import io
import sys
from typing import Any


class _Console(io.FileIO):
    """A descriptor whose writes do not fail."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def keep_console() -> None:
    """Replace stdout and stderr by streams to the same descriptors that drop output that cannot be written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            raw = _Console(stream.fileno(), "w", closefd=False)
            stream.flush()
        except (AttributeError, OSError, ValueError):  # not a file: a program has replaced the stream
            continue
        buffered = io.BufferedWriter(raw)
        by_line = stream.line_buffering or stream.write_through  # the latter with PYTHONUNBUFFERED
        text = io.TextIOWrapper(buffered, encoding=stream.encoding, errors=stream.errors, line_buffering=by_line)
        setattr(sys, name, text)
