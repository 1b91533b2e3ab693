"""Transposed copies of weights, for products of a few rows on a CPU.

Such a product reads each weight once, at the rate of memory, and long rows of consecutive elements are read fastest.
Layers hold (outputs, inputs). The copies hold (inputs, outputs) of the layers with more outputs than inputs: gate
beside up, of the experts and the FFNs, and the output head.

The trap: copies do not follow the weights. So layers see them only within `use`, and the weights must not change as
long as the copies are used.

Decisions: DECODE-9.
"""

# D model, F hidden width, E experts, V vocabulary.

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mythos_dist.model.experts import Experts
from mythos_dist.model.moe import FFN
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.process import on_cpu
from mythos_dist.parallel.tensor import Embedding


class TransposedWeights:
    """The copies of a model's weights: none unless they are wanted, and fp32 on a CPU."""

    def __init__(self, model: Mythos, wanted: bool = True):
        self._copies: list[tuple[Experts | FFN | Embedding, Tensor]] = []
        weight = model.embed.weight
        if not wanted or not on_cpu(weight) or weight.dtype != torch.float32:
            return
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Experts | FFN) or (isinstance(module, Embedding) and module is model.head):
                    self._copies.append((module, _transposed(module)))

    @property
    def num_bytes(self) -> int:
        """Size of the copies together."""
        return sum(copy.nbytes for _, copy in self._copies)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Within it the layers use the copies where they have few rows."""
        for module, copy in self._copies:
            module.transposed = copy
        try:
            yield
        finally:
            for module, _ in self._copies:
                module.transposed = None


def _transposed(module: Experts | FFN | Embedding) -> Tensor:
    """(E, D, 2 * F), (D, 2 * F) or (D, V): gate, then up."""
    if isinstance(module, Embedding):
        return module.weight.t().contiguous()
    parts = (module.w1, module.w3) if isinstance(module, Experts) else (module.gate.weight, module.up.weight)
    return torch.cat([part.transpose(-2, -1) for part in parts], dim=-1)
