"""The list of layers cut into pipeline stages.

Prelude and coda blocks lie on one stage each. Every stage that runs loops holds the looped block, and which of a
step's loops it runs is decided for each step: their number changes, and loops without gradient cost a third.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mythos_dist.config.schema import MythosConfig

# In a pipeline optimizer groups are filled up to multiples of this per rank: fp32 numbers in the widest register
# (AVX-512); model/parameter_groups.py says why.
GROUP_ALIGNMENT = 16


@dataclass(frozen=True)
class StageSpec:
    """The layers that one pipeline stage holds."""

    prelude: range
    has_loops: bool
    coda: range
    first: bool  # reads tokens
    last: bool  # computes the loss
    starts_loops: bool = True  # of the stages with loops the first
    ends_loops: bool = True  # and the last

    @property
    def after_loops(self) -> bool:
        """Whether all of it comes after the loops."""
        return not self.has_loops and (self.last or len(self.coda) > 0)

    @staticmethod
    def full(config: MythosConfig) -> "StageSpec":
        """All layers: a pipeline of one stage."""
        return StageSpec(range(config.prelude_layers), True, range(config.coda_layers), True, True)


@dataclass(frozen=True)
class LayerCosts:
    """What layers cost forward and backward, in any unit."""

    block: float  # a block of prelude or coda
    loop: float
    no_grad_loop: float  # one that no gradient flows through
    head: float


def split_evenly(costs: Sequence[float], loads: Sequence[float], least: Sequence[int]) -> list[range]:
    """Cut `costs` into neighbouring stretches, one for each of `loads`, so that the dearest of load plus stretch is
    as cheap as can be, and then the sum of squares. Stretch i has at least `least[i]` members.
    """
    # Nothing dearer than a bound that some split keeps has to be tried: without one, time is the cube of the layers.
    bound = (sum(costs) + sum(loads)) / len(loads) + max(costs, default=0.0)
    while True:
        try:
            highest, _ = _best_split(costs, loads, least, max, bound)
            break
        except ValueError:
            if bound > sum(costs) + sum(loads):
                raise
            bound = 2 * bound or 1.0
    _, stretches = _best_split(costs, loads, least, lambda so_far, cost: so_far + cost * cost, highest)
    return stretches


def _best_split(
    costs: Sequence[float],
    loads: Sequence[float],
    least: Sequence[int],
    join: Callable[[float, float], float],
    highest: float = math.inf,
) -> tuple[float, list[range]]:
    """The split with the least total, joined over stretches none of which costs more than `highest`; by dynamic
    programming over where stretches end."""
    sums = [0.0, *itertools.accumulate(costs)]
    n = len(costs)
    # What later stretches have room for; an end that leaves more than that leads nowhere. A little more, for rounding.
    room = [0.0, *itertools.accumulate(max(0.0, highest - load) for load in reversed(loads[1:]))][::-1]
    earliest = [bisect.bisect_left(sums, sums[n] - after - 1e-9 * sums[n]) for after in room]
    ends: dict[int, tuple[float, list[range]]] = {0: (0.0, [])}
    for load, few, first in zip(loads, least, earliest, strict=True):
        before, ends = ends, {}
        for start, (so_far, stretches) in before.items():
            for end in range(max(start + few, first), n + 1):
                cost = load + sums[end] - sums[start]
                if cost > highest:  # and so are all longer ones
                    break
                total = join(so_far, cost)
                if end not in ends or total < ends[end][0]:
                    ends[end] = total, [*stretches, range(start, end)]
    if n not in ends:
        raise ValueError(f"{n} layers cannot be cut into {len(loads)} stretches of at least {list(least)}")
    return ends[n]


def plan_stages(config: MythosConfig, n_loops: int, stages: int, costs: LayerCosts) -> list[StageSpec]:
    """What each of `stages` stages holds, balanced for `n_loops` loops. Only the ends of the line may be without
    layers; at most n_loops + 2 stages."""
    if stages == 1:
        return [StageSpec.full(config)]
    prelude, coda = config.prelude_layers, config.coda_layers
    layers = [costs.block] * prelude + [costs.loop] * n_loops + [costs.block] * coda
    loads = [0.0] * (stages - 1) + [costs.head]
    stretches = split_evenly(layers, loads, [0] + [1] * (stages - 2) + [0])

    def held(stretch: range, start: int, size: int) -> range:
        low = min(max(stretch.start - start, 0), size)
        return range(low, max(low, min(stretch.stop - start, size)))

    turns = [held(stretch, prelude, n_loops) for stretch in stretches]
    return [
        StageSpec(
            prelude=held(stretch, 0, prelude),
            has_loops=len(turns[i]) > 0,
            coda=held(stretch, prelude + n_loops, coda),
            first=i == 0,
            last=i == stages - 1,
            starts_loops=turns[i].start == 0,
            ends_loops=turns[i].stop == n_loops,
        )
        for i, stretch in enumerate(stretches)
    ]


def loops_with_grad(turns: range, frozen: int) -> range:
    """Those of the loops `turns` that gradient flows through: all but the first `frozen` of the step."""
    return range(max(frozen, turns.start), max(frozen, turns.stop))


@functools.lru_cache(maxsize=1024)
def plan_loops(parts: tuple[StageSpec, ...], n_loops: int, frozen: int, costs: LayerCosts) -> list[range]:
    """Which of a step's loops each stage runs; the first `frozen` of them have no gradient. Some may run none."""
    if len(parts) == 1:
        return [range(n_loops)]
    holders = [i for i, part in enumerate(parts) if part.has_loops]
    fixed = [costs.block * (len(p.prelude) + len(p.coda)) + costs.head * p.last for p in parts]
    turns = [costs.no_grad_loop] * frozen + [costs.loop] * (n_loops - frozen)
    stretches = split_evenly(turns, [fixed[i] for i in holders], [0] * len(holders))
    ranges = dict(zip(holders, stretches, strict=True))
    return [ranges.get(i, range(0)) for i in range(len(parts))]
