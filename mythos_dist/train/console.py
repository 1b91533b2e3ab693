"""Console output that cannot end a run.

`... | tee log` and Ctrl-C: the terminal ends tee as well, and the next line raises BrokenPipeError before a checkpoint
is saved. A closed ssh session (EIO) and a full disk behind `> log` (ENOSPC) do the same. The logs of all ranks and
metrics.jsonl are elsewhere, so what the console does not take is dropped.
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
    """Replace standard output and error by streams to the same descriptors that drop what cannot be written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            raw = _Console(stream.fileno(), "w", closefd=False)
            stream.flush()
        except (AttributeError, OSError, ValueError):  # it is no file: a program has put something else there
            continue
        buffered = io.BufferedWriter(raw)
        text = io.TextIOWrapper(
            buffered, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering
        )
        setattr(sys, name, text)
