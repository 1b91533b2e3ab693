"""Results of evaluations: held-out loss and accuracy, for one number of loops or as a curve over it; plots of curves.

Needs no torch: experiments draw curves of results on disk.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mythos_dist.train.plots import loops_axis, save_plot, value_axis

OVERTHINKING = 0.01  # relative increase of the best loss by more loops
# The smallest range of an axis: smaller differences are mostly those between seeds, and should look small.
LOSS_RANGE = 5 * OVERTHINKING  # share of the largest loss
ACCURACY_RANGE = 0.05


class HeldOut(NamedTuple):
    """The result of an evaluation with some number of loops."""

    loss: float  # mean cross entropy, nats
    accuracy: float  # fraction of tokens for which the most probable prediction is correct


Curve = Mapping[int, HeldOut]  # by the number of loops


class Evaluation(NamedTuple):
    """What a run measures between two steps: a line of eval.jsonl."""

    heldout: HeldOut | None = None  # with the mean number of loops; None: the held-out loss is not due, or has no data
    by_loops: Curve = MappingProxyType({})
    of_average: HeldOut | None = None  # of the averaged weights
    average_samples: int = 0
    tasks: Mapping[str, Any] = MappingProxyType({})  # task -> metric -> value and standard error


def overthinks_from(curve: Curve) -> int | None:
    """The smallest number of loops above the best one with a clearly worse loss; None: there is none."""
    best = min(curve, key=lambda n: curve[n].loss)
    worse = [n for n in curve if n > best and curve[n].loss > curve[best].loss * (1 + OVERTHINKING)]
    return min(worse, default=None)


def draw_curves(file: Path, curves: Mapping[str, Curve], trained: int) -> None:
    """Plot loss and accuracy over the number of loops, one line per name in `curves`; crosses mark overthinking.

    trained: the mean number of loops in training.
    """
    first_worse = {name: worse for name, curve in curves.items() if (worse := overthinks_from(curve)) is not None}
    with save_plot(file, len(HeldOut._fields), (11, 4.2)) as panels:
        for panel, what in zip(panels, HeldOut._fields, strict=True):
            for name, curve in curves.items():
                loops = sorted(curve)
                (line,) = panel.plot(
                    loops, [getattr(curve[n], what) for n in loops], marker="o", markersize=4, label=name
                )
                marked = [n for n in loops if name in first_worse and n >= first_worse[name]]
                at = [getattr(curve[n], what) for n in marked]
                panel.scatter(marked, at, marker="x", s=70, color=line.get_color(), zorder=3)
            panel.axvline(trained, color="gray", linestyle=":", label=f"trained with {trained} on average")
            if first_worse:
                panel.scatter([], [], marker="x", s=70, color="black", label="overthinking")
            loops_axis(panel, {n for curve in curves.values() for n in curve})
            panel.set_ylabel("held-out loss (nats)" if what == "loss" else "accuracy (first choice)")
            panel.grid(alpha=0.3)
            losses = (one.loss for curve in curves.values() for one in curve.values())
            largest = max(filter(math.isfinite, losses), default=1.0)
            value_axis(panel, LOSS_RANGE * largest if what == "loss" else ACCURACY_RANGE)
        panels[0].legend(fontsize=8)
