"""Activation checkpointing: the backward recomputes activations instead of storing them (Chen et al. 2016)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Recompute:
    """What is stored for the backward. `none`: all activations. `loop`: the input of every `every` loops. `selective`:
    the latents of attention (GQA: q, k, v) and the input of FFNs; recomputation then repeats no collective."""

    kind: Literal["none", "loop", "selective"] = "none"
    every: int = 1
    offload: bool = False  # kind=loop: what is stored of each loop goes to host memory (model/offload.py)


def checkpoint_if(enabled: bool, function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, under activation checkpointing if `enabled`."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)
