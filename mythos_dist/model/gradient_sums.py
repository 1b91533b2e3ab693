"""Weight gradients that the loops of one pass add up in place.

A weight that runs in every loop gets as many gradients. Autograd makes each of them whole, zeros for experts without
tokens included, and adds it to the last: for stacks of experts that is more memory traffic than all else in a loop.
Here a backward pass adds each expert's product to one sum, and hands that to autograd once, behind the last loop.
Products that add in place exist on CPUs only: torch's grouped product on GPUs cannot, so there autograd does it.
"""

# E experts, M rows, F and D the two widths of a weight.

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor


class GradientSums:
    """The sums of one forward pass for weights of shape (E, F, D), all of one shape."""

    def __init__(self) -> None:
        self._token: Tensor | None = None
        self._graph = -1
        self._sums: list[Tensor] = []
        self._touched: list[set[int]] = []

    def token(self, weights: Sequence[Tensor]) -> Tensor:
        """What every use of the weights takes as an input, so that the sums are handed on when all have been added."""
        if self._token is None:
            self._token = cast(Tensor, _HandOn.apply(self, *weights))
        return self._token

    def add(self, which: int, left: Tensor, right: Tensor, ends: list[int], weights: Sequence[Tensor]) -> None:
        """Add left_e^T @ right_e to the sums of weight `which`: left (M, F), right (M, D), rows of e up to ends[e].

        To be called inside a backward pass. Sums that another pass through the same graph began are dropped.
        """
        graph = torch._C._current_graph_task_id()
        if graph != self._graph:
            self._graph = graph
            self._sums = [torch.empty_like(weight) for weight in weights]
            self._touched = [set() for _ in weights]
        sums, touched, start = self._sums[which], self._touched[which], 0
        for e, end in enumerate(ends):
            if start < end:
                torch.addmm(
                    sums[e], left[start:end].t(), right[start:end], beta=1.0 if e in touched else 0.0, out=sums[e]
                )
                touched.add(e)
            start = end

    def _take(self) -> list[Tensor]:
        for total, touched in zip(self._sums, self._touched, strict=True):
            for e in set(range(len(total))) - touched:
                total[e].zero_()
        sums, self._sums, self._graph = self._sums, [], -1
        return sums


class _HandOn(torch.autograd.Function):
    """A scalar that depends on the weights; its backward runs behind those of all who use it."""

    @staticmethod
    def forward(ctx, sums: GradientSums, *weights: Tensor) -> Tensor:
        ctx.sums = sums
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return None, *ctx.sums._take()
