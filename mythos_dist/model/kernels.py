"""Which optional GPU packages this process can use, and why not when it cannot.

flash-attn and MegaBlocks have no place in the requirements: they are built against one torch and one CUDA
(`launch/install_gpu.sh`), and MegaBlocks' own requirements would drag torch down.
"""

import functools
import importlib
from typing import Literal

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
