"""Named ranges of a profile: parts of the model and of a step, as PyTorch's profiler and Perfetto show them.

Unless a profile is being recorded nothing of PyTorch is called. The trap: `torch.compile` reads a module's variables
when it traces, and would compile again when a profile begins, so a compiled block has no ranges inside.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch.autograd.profiler import record_function

P = ParamSpec("P")
R = TypeVar("R")

# The parts of a step; a loop's range is called "loop 3".
PARTS = ("loop", "attention", "router", "experts", "exchange", "ffn", "head", "optimizer")

_is_recording = False
_NOTHING = contextlib.nullcontext()


def named_range(name: str) -> contextlib.AbstractContextManager[object]:
    """A context whose operations are in the range `name` of the profile, if one is being recorded."""
    if torch.compiler.is_compiling() or not _is_recording:
        return _NOTHING
    return record_function(name)


def in_range(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: calls of the function are in the range `name`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not _is_recording:
                return function(*args, **kwargs)
            with record_function(name):
                return function(*args, **kwargs)

        return wrapper

    return decorate


@contextlib.contextmanager
def recorded_ranges() -> Iterator[None]:
    """Within this context ranges are recorded."""
    global _is_recording
    _is_recording = True
    try:
        yield
    finally:
        _is_recording = False
