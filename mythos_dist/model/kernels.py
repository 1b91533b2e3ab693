"""Whether CPU code or GPU code runs on a tensor."""

import contextlib
from collections.abc import Iterator

from torch import Tensor

_gpu_code_on_cpu = False


def on_cpu(x: Tensor) -> bool:
    """Whether to run the code that is faster on CPUs. A dry run uses GPU code with fake tensors on the CPU."""
    return x.device.type == "cpu" and not _gpu_code_on_cpu


@contextlib.contextmanager
def use_gpu_code() -> Iterator[None]:
    """Within it GPU code runs on CPU tensors, as far as the CPU has the operations."""
    global _gpu_code_on_cpu
    before, _gpu_code_on_cpu = _gpu_code_on_cpu, True
    try:
        yield
    finally:
        _gpu_code_on_cpu = before
