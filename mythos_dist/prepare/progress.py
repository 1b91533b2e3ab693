"""What a long conversion says: a bar to a person, a line now and then to a batch job's log, or nothing."""

import sys
import time
from typing import Any

from tqdm import tqdm

from mythos_dist.prepare.pool import Workers

LINE_SECONDS = 60.0  # between two lines where no person watches


class Progress:
    """Text read, tokens per second, time left, and bytes written, on standard error. A context."""

    def __init__(self, workers: Workers, quiet: bool):
        self._workers, self._quiet = workers, quiet
        self._watched = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._written = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    def say(self, text: str) -> None:
        """A line, unless quiet."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def begin(self, what: str, text_bytes: int) -> None:
        """A new stage of so many bytes."""
        self._close()
        self._what, self._total, self._skipped = what, max(1, text_bytes), 0
        self._start = time.monotonic()
        self._next_line = self._start + LINE_SECONDS
        self._before = self._workers.done
        hidden = self._quiet or not self._watched
        self._bar = tqdm(total=text_bytes, desc=what, unit="B", unit_scale=True, disable=hidden, leave=False)

    def skip(self, text_bytes: int) -> None:
        """So much was done by an earlier run."""
        self._skipped = text_bytes
        if 0 < text_bytes < self._total:
            self.say(f"{self._what}: going on; {100 * text_bytes / self._total:.0f} % was done before")
            if self._bar is not None:
                self._bar.initial = text_bytes  # the rate and the time left count from here

    def wrote(self, disk_bytes: int) -> None:
        """A part of so many bytes is on disk."""
        self._written += disk_bytes

    def tick(self) -> None:
        """Look at the workers' counts and show them."""
        if self._bar is None or self._quiet:
            return
        text, tokens = (now - before for now, before in zip(self._workers.done, self._before, strict=True))
        seconds = max(1e-9, time.monotonic() - self._start)
        done = min(self._skipped + text, self._total)
        rates = f"{tokens / seconds / 1e6:.2f} Mtok/s, {self._written / 1e9:.2f} GB on disk" if tokens else ""
        if self._watched:
            self._bar.n = done
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.refresh()
        elif time.monotonic() >= self._next_line:
            self._next_line += LINE_SECONDS
            left = tqdm.format_interval((self._total - done) * seconds / max(1, text))
            parts = [
                f"{100 * done / self._total:.0f} %",
                f"{text / seconds / 1e6:.1f} MB/s of text",
                rates,
                f"{left} left",
            ]
            print(f"{self._what}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
