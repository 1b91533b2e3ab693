"""The list of layers divided into pipeline stages.

A prelude or coda block is on one stage. Several stages may hold the looped block, and which of a step's loops each of
them runs is planned for every step, because the number of loops changes and no-grad loops cost a third.

Decisions: PARALLEL-2.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mythos_dist.config.schema import MythosConfig

# In a pipeline, optimizer groups are padded to a multiple of this many fp32 elements per rank, the widest register
# (AVX-512); model/parameter_groups.py says why.
GROUP_ALIGNMENT = 16


@dataclass(frozen=True)
class StageSpec:
    """The layers that one pipeline stage holds."""

    prelude: range
    has_loops: bool  # the looped block
    coda: range
    first: bool  # reads the tokens
    last: bool  # computes the loss
    starts_loops: bool = True  # no stage before it has loops
    ends_loops: bool = True  # no stage after it has loops

    @property
    def after_loops(self) -> bool:
        """Whether all layers of this stage come after the loops."""
        return not self.has_loops and (self.last or len(self.coda) > 0)

    @staticmethod
    def full(config: MythosConfig) -> "StageSpec":
        """All layers: the only stage without pipeline parallelism."""
        return StageSpec(range(config.prelude_layers), True, range(config.coda_layers), True, True)


@dataclass(frozen=True)
class LayerCosts:
    """Costs of layers, forward and backward, in any unit."""

    block: float  # one block of the prelude or the coda
    loop: float
    no_grad_loop: float
    head: float


def split_evenly(costs: Sequence[float], loads: Sequence[float], min_lengths: Sequence[int]) -> list[range]:
    """Divide `costs` into consecutive spans, one for each of `loads`, that minimize the largest load + span cost.

    Among equals, the sum of squares is least. Span i has at least `min_lengths[i]` layers. Raises ValueError if there
    are too few layers.
    """
    # Spans above an upper bound need not be tried; without a bound the time grows with the cube of the layers.
    bound = (sum(costs) + sum(loads)) / len(loads) + max(costs, default=0.0)
    while True:
        try:
            highest, _ = _best_split(costs, loads, min_lengths, max, bound)
            break
        except ValueError:
            if bound > sum(costs) + sum(loads):
                raise
            bound = 2 * bound or 1.0
    _, spans = _best_split(costs, loads, min_lengths, lambda total, cost: total + cost * cost, highest)
    return spans


def _best_split(
    costs: Sequence[float],
    loads: Sequence[float],
    min_lengths: Sequence[int],
    combine: Callable[[float, float], float],
    highest: float = math.inf,
) -> tuple[float, list[range]]:
    """The split with the least total, `combine`d over spans of which none costs more than `highest`.

    Dynamic programming over the ends of the spans.
    """
    sums = [0.0, *itertools.accumulate(costs)]
    n = len(costs)
    # An end that leaves more cost than the later spans have room for cannot be completed. The margin is for rounding.
    room = [0.0, *itertools.accumulate(max(0.0, highest - load) for load in reversed(loads[1:]))][::-1]
    earliest_ends = [bisect.bisect_left(sums, sums[n] - later - 1e-9 * sums[n]) for later in room]
    best: dict[int, tuple[float, list[range]]] = {0: (0.0, [])}  # end of the last span -> total, spans
    for load, min_length, earliest in zip(loads, min_lengths, earliest_ends, strict=True):
        previous, best = best, {}
        for start, (total_before, spans) in previous.items():
            for end in range(max(start + min_length, earliest), n + 1):
                cost = load + sums[end] - sums[start]
                if cost > highest:  # so do all longer spans
                    break
                total = combine(total_before, cost)
                if end not in best or total < best[end][0]:
                    best[end] = total, [*spans, range(start, end)]
    if n not in best:
        raise ValueError(f"{n} layers cannot be divided into {len(loads)} spans of at least {list(min_lengths)} layers")
    return best[n]


def plan_stages(config: MythosConfig, n_loops: int, stages: int, costs: LayerCosts) -> list[StageSpec]:
    """The layers of each stage, balanced for `n_loops` loops.

    At most n_loops + 2 stages; only the first and the last may have no layers.
    """
    if stages == 1:
        return [StageSpec.full(config)]
    prelude, coda = config.prelude_layers, config.coda_layers
    layers = [costs.block] * prelude + [costs.loop] * n_loops + [costs.block] * coda
    loads = [0.0] * (stages - 1) + [costs.head]
    specs = []
    for i, span in enumerate(split_evenly(layers, loads, [0] + [1] * (stages - 2) + [0])):
        loops = _overlap(span, prelude, n_loops)
        specs.append(
            StageSpec(
                prelude=_overlap(span, 0, prelude),
                has_loops=len(loops) > 0,
                coda=_overlap(span, prelude + n_loops, coda),
                first=i == 0,
                last=i == stages - 1,
                starts_loops=loops.start == 0,
                ends_loops=loops.stop == n_loops,
            )
        )
    return specs


def _overlap(span: range, offset: int, size: int) -> range:
    """The part of `span` within offset .. offset + size, relative to `offset`; may be empty."""
    start = min(max(span.start - offset, 0), size)
    return range(start, max(start, min(span.stop - offset, size)))


def loops_with_grad(loops: range, no_grad: int) -> range:
    """Those of `loops` that gradient flows through: the first `no_grad` loops of a step have none."""
    return range(max(no_grad, loops.start), max(no_grad, loops.stop))


@functools.lru_cache(maxsize=1024)
def plan_loops(stages: tuple[StageSpec, ...], n_loops: int, no_grad: int, costs: LayerCosts) -> list[range]:
    """The loops of a step that each stage runs, the first `no_grad` of them without gradient; may be empty."""
    if len(stages) == 1:
        return [range(n_loops)]
    with_loops = [i for i, stage in enumerate(stages) if stage.has_loops]
    loads = []
    for i in with_loops:
        blocks = len(stages[i].prelude) + len(stages[i].coda)
        loads.append(costs.block * blocks + (costs.head if stages[i].last else 0.0))
    loop_costs = [costs.no_grad_loop] * no_grad + [costs.loop] * (n_loops - no_grad)
    ranges = [range(0)] * len(stages)
    for i, span in zip(with_loops, split_evenly(loop_costs, loads, [0] * len(with_loops)), strict=True):
        ranges[i] = span
    return ranges
