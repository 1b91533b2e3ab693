"""The optional GPU packages: the modules of each, and why this process cannot import them.

They are not among the requirements: each is built for one torch and one CUDA (`launch/install_gpu.sh`), and MegaBlocks'
own requirements would downgrade torch.
"""

import functools
import importlib
from typing import Literal

# The modules of each distribution that have to be importable, in the order in which they are built.
MODULES = {
    "stanford-stk": ("stk",),
    "grouped_gemm": ("grouped_gemm", "grouped_gemm_backend"),
    "megablocks": ("megablocks_ops", "megablocks.layers.dmoe"),
    "flash-attn": ("flash_attn", "flash_attn_2_cuda"),
}
# The distributions that experts.backend=megablocks and train.attention=flash_attn need.
DISTRIBUTIONS = {"megablocks": ("stanford-stk", "grouped_gemm", "megablocks"), "flash_attn": ("flash-attn",)}
INSTALL = "bash launch/install_gpu.sh"


def import_error(distribution: str) -> str | None:
    """None if all modules of the distribution can be imported, else which one cannot and why."""
    for module in MODULES[distribution]:
        try:
            importlib.import_module("torch")  # extension modules find torch's libraries only after it
            importlib.import_module(module)
        except Exception as error:  # built for another torch: OSError, AttributeError, RuntimeError, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return f"{module} cannot be imported ({reason})"
    return None


@functools.cache
def unavailable(package: Literal["flash_attn", "megablocks"]) -> str | None:
    """None if the package and all that it needs can be imported, else the first error."""
    return next(filter(None, map(import_error, DISTRIBUTIONS[package])), None)
