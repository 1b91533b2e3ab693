"""What a run says of its loops: a line of numbers every few steps, and warnings that name the known failures.

The failures are those of Huginn's first runs (Geiping et al. 2025, section 4) and of OpenMythos as shipped: states of
all tokens become one; the state is ignored, so that more loops change nothing; the state grows with every loop; experts
that no token goes to.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mythos_dist.train.pictures import loops_axis, picture, value_axis
from mythos_dist.units import count

if TYPE_CHECKING:  # studies draw curves, and need no torch
    from torch import Tensor

SAME_LOSS = 1e-3  # share of a loss that one and many loops must differ by
SAME_TOKENS = 0.98  # mean cosine of the states of a sequence's tokens
GROWTH = 1.1  # gain of one loop's update
OVERTHINKING = 0.01  # share of the best loss by which more loops make it worse
# Of an axis of a picture, at least: smaller differences are mostly those between seeds, and should look it.
LOSS_RANGE = 5 * OVERTHINKING  # share of the largest loss
ACCURACY_RANGE = 0.05


class HeldOut(NamedTuple):
    """What an evaluation finds with some number of loops."""

    loss: float  # mean cross entropy, nats
    accuracy: float  # share of the tokens for which the model's first choice is right


Curve = Mapping[int, HeldOut]  # by the number of loops


class Look(NamedTuple):
    """What `Engine.look` finds on one micro-batch per replica."""

    n_loops: int
    loss: float  # with n_loops, nats
    loss_of_one: float  # with one loop
    by_loop: dict[str, list[float]]  # Watch.COLUMNS, means over tokens
    gain: float  # of the last loop's update: what it stretches a disturbance by
    rho: float  # the largest of A


def depth_line(look: Look, counts: "Tensor") -> dict[str, Any]:
    """For metrics.jsonl: the look, and the load of each loop's busiest expert over the mean, from a step's counts
    (n_loops, E)."""
    load = counts.double()
    busiest = load.amax(1) / load.mean(1).clamp(min=1e-9)
    return {
        "n_loops": look.n_loops,
        "loss": look.loss,
        "loss_of_one": look.loss_of_one,
        **{name: values for name, values in look.by_loop.items() if name != "tokens"},
        "expected_loops": sum((t + 1) * mass for t, mass in enumerate(look.by_loop["act_mass"])),
        "gain": look.gain,
        "rho_A": look.rho,
        "expert_load_max": busiest.tolist(),
    }


def failures(look: Look, counts: "Tensor") -> dict[str, str]:
    """Known failures that a look and a step's counts (n_loops, E) show: a name, and what to say of it."""
    found = {}
    if look.n_loops > 1 and abs(look.loss - look.loss_of_one) < SAME_LOSS * look.loss:
        found["state ignored"] = (
            f"the loss is the same with 1 loop ({look.loss_of_one:.4f}) and with {look.n_loops} ({look.loss:.4f}): the "
            "loops are of no use yet; try act.mode=off, loops.curriculum=linear, loops.distribution=poisson"
        )
    correlation = look.by_loop["token_correlation"][-1]
    if correlation > SAME_TOKENS:
        found["collapse"] = (
            f"the states of a sequence's tokens have become one (mean cosine {correlation:.3f} behind the last loop); "
            "try a lower optim.lr, model.injection=parcae, model.init=depth_scaled"
        )
    if not math.isnan(look.gain) and look.gain > GROWTH:
        found["growth"] = (
            f"a loop stretches a disturbance of the state by {look.gain:.2f} (A alone by {look.rho:.2f}): more loops "
            "than were trained will not be stable; try model.qk_norm=true, model.init=depth_scaled"
        )
    idle = int((counts.sum(0) == 0).sum())
    if idle:
        found["dead experts"] = (
            f"{idle} of {count(counts.shape[1], 'expert')} got no token in this step; try a larger "
            "experts.bias_update_rate, or experts.sequence_balance_loss=1e-4"
        )
    return found


def overthinks_from(curve: Curve) -> int | None:
    """The fewest loops behind the best number with which the loss is clearly worse than the best; None: no such."""
    best = min(curve, key=lambda n: curve[n].loss)
    worse = [n for n in curve if n > best and curve[n].loss > curve[best].loss * (1 + OVERTHINKING)]
    return min(worse, default=None)


def draw_curves(file: Path, curves: Mapping[str, Curve], trained: int) -> None:
    """A picture of loss and accuracy over loops, a line for each of `curves` by its name; `trained` is the mean number
    of loops in training. Where more loops do harm the line is marked."""
    harm = {name: worse for name, curve in curves.items() if (worse := overthinks_from(curve)) is not None}
    with picture(file, len(HeldOut._fields), (11, 4.2)) as panels:
        for panel, what in zip(panels, HeldOut._fields, strict=True):
            for name, curve in curves.items():
                loops = sorted(curve)
                (line,) = panel.plot(
                    loops, [getattr(curve[n], what) for n in loops], marker="o", markersize=4, label=name
                )
                marked = [n for n in loops if name in harm and n >= harm[name]]
                at = [getattr(curve[n], what) for n in marked]
                panel.scatter(marked, at, marker="x", s=70, color=line.get_color(), zorder=3)
            panel.axvline(trained, color="grey", linestyle=":", label=f"trained with {trained} on average")
            if harm:
                panel.scatter([], [], marker="x", s=70, color="black", label="overthinking")
            loops_axis(panel, {n for curve in curves.values() for n in curve})
            panel.set_ylabel("held-out loss (nats)" if what == "loss" else "accuracy (first choice)")
            panel.grid(alpha=0.3)
            losses = (one.loss for curve in curves.values() for one in curve.values())
            largest = max(filter(math.isfinite, losses), default=1.0)
            value_axis(panel, LOSS_RANGE * largest if what == "loss" else ACCURACY_RANGE)
        panels[0].legend(fontsize=8)
