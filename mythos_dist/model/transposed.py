"""Transposed copies of the experts' `down`, for products of a few rows on a CPU.

Such products are fastest with weights (outputs, inputs), see `parallel/few_rows.py`. All weights are held like that but
`down` of the routed experts, which MegaBlocks' layout has transposed.

The trap: copies do not follow the weights. So layers see them only within `use`, and the weights must not change as
long as the copies are used.

Decisions: DECODE-9.
"""

# D model, F hidden width, E experts.

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mythos_dist.model.experts import Experts
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.process import on_cpu


class TransposedWeights:
    """The copies of a model's weights: none unless they are wanted, and fp32 on a CPU."""

    def __init__(self, model: Mythos, wanted: bool = True):
        self._copies: list[tuple[Experts, Tensor]] = []  # (E, D, F)
        weight = model.embed.weight
        if wanted and on_cpu(weight) and weight.dtype == torch.float32:
            mixtures = [module for module in model.modules() if isinstance(module, Experts)]
            self._copies = [(one, one.w2.detach().transpose(-2, -1).contiguous()) for one in mixtures]

    @property
    def num_bytes(self) -> int:
        """Size of the copies together."""
        return sum(copy.nbytes for _, copy in self._copies)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Within it the experts use the copies where they have few rows."""
        for module, copy in self._copies:
            module.transposed_down = copy
        try:
            yield
        finally:
            for module, _ in self._copies:
                module.transposed_down = None
