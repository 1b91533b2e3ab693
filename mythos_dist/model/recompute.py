"""Activations that the backward pass computes again instead of keeping them (Chen et al. 2016)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Recompute:
    """`none`; `loop`: of every `every` loops only what goes in; `selective`: of attention the latents (GQA: q, k, v),
    of an FFN its input. Selective recomputation sends no message twice."""

    kind: Literal["none", "loop", "selective"] = "none"
    every: int = 1


def checkpoint_if(when: bool, function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`; if `when` is set, the backward keeps the arguments only and runs it again."""
    if when and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)
