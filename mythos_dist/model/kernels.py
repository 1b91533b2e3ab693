"""Which code runs: a CPU's or a GPU's own, and which optional GPU packages this process can use, and why not.

flash-attn and MegaBlocks have no place in the requirements: they are built against one torch and one CUDA
(`launch/install_gpu.sh`), and MegaBlocks' own requirements would drag torch down.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Literal

from torch import Tensor

_as_on_gpus = False

# What each package needs besides itself; the name of the module that is imported to find out.
PACKAGES = {
    "flash_attn": ["flash_attn", "flash_attn_2_cuda"],
    "megablocks": ["stk", "grouped_gemm", "grouped_gemm_backend", "megablocks_ops", "megablocks.layers.dmoe"],
}


@functools.cache
def why_not(package: Literal["flash_attn", "megablocks"]) -> str | None:
    """None if the package and its kernels can be imported, else a line that says which part cannot and why."""
    for module in PACKAGES[package]:
        try:
            importlib.import_module(module)
        except Exception as error:  # a wheel for another torch fails with OSError, AttributeError, RuntimeError, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return f"{module} cannot be imported ({reason})"
    return None


def on_cpu(x: Tensor) -> bool:
    """Whether code that is better for CPUs works on x; a dry run takes a GPU's ways with tensors that say `cpu`."""
    return x.device.type == "cpu" and not _as_on_gpus


@contextlib.contextmanager
def as_on_gpus() -> Iterator[None]:
    """Within it CPU tensors go the ways of GPU tensors, as far as a CPU has the operations."""
    global _as_on_gpus
    before, _as_on_gpus = _as_on_gpus, True
    try:
        yield
    finally:
        _as_on_gpus = before
