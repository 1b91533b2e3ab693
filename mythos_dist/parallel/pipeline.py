"""The list of layers cut into pipeline stages, and the one tensor that goes from each stage to the next.

Prelude and coda blocks lie on one stage each. Every stage that runs loops holds the looped block, and which of a
step's loops it runs is decided for each step: their number changes, and loops without gradient cost a third.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mythos_dist.config.schema import MythosConfig


@dataclass(frozen=True)
class Part:
    """The layers that one pipeline stage holds."""

    prelude: range
    loops: bool
    coda: range
    first: bool  # reads tokens
    last: bool  # computes the loss
    loops_start: bool = True  # of the stages with loops the first
    loops_end: bool = True  # and the last

    @property
    def behind_loops(self) -> bool:
        """Whether all of it comes after the loops."""
        return not self.loops and (self.last or len(self.coda) > 0)

    @staticmethod
    def whole(config: MythosConfig) -> "Part":
        """All layers: a pipeline of one stage."""
        return Part(range(config.prelude_layers), True, range(config.coda_layers), True, True)


@dataclass(frozen=True)
class Costs:
    """What layers cost forward and backward, in any unit."""

    block: float  # a block of prelude or coda
    loop: float
    frozen_loop: float  # one that no gradient flows through
    head: float


def split_evenly(costs: Sequence[float], loads: Sequence[float], least: Sequence[int]) -> list[range]:
    """Cut `costs` into neighbouring stretches, one for each of `loads`, so that the dearest of load plus stretch is
    as cheap as can be, and then the sum of squares. Stretch i has at least `least[i]` members.
    """
    highest, _ = _best_split(costs, loads, least, lambda so_far, cost: max(so_far, cost))
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
    ends: dict[int, tuple[float, list[range]]] = {0: (0.0, [])}
    for load, few in zip(loads, least, strict=True):
        before, ends = ends, {}
        for start, (so_far, stretches) in before.items():
            for end in range(start + few, n + 1):
                cost = load + sums[end] - sums[start]
                total = join(so_far, cost)
                if cost <= highest and (end not in ends or total < ends[end][0]):
                    ends[end] = total, [*stretches, range(start, end)]
    if n not in ends:
        raise ValueError(f"{n} layers cannot be cut into {len(loads)} stretches of at least {list(least)}")
    return ends[n]


def plan_parts(config: MythosConfig, n_loops: int, stages: int, costs: Costs) -> list[Part]:
    """What each of `stages` stages holds, balanced for `n_loops` loops. Only the ends of the line may be without
    layers; at most n_loops + 2 stages."""
    if stages == 1:
        return [Part.whole(config)]
    prelude, coda = config.prelude_layers, config.coda_layers
    layers = [costs.block] * prelude + [costs.loop] * n_loops + [costs.block] * coda
    loads = [0.0] * (stages - 1) + [costs.head]
    stretches = split_evenly(layers, loads, [0] + [1] * (stages - 2) + [0])

    def held(stretch: range, start: int, size: int) -> range:
        low = min(max(stretch.start - start, 0), size)
        return range(low, max(low, min(stretch.stop - start, size)))

    turns = [held(stretch, prelude, n_loops) for stretch in stretches]
    return [
        Part(
            prelude=held(stretch, 0, prelude),
            loops=len(turns[i]) > 0,
            coda=held(stretch, prelude + n_loops, coda),
            first=i == 0,
            last=i == stages - 1,
            loops_start=turns[i].start == 0,
            loops_end=turns[i].stop == n_loops,
        )
        for i, stretch in enumerate(stretches)
    ]


@functools.lru_cache(maxsize=1024)
def plan_loops(parts: tuple[Part, ...], n_loops: int, frozen: int, costs: Costs) -> list[range]:
    """Which of a step's loops each stage runs; the first `frozen` of them have no gradient. Some may run none."""
    holders = [i for i, part in enumerate(parts) if part.loops]
    fixed = [costs.block * (len(p.prelude) + len(p.coda)) + costs.head * p.last for p in parts]
    turns = [costs.frozen_loop] * frozen + [costs.loop] * (n_loops - frozen)
    stretches = split_evenly(turns, [fixed[i] for i in holders], [0] * len(holders))
    ranges = dict(zip(holders, stretches, strict=True))
    return [ranges.get(i, range(0)) for i in range(len(parts))]


Like = Sequence[tuple[torch.Size, torch.dtype]]  # shapes and dtypes of some tensors


def pack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Tensors of any dtypes as the bits of one flat tensor of `dtype`, none of them narrower than that; their gradients
    come back the same way.

    DeepSpeed runs backward once per tensor that stages exchange, so there is one. Nothing is rounded.
    """
    return _Pack.apply(dtype, *tensors)


def unpack(flat: Tensor, like: Like) -> list[Tensor]:
    """The tensors that `pack` was given, by their shapes and dtypes."""
    return list(_Unpack.apply(flat, tuple(like)))


def _wide_first(dtypes: Sequence[torch.dtype]) -> list[int]:
    """The order in which tensors are packed: then each begins at a multiple of its own item size."""
    return sorted(range(len(dtypes)), key=lambda i: -dtypes[i].itemsize)


def _to_bits(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    order = _wide_first([tensor.dtype for tensor in tensors])
    return torch.cat([tensors[i].contiguous().flatten().view(dtype) for i in order])


def _from_bits(flat: Tensor, like: Like) -> tuple[Tensor, ...]:
    order = _wide_first([dtype for _, dtype in like])
    sizes = [like[i][0].numel() * like[i][1].itemsize // flat.element_size() for i in order]
    parts = dict(zip(order, flat.split(sizes), strict=True))
    return tuple(parts[i].view(dtype).view(shape) for i, (shape, dtype) in enumerate(like))


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return _to_bits(tensors, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return None, *_from_bits(grad.contiguous(), ctx.like)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat: Tensor, like: tuple[tuple[torch.Size, torch.dtype], ...]) -> tuple[Tensor, ...]:
        ctx.dtype = flat.dtype
        return tuple(part.clone() for part in _from_bits(flat, like))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        return _to_bits(grads, ctx.dtype), None
