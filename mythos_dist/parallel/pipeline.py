"""The list of layers divided into pipeline stages.

A prelude or coda block is on one stage. Several stages may hold the looped block, and which of a step's loops each of
them runs is planned for every step, because the number of loops changes and no-grad loops cost a third.

Decisions: PARALLEL-2.
"""

import functools
import itertools
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
    is_first: bool  # reads the tokens
    is_last: bool  # computes the loss
    starts_loops: bool = True  # no stage before it has loops
    ends_loops: bool = True  # no stage after it has loops

    @property
    def after_loops(self) -> bool:
        """Whether all layers of this stage come after the loops."""
        return not self.has_loops and (self.is_last or len(self.coda) > 0)

    def holds_embedding(self, config: MythosConfig) -> bool:
        """Whether it has the table of the input embedding, which may be the head's too."""
        return self.is_first or (self.is_last and config.tie_embeddings)

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
    if sum(min_lengths) > len(costs):
        problem = f"{len(costs)} layers cannot be divided into {len(loads)} spans"
        raise ValueError(f"{problem} of at least {list(min_lengths)} layers")
    # Spans above a limit need not be tried; without one the time grows with the cube of the layers. Some split exceeds
    # neither value: fill the spans from left to right up to the limit, but leave enough layers for the minimum lengths
    # of the later ones. A span that is full costs at least the average. The factor is for rounding.
    largest = max(costs, default=0.0)
    average = (sum(costs) + sum(loads)) / len(loads)
    shortest = max(load + length * largest for load, length in zip(loads, min_lengths, strict=True))
    limit = 1.000001 * max(average + largest, shortest)
    least_maximum, _ = _best_split(costs, loads, min_lengths, limit, max)
    _, spans = _best_split(costs, loads, min_lengths, least_maximum, lambda total, cost: total + cost * cost)
    return spans


def _best_split(
    costs: Sequence[float],
    loads: Sequence[float],
    min_lengths: Sequence[int],
    limit: float,
    combine: Callable[[float, float], float],
) -> tuple[float, list[range]]:
    """The split with the least total, which `combine` adds a span's cost to; no span costs more than `limit`.

    Dynamic programming: the best way to divide the first N layers into i + 1 spans extends the best ways into i spans.
    """
    cost_before = [0.0, *itertools.accumulate(costs)]  # of layer N; the last entry is the cost of all layers
    best: dict[int, tuple[float, list[range]]] = {0: (0.0, [])}  # by N: total, spans
    for i, (load, min_length) in enumerate(zip(loads, min_lengths, strict=True)):
        # The later spans have room for this much; the factors are for rounding.
        room = 1.000001 * sum(max(0.0, limit - later) for later in loads[i + 1 :]) + 1e-9 * cost_before[-1]
        longer: dict[int, tuple[float, list[range]]] = {}
        for start, (total_before, spans) in best.items():
            for end in range(start + min_length, len(costs) + 1):
                cost = load + cost_before[end] - cost_before[start]
                if cost > limit:  # so do all longer spans
                    break
                if cost_before[-1] - cost_before[end] > room:
                    continue
                total = combine(total_before, cost)
                if end not in longer or total < longer[end][0]:
                    longer[end] = total, [*spans, range(start, end)]
        best = longer
    return best[len(costs)]


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
                is_first=i == 0,
                is_last=i == stages - 1,
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
        loads.append(costs.block * blocks + (costs.head if stages[i].is_last else 0.0))
    loop_costs = [costs.no_grad_loop] * no_grad + [costs.loop] * (n_loops - no_grad)
    ranges = [range(0)] * len(stages)
    for i, span in zip(with_loops, split_evenly(loop_costs, loads, [0] * len(with_loops)), strict=True):
        ranges[i] = span
    return ranges
