"""What all pictures share: a file that is there whole or not at all, and axes of loops and of values."""

import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mythos_dist.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def picture(file: Path, columns: int, size: tuple[float, float]) -> Iterator[list["Axes"]]:
    """`columns` empty panels side by side, together of `size` (inches); behind the block they are `file`, a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # a server has no screen
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
    """Numbers of loops from left to right, at equal distances for equal ratios; those of `loops` are named."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(sorted(loops)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.set_xlabel("loops")


def value_axis(panel: "Axes", least: float, which: Literal["x", "y"] = "y") -> None:
    """Values as they are, without an offset such as "+7", over a range of at least `least`.

    A line is drawn over the full height otherwise, however little its values differ. To be called when all is drawn;
    values below 0 are not expected.
    """
    low, high = panel.get_ylim() if which == "y" else panel.get_xlim()
    if high - low < least:
        low = max(0.0, (low + high - least) / 2)
        (panel.set_ylim if which == "y" else panel.set_xlim)(low, low + least)
    panel.ticklabel_format(axis=which, style="plain", useOffset=False)
