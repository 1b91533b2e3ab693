"""Progress of a conversion on standard error: a bar on a terminal, a line per minute in a log, or nothing."""

import sys
import time
from typing import Any

from tqdm import tqdm

from mythos_dist.prepare.output import Output
from mythos_dist.prepare.pool import WorkerPool

LINE_SECONDS = 60.0  # between two lines if standard error is not a terminal


class ConversionProgress:
    """Shows text read, tokens per second, time left and bytes written. A context manager."""

    def __init__(self, workers: WorkerPool, quiet: bool, output: Output | None = None):
        self._workers, self._quiet, self._output = workers, quiet, output
        self._is_terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._written_bytes = 0

    def __enter__(self) -> "ConversionProgress":
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    def log(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def begin(self, title: str, text_bytes: int) -> None:
        """Begin a stage that reads `text_bytes`."""
        self._close()
        self._title, self._total, self._skipped = title, max(1, text_bytes), 0
        self._start = time.monotonic()
        self._next_line = self._start + LINE_SECONDS
        self._done_before = self._workers.done
        self._uploaded_before = self._output.uploaded if self._output else 0
        hidden = self._quiet or not self._is_terminal
        self._bar = tqdm(total=text_bytes, desc=title, unit="B", unit_scale=True, disable=hidden, leave=False)

    def skip(self, text_bytes: int) -> None:
        """Count bytes that a previous run converted."""
        self._skipped = text_bytes
        if 0 < text_bytes < self._total:
            self.log(f"{self._title}: resuming, {100 * text_bytes / self._total:.0f} % already done")
            if self._bar is not None:
                self._bar.initial = text_bytes  # rate and time left do not count these bytes

    def add_written(self, disk_bytes: int) -> None:
        """Count bytes that were written to disk."""
        self._written_bytes += disk_bytes

    def update(self) -> None:
        """Show the workers' counts."""
        if self._bar is None or self._quiet:
            return
        text, tokens = (now - before for now, before in zip(self._workers.done, self._done_before, strict=True))
        seconds = max(1e-9, time.monotonic() - self._start)
        done = min(self._skipped + text, self._total)
        where = "converted" if self._output and self._output.uploaded else "on disk"
        rates = f"{tokens / seconds / 1e6:.2f} Mtok/s, {self._written_bytes / 1e9:.2f} GB {where}" if tokens else ""
        if rates and self._output and self._output.uploaded:
            rate = (self._output.uploaded - self._uploaded_before) / seconds
            rates += f", {self._output.uploaded / 1e9:.2f} GB uploaded ({rate / 1e6:.1f} MB/s)"
        if self._is_terminal:
            self._bar.n = done
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.refresh()
        elif time.monotonic() >= self._next_line:
            self._next_line += LINE_SECONDS
            left = tqdm.format_interval((self._total - done) * seconds / max(1, text))
            columns = [f"{100 * done / self._total:.0f} %", f"{text / seconds / 1e6:.1f} MB/s of text"]
            if rates:
                columns.append(rates)
            print(f"{self._title}: {', '.join([*columns, f'{left} left'])}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
