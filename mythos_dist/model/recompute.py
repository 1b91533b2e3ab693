"""Activation checkpointing: the backward recomputes activations instead of storing them (Chen et al. 2016).

With `train.offload: saved` the inputs of recomputed loops are in host memory: they are copied to pinned memory while
the loop runs. The backward pass copies them back one loop ahead: while loop t is recomputed and differentiated, the
inputs of loop t - 1 arrive. Copies have streams of their own, and values are the same bits. On a CPU the same code
copies from memory to memory.
The trap: a tensor must not be freed while its copy runs on another stream; `record_stream` tells the allocator.

Decisions: LOOPS-11.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Event = Any  # torch.cuda.Event; torch's annotations have two classes of that name
_streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}  # to the host, from the host


@dataclass(frozen=True)
class Recompute:
    """What is stored for the backward. `none`: all activations. `loop`: the input of every `every` loops. `selective`:
    the latents of attention (GQA: q, k, v) and the input of FFNs; recomputation then repeats no collective."""

    kind: Literal["none", "loop", "selective"] = "none"
    every: int = 1
    offload: bool = False  # kind=loop: what is stored of each loop goes to host memory


def checkpoint_if(enabled: bool, function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, under activation checkpointing if `enabled`."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def _streams_of(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
    return _streams[device]


def pinned_bytes(size: int) -> int:
    """What a tensor of `size` bytes takes in pinned memory: torch's allocator rounds up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


class HostCopy:
    """A copy of a tensor in host memory; on a GPU the copy is pinned, and both directions run beside other work."""

    def __init__(self, x: Tensor):
        self.device = x.device
        self._done: Event | None = None
        self.host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        if not x.is_cuda:
            self.host.copy_(x)
            return
        stream, _ = _streams_of(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)
        self._done = stream.record_event()

    def begin(self) -> tuple[Tensor, Event | None]:
        """Begin to copy it back: the tensor, and the event after which it has its values; None: it has them."""
        x = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        if not x.is_cuda:
            return x.copy_(self.host), None
        _, stream = _streams_of(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))  # the memory of x may still be in use there
        if self._done is not None:
            stream.wait_event(self._done)
        with torch.cuda.stream(stream):
            x.copy_(self.host, non_blocking=True)
        x.record_stream(stream)
        return x, stream.record_event()


class _Saved:
    """The inputs of one recomputed group of loops."""

    def __init__(self, previous: _Saved | None):
        self.previous = previous  # the group before it, whose backward pass comes next
        self.copies: list[HostCopy] = []
        self.on_device: list[tuple[Tensor, Event | None]] = []

    def pack(self, x: Tensor) -> tuple[_Saved, int]:
        self.copies.append(HostCopy(x))
        self.on_device.append((x.detach(), None))  # until the next group begins
        return self, len(self.copies) - 1

    def fetch(self) -> None:
        """Begin to copy all of it back, unless it is on the device."""
        if not self.on_device:
            self.on_device = [copy.begin() for copy in self.copies]

    def unpack(self, index: int) -> Tensor:
        self.fetch()
        if self.previous is not None:
            self.previous.fetch()
        x, done = self.on_device[index]
        if done is not None:
            torch.cuda.current_stream(x.device).wait_event(done)
        return x


class OffloadedStates:
    """What the groups of loops of one forward pass keep. The newest group's is also on the device, because the backward
    pass begins with it."""

    def __init__(self) -> None:
        self._newest: _Saved | None = None

    def run(self, function: Callable, *tensors: Tensor) -> Any:
        """`function(*tensors)`, a checkpointed call, with `tensors` saved in host memory. In the order of the pass."""
        if self._newest is not None:
            self._newest.on_device = []
        self._newest = saved = _Saved(self._newest)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda packed: packed[0].unpack(packed[1])):
            return function(*tensors)
