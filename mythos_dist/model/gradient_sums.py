"""Expert weight gradients that the loops of one pass accumulate in place.

A weight used in every loop gets one gradient per loop. Autograd allocates each in full, zeros for experts without
tokens included, and adds it to the previous one: for stacks of experts that is more memory traffic than everything else
in a loop. Here the backward pass adds each expert's product to one buffer, which autograd gets once, after all loops.
Only on CPUs: torch's grouped matrix product on GPUs cannot accumulate into its output, so there autograd does it.

Decisions: MODEL-9.
"""

# E experts, M rows, F and D the two widths of a weight.

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor


class GradientSums:
    """The gradient buffers of one forward pass, for weights of one shape (E, F, D)."""

    def __init__(self) -> None:
        self._anchor: Tensor | None = None
        self._graph = -1
        self._sums: list[Tensor] = []
        self._touched: list[set[int]] = []

    def anchor(self, weights: Sequence[Tensor]) -> Tensor:
        """A scalar that every use of the weights must take as an input: its backward, which returns the sums to
        autograd, then runs after those of all uses."""
        if self._anchor is None:
            self._anchor = cast(Tensor, _ReturnSums.apply(self, *weights))
        return self._anchor

    def add(self, which: int, left: Tensor, right: Tensor, ends: list[int], weights: Sequence[Tensor]) -> None:
        """Add left_e^T @ right_e to the sum for weights[which]: left (M, F), right (M, D), rows of e up to ends[e].

        Call in a backward pass only. The sums of an earlier backward pass through the same graph are dropped.
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


class _ReturnSums(torch.autograd.Function):
    """A scalar zero that depends on the weights; its backward gives them the accumulated gradients."""

    @staticmethod
    def forward(ctx, sums: GradientSums, *weights: Tensor) -> Tensor:
        ctx.sums = sums
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return None, *ctx.sums._take()
