"""The drawings of the documentation, as SVG files in docs/.

python docs/site_build/figures.py      # docs/model.svg, docs/code.svg, docs/recurrence.svg
"""

from pathlib import Path

import matplotlib
import matplotlib.patches
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
BLUE, ORANGE, GREEN, GRAY = "#3b6fb6", "#d9822b", "#3f8f5f", "#555555"


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str = BLUE) -> None:
    box = matplotlib.patches.FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08")
    box.set(linewidth=1.4, edgecolor=color, facecolor=color + "18")
    axes.add_patch(box)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    bend: float = 0,
    dashed: bool = False,
) -> None:
    style = dict(
        arrowstyle="-|>", color=GRAY, lw=1.2, connectionstyle=f"arc3,rad={bend}", linestyle="--" if dashed else "-"
    )
    axes.annotate("", end, start, arrowprops=style)
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + 0.09, text, ha="center", va="bottom", fontsize=9, color=GRAY)


def model() -> Figure:
    """Prelude, the looped block with the input injected at every loop, coda."""
    figure, axes = _canvas(9.4, 2.9)
    _box(axes, 0.15, 1.0, 1.2, 0.8, "tokens\nembedding", GRAY)
    _box(axes, 1.85, 1.0, 1.3, 0.8, "prelude\n2 to 6 blocks")
    _box(axes, 3.95, 0.8, 2.5, 1.2, "one block, N times\nattention, then\nrouted + shared experts", ORANGE)
    _box(axes, 7.0, 1.0, 1.0, 0.8, "coda\n2 to 6 blocks")
    _box(axes, 8.3, 1.0, 0.95, 0.8, "head\n(tied)", GRAY)
    _arrow(axes, (1.37, 1.4), (1.83, 1.4))
    _arrow(axes, (3.17, 1.4), (3.93, 1.4), "e")
    _arrow(axes, (6.47, 1.4), (6.98, 1.4))
    axes.text(6.72, 1.5, r"$h_N$", ha="center", va="bottom", fontsize=9, color=GRAY)
    _arrow(axes, (8.02, 1.4), (8.28, 1.4))
    _arrow(axes, (6.1, 2.03), (4.3, 2.03), bend=0.55)
    axes.text(5.2, 2.62, r"$h_{t+1}$ becomes $h_t$:  4 to 64 loops", ha="center", fontsize=10, color=ORANGE)
    _arrow(axes, (2.5, 0.97), (5.2, 0.77), bend=0.35, dashed=True)
    axes.text(3.9, 0.1, "e is injected again at every loop", ha="center", fontsize=9, color=GRAY)
    return figure


def code() -> Figure:
    """The way of a batch through the packages."""
    figure, axes = _canvas(9.4, 3.6)
    _box(axes, 0.1, 2.6, 1.4, 0.7, "parquet,\nJSON lines, text", GRAY)
    _box(axes, 2.3, 2.6, 1.3, 0.7, "MDS shards", GRAY)
    _box(axes, 4.4, 2.6, 1.6, 0.7, "micro-batches\nof a replica", GRAY)
    _arrow(axes, (1.52, 2.95), (2.28, 2.95), "prepare/")
    _arrow(axes, (3.62, 2.95), (4.38, 2.95), "data/")
    _box(axes, 4.2, 1.1, 2.0, 0.8, "train/loop.py: batch,\nstep, evaluate, save")
    _arrow(axes, (5.2, 2.58), (5.2, 1.92))
    _box(axes, 7.1, 2.2, 2.1, 0.75, "train/engine.py on\nDeepSpeed: ZeRO, pipe")
    _box(axes, 7.1, 0.75, 2.1, 0.95, "model/ on parallel/:\nprelude, looped block,\ncoda, loss", ORANGE)
    _arrow(axes, (6.22, 1.65), (7.08, 2.4))
    _arrow(axes, (7.9, 2.18), (7.9, 1.72))
    _arrow(axes, (8.4, 1.72), (8.4, 2.18))
    axes.text(8.5, 1.94, "gradients", fontsize=9, color=GRAY, va="center")
    _box(axes, 1.3, 1.1, 1.9, 0.8, "checkpoints:\nsafetensors, JSON", GREEN)
    _arrow(axes, (4.18, 1.65), (3.22, 1.65), "checkpoint/")
    _arrow(axes, (3.22, 1.3), (4.18, 1.3))
    axes.text(3.7, 1.22, "any layout", ha="center", va="top", fontsize=9, color=GRAY)
    _box(axes, 2.6, 0.1, 5.0, 0.45, "ops/: session, watchdog, preflight, memory check, fault injection", GRAY)
    _arrow(axes, (5.2, 0.57), (5.2, 1.08), dashed=True)
    axes.text(5.3, 0.82, "hooks", fontsize=9, color=GRAY, va="center")
    return figure


def recurrence() -> Figure:
    """Left: decay and scale of the injection by step size. Right: h of one channel, without the block."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3), layout="constrained")
    dt = np.linspace(0, 4, 200)
    left.plot(dt, np.exp(-dt), color=BLUE, label=r"decay $a = e^{-\Delta}$")
    left.plot(dt, dt, color=ORANGE, label=r"scale $b = \Delta$")
    left.set(xlabel=r"step size $\Delta$ of a channel ($A = 1$)", ylim=(0, 2), title="The injection's two coefficients")
    left.legend()
    for step, color in ((0.2, BLUE), (0.8, ORANGE), (2.0, GREEN)):
        h = [0.0]
        for _ in range(16):
            h.append(np.exp(-step) * h[-1] + step)
        right.plot(h, color=color, marker=".", label=rf"$\Delta = {step:g}$")
        right.axhline(step / (1 - np.exp(-step)), color=color, linestyle=":", linewidth=1)
    right.set(xlabel="loop t", ylabel=r"$h_t$ for $e = 1$, $u_t = 0$", title="It forgets where it began")
    right.legend(loc="lower right")
    return figure


def main() -> None:
    """Write all drawings."""
    matplotlib.rcParams["svg.hashsalt"] = "mythos_dist"  # equal ids, so that files change only with the drawing
    for draw in (model, code, recurrence):
        file = DOCS / f"{draw.__name__}.svg"
        draw().savefig(file, metadata={"Date": None})
        print(file)


if __name__ == "__main__":
    main()
