"""Telemetry of the loops: values for metrics.jsonl, warnings about known failures, and curves over the number of loops.

The failures are those of Huginn's first runs (Geiping et al. 2025, section 4) and of OpenMythos as shipped: the states
of all tokens collapse into one; the state is ignored, so that more loops change nothing; the state grows with every
loop; experts receive no tokens.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from mythos_dist.train.plots import loops_axis, save_plot, value_axis
from mythos_dist.units import count

if TYPE_CHECKING:  # experiments draw curves without torch
    from torch import Tensor

SAME_LOSS = 1e-3  # relative difference of the losses with one loop and with all, below which the state is ignored
SAME_TOKENS = 0.98  # mean cosine of the states of a sequence's tokens, above which they have collapsed
GROWTH = 1.1  # gain of the last loop's update, above which the state grows
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


class LoopProbe(NamedTuple):
    """What `Engine.probe_loops` measures on one micro-batch per replica."""

    n_loops: int
    loss: float  # with n_loops, nats
    loss_of_one: float  # with one loop, nats
    by_loop: dict[str, list[float]]  # LoopRecorder.COLUMNS, means over tokens
    gain: float  # of the last loop's update: by how much it amplifies a perturbation of the state
    rho: float  # the largest element of A


def probe_entries(probe: LoopProbe, counts: "Tensor") -> dict[str, Any]:
    """For metrics.jsonl: the probe, and each loop's largest expert load over the mean, from a step's token counts
    (n_loops, loop_layers * E). All layers have the same number of tokens."""
    load = counts.double()
    busiest = load.amax(1) / load.mean(1).clamp(min=1e-9)
    return {
        "n_loops": probe.n_loops,
        "loss": probe.loss,
        "loss_of_one": probe.loss_of_one,
        **{name: values for name, values in probe.by_loop.items() if name != "tokens"},
        "expected_loops": sum((t + 1) * mass for t, mass in enumerate(probe.by_loop["act_mass"])),
        "gain": probe.gain,
        "rho_A": probe.rho,
        "expert_load_max": busiest.tolist(),
    }


def find_failures(probe: LoopProbe, counts: "Tensor") -> dict[str, str]:
    """Known failures that a probe and a step's token counts (n_loops, loop_layers * E) show: name -> message."""
    failures = {}
    if probe.n_loops > 1 and abs(probe.loss - probe.loss_of_one) < SAME_LOSS * probe.loss:
        failures["state ignored"] = (
            f"the loss is the same with 1 loop ({probe.loss_of_one:.4f}) and with {probe.n_loops} ({probe.loss:.4f}): "
            "the model does not use its loops yet; try act.mode=off, loops.curriculum=linear, "
            "loops.distribution=poisson"
        )
    correlation = probe.by_loop["token_correlation"][-1]
    if correlation > SAME_TOKENS:
        failures["collapse"] = (
            f"the states of a sequence's tokens have collapsed (mean cosine {correlation:.3f} after the last loop); "
            "try a lower optim.lr, model.injection=parcae, model.init=depth_scaled"
        )
    if not math.isnan(probe.gain) and probe.gain > GROWTH:
        failures["growth"] = (
            f"a loop amplifies a perturbation of the state by {probe.gain:.2f} (A alone by {probe.rho:.2f}): more "
            "loops than in training will not be stable; try model.qk_norm=true, model.init=depth_scaled"
        )
    idle = int((counts.sum(0) == 0).sum())
    if idle:
        failures["dead experts"] = (
            f"{idle} of {count(counts.shape[1], 'expert')} received no token in this step; try a larger "
            "experts.bias_update_rate, or experts.sequence_balance_loss=1e-4"
        )
    return failures


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
            panel.axvline(trained, color="grey", linestyle=":", label=f"trained with {trained} on average")
            if first_worse:
                panel.scatter([], [], marker="x", s=70, color="black", label="overthinking")
            loops_axis(panel, {n for curve in curves.values() for n in curve})
            panel.set_ylabel("held-out loss (nats)" if what == "loss" else "accuracy (first choice)")
            panel.grid(alpha=0.3)
            losses = (one.loss for curve in curves.values() for one in curve.values())
            largest = max(filter(math.isfinite, losses), default=1.0)
            value_axis(panel, LOSS_RANGE * largest if what == "loss" else ACCURACY_RANGE)
        panels[0].legend(fontsize=8)
