"""The bar of a conversion or a verification, whose worker processes count what they do."""

import time
from typing import Any

from mythos_dist import progress
from mythos_dist.prepare.output import Output
from mythos_dist.prepare.pool import WorkerPool
from mythos_dist.progress import Bar


class ConversionBar:
    """Shows text read, tokens per second, time left and bytes written, of one part of the work after another.

    A context manager. In a log it is a line per minute (`progress.Bar`: log_lines).
    """

    def __init__(self, workers: WorkerPool, quiet: bool, output: Output | None = None):
        self._workers, self._quiet, self._output = workers, quiet, output
        self._bar: Bar | None = None
        self._written_bytes = 0

    def __enter__(self) -> "ConversionBar":
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    def log(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self._quiet:
            progress.log(text)

    def begin(self, title: str, text_bytes: int, done: int = 0) -> None:
        """Begin work that reads `text_bytes`, of which a previous run has converted `done`."""
        self._close()
        if 0 < done < text_bytes:
            self.log(f"{title}: resuming, {100 * done / text_bytes:.0f} % already done")
        self._total, self._done_before = text_bytes, done
        self._counted_before = self._workers.done
        self._uploaded_before = self._output.uploaded if self._output else 0
        self._start = time.monotonic()
        self._bar = Bar(title, text_bytes, initial=done, quiet=self._quiet, log_lines=True)

    def add_written(self, disk_bytes: int) -> None:
        """Count bytes that were written to disk."""
        self._written_bytes += disk_bytes

    def update(self) -> None:
        """Show the workers' counts."""
        if self._bar is not None:
            text, tokens = (now - before for now, before in zip(self._workers.done, self._counted_before, strict=True))
            self._bar.show(min(self._done_before + text, self._total), rates=self._rates(tokens))

    def _rates(self, tokens: int) -> str:
        """2.50 Mtok/s, 1.20 GB on disk; of an output in a store also what is uploaded."""
        if not tokens:
            return ""
        seconds = max(1e-9, time.monotonic() - self._start)
        uploaded = self._output.uploaded if self._output else 0
        where = "converted" if uploaded else "on disk"
        text = f"{tokens / seconds / 1e6:.2f} Mtok/s, {self._written_bytes / 1e9:.2f} GB {where}"
        if uploaded:
            rate = (uploaded - self._uploaded_before) / seconds
            text += f", {uploaded / 1e9:.2f} GB uploaded ({rate / 1e6:.1f} MB/s)"
        return text

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
