"""Progress of what may take longer than five seconds: a bar with rate and time left on standard error.

Silent when standard error is not a terminal. The exception is a conversion (`log_lines`): it runs for hours in batch
jobs, so it writes a line per minute to their logs. Results go to standard output, as JSON with a command's `--json`.

Decisions: PROJECT-12.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

Progress = Callable[[int], object]  # called with the bytes, or other units, since the last call, as `Bar.update`
LINE_SECONDS = 60.0  # between two lines of `log_lines`


class _Display(tqdm):
    """Without tqdm's thread, which `miniters=0` makes unnecessary: some callers fork."""

    monitor_interval = 0


class Bar:
    """A bar of the units that are done; a context manager, which removes the bar at its end.

    total: units; None: unknown, so no time left is shown. unit: "B" is scaled to kB, MB and so on. initial: units that
    an earlier process has done, which rate and time left do not count.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        unit: str = "B",
        initial: float = 0,
        quiet: bool = False,
        log_lines: bool = False,
    ):
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._logs = log_lines and not quiet and not on_terminal
        self._description, self._unit, self._initial = description, unit, initial
        self._begin = time.monotonic()
        self._next_line = self._begin + LINE_SECONDS
        self._rates = ""
        self.done = initial
        self._bar: Any = _Display(
            total=total,
            desc=description,
            unit=unit,
            unit_scale=unit == "B",
            initial=initial,
            miniters=0,  # at most ten times per second, however many units pass
            file=sys.stderr,
            disable=quiet or not on_terminal,
            leave=False,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Show the last values, and remove the bar."""
        shown = not self._bar.disable
        self._bar.refresh()
        self._bar.close()
        if shown:  # else a buffered stream keeps the carriage return, and standard output continues the cleared line
            with contextlib.suppress(OSError, ValueError):  # a closed terminal
                self._bar.fp.flush()

    def update(self, units: float) -> None:
        """Count units that were done since the last call."""
        self.done += units
        self._bar.update(units)
        self._log()

    def show(self, done: float, total: float | None = None, rates: str = "") -> None:
        """Set the units that are done, of a new `total` unless it is None; `rates`: text after the rate of units.

        If fewer are done than before, another count begins, with a rate of its own.
        """
        if done < self.done:
            self._begin, self.done = time.monotonic(), 0
            self._bar.reset(total)
        if total is not None:
            self._bar.total = total
        if rates != self._rates:
            self._rates = rates
            if not self._bar.disable:
                self._bar.set_postfix_str(rates, refresh=False)
        units, self.done = done - self.done, done
        self._bar.update(units)
        self._log()

    def describe(self, description: str) -> None:
        """Name the part of the work that begins."""
        self._description = description
        if not self._bar.disable:
            self._bar.set_description(description)

    def _log(self) -> None:
        """Write a line if it is due: 40 %, 12.1 MB/s, 2.5 Mtok/s, 01:10 left."""
        now = time.monotonic()
        if not self._logs or now < self._next_line:
            return
        self._next_line += LINE_SECONDS
        total, rate = self._bar.total or 1, (self.done - self._initial) / max(1e-9, now - self._begin)
        speed = f"{rate / 1e6:.1f} MB/s" if self._unit == "B" else f"{rate:.1f}{self._unit}/s"
        left = tqdm.format_interval(max(0.0, total - self.done) / max(1e-9, rate))
        columns = [f"{100 * min(1.0, self.done / total):.0f} %", speed, *([self._rates] if self._rates else [])]
        print(f"{self._description}: {', '.join([*columns, f'{left} left'])}", file=sys.stderr, flush=True)


def log(text: str, file: Any = None) -> None:
    """Print a line on standard error, or to `file`, above a bar if there is one."""
    tqdm.write(text, file=file or sys.stderr)
