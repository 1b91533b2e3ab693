"""Shared parts of all plots: PNG files that are written atomically, and axes for loops and for values."""

import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mythos_dist.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def save_plot(file: Path, columns: int, size: tuple[float, float]) -> Iterator[list["Axes"]]:
    """Yield `columns` empty panels side by side, `size` inches in total, and write them to `file` (PNG) at the end."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield list(panels[0])
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
        write_atomically(file, content.getvalue())
    finally:
        pyplot.close(figure)


def loops_axis(panel: "Axes", loops: Collection[int]) -> None:
    """A logarithmic x axis for numbers of loops, with a tick label for each of `loops`."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(sorted(loops)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.set_xlabel("loops")


def share_axis(panel: "Axes") -> None:
    """A y axis of shares from 0 to 100 %, with a grid."""
    from matplotlib.ticker import PercentFormatter

    panel.set_ylim(0, 1.02)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.grid(alpha=0.3)


def value_axis(panel: "Axes", least: float, which: Literal["x", "y"] = "y") -> None:
    """An axis with a range of at least `least`, labeled with plain values instead of an offset such as "+7".

    Without a minimum, matplotlib scales tiny differences to the full height. Call it after everything is drawn. Values
    must not be negative.
    """
    low, high = panel.get_ylim() if which == "y" else panel.get_xlim()
    if high - low < least:
        low = max(0.0, (low + high - least) / 2)
        (panel.set_ylim if which == "y" else panel.set_xlim)(low, low + least)
    panel.ticklabel_format(axis=which, style="plain", useOffset=False)
