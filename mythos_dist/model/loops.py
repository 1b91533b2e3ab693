"""The loops of one pass, and the sinusoidal signal of the loop index that the recurrent block adds to its input.

Decisions: MODEL-17.
"""

# B batch, S' tokens of each sequence on this rank, D model.

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mythos_dist.config.schema import MAX_LOOPS


class Loops(NamedTuple):
    """The loops of one pass, known before it begins and the same on every rank that processes these sequences.

    A sequence with fewer loops than the others starts later, so that all end together.
    """

    n_loops: int
    no_grad_loops: int = 0  # the first N loops run without gradient
    depths: Tensor | None = None  # (B,) loops of each sequence, at most n_loops; None: n_loops
    seeds: Tensor | None = None  # (B,) int64, seeds of random initial hidden states; None: 0 to B - 1
    readouts: bool = False  # after every loop with gradient, read out the output as if that loop were the last

    def is_last(self, t: int) -> bool:
        """Whether no loop follows loop t."""
        return t == self.n_loops - 1

    def reads_out(self, t: int) -> bool:
        """Whether the output is read out after loop t."""
        return self.readouts and t >= self.no_grad_loops

    def active(self, t: int) -> Tensor | None:
        """Whether each sequence takes part in loop t, bool (B,), or starts later; None: all take part."""
        return None if self.depths is None else self.depths > self.n_loops - 1 - t

    def own_index(self, t: int) -> int | Tensor:
        """The index, from 0, of loop t among each sequence's own loops: (B,), or one int for all sequences."""
        return t if self.depths is None else (t - self.n_loops + self.depths).clamp(min=0)

    def computes_kv(self, t: int, kv_loops: int) -> bool | Tensor:
        """Whether loop t is the first of `kv_loops` that share keys and values, so it computes them: one bool for all
        sequences, or (B,)."""
        if self.depths is None or t == 0 or kv_loops == 1:
            return t % kv_loops == 0
        return torch.as_tensor(self.own_index(t)) % kv_loops == 0

    def cache_index(self, t: int, kv_loops: int) -> int | list[int]:
        """The first loop of loop t's group of `kv_loops`, which names its cache entry: one int for all sequences, or a
        list. Waits for the GPU if sequences have loops of their own."""
        index = self.own_index(t)
        if isinstance(index, int):
            return index // kv_loops * kv_loops
        return [own // kv_loops * kv_loops for own in index.tolist()]

    def even_weight(self, active: Tensor | None, like: Tensor) -> Tensor:
        """The weight (B, S'), shaped as `like`, of a loop with the `active` sequences if all loops with gradient of a
        sequence weigh the same."""
        with_grad = self.n_loops - self.no_grad_loops
        if self.depths is None:
            return torch.full_like(like, 1 / with_grad)
        weight = 1.0 / self.depths.clamp(max=with_grad).unsqueeze(1)  # (B, 1)
        return where_active(active, weight, 0.0).expand_as(like)


def open_pass(index: int | Tensor) -> tuple[int, Loops]:
    """A loop t and `Loops` for one loop of a pass that may end after any loop.

    index: of the loop, or (B,) of each sequence's own: these become depths below a last loop that is never reached, so
    what depends on the loop index works as in training.
    """
    if isinstance(index, int):
        return index, Loops(_OPEN)
    # At t = 1 the own index is 1 - n_loops + depths. Not at t = 0, the first loop of all sequences in training.
    return 1, Loops(_OPEN, depths=index + _OPEN - 1)


_OPEN = MAX_LOOPS + 1  # loops of a pass without a last loop


def where_active(active: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """`new` (B, ...) for `active` sequences, bool (B,), and `old` for the others; None: all are active."""
    if active is None:
        return new
    while active.dim() < new.dim():
        active = active.unsqueeze(-1)
    return torch.where(active, new, old)


def loop_signals(loop_index: Tensor, dim: int, like: Tensor) -> Tensor:
    """loop_index (n,) -> (n, D): sin and cos of t * 10000^(-2i / L) in the first L = dim // 8 channels, then zeros."""
    width = dim // 8
    pairs = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angles = torch.outer(loop_index.float(), 10000.0 ** (-pairs / max(width, 1)))
    signals = torch.zeros(len(loop_index), dim, device=like.device, dtype=torch.float32)
    signals[:, :width] = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
    return signals.to(like.dtype)


def loop_signal(own_index: int | Tensor, dim: int, like: Tensor) -> Tensor:
    """The signal of a loop (D,), or of sequences' own (B,) -> (B, 1, D), from a table that is computed once."""
    signals = _all_signals(dim, like.dtype, like.device)
    return signals[own_index] if isinstance(own_index, int) else signals[own_index].unsqueeze(1)


@functools.lru_cache(maxsize=4)
def _all_signals(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The signals of all loops that a pass may have (MAX_LOOPS, D)."""
    return loop_signals(torch.arange(MAX_LOOPS, device=device), dim, torch.empty(0, dtype=dtype, device=device))
