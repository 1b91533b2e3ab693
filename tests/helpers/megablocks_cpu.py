"""MegaBlocks on a CPU: its published Python and Triton code, with MOCKS of its CUDA extensions.

MegaBlocks needs a GPU in three places. Its Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before
triton is imported, hence new processes). Its two extension modules, `megablocks_ops` (sort, histogram, cumsum, block
indices) and `grouped_gemm_backend` (matrix products), are mocks: a few lines of torch each, with the C++ code's checks
of shape and dtype. So these tests cover the calls of those modules, their order and layouts, and the gradients, but
not the CUDA code; `launch/check_gpu.py` covers it on a machine with a GPU.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
INTEGERS = (torch.int16, torch.int32, torch.int64)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int16: "*i16", torch.int32: "*i32"}  # Triton's names


def launch_script(name: str) -> Any:
    """launch/NAME.py, a script outside any package, as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / "launch" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # before it runs: dataclasses look up their module
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def fetch(*packages: str) -> list[Path]:
    """Published sources, unpacked in a cache. Raises UserError if they cannot be downloaded.

    MYTHOS_DIST_SOURCES: another folder for the cache, such as one copied to a machine without network.
    """
    module = launch_script("gpu_sources")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mythos_dist" / "gpu_sources"
    folder = Path(os.environ.get("MYTHOS_DIST_SOURCES") or cache)
    return [module.fetch(module.pins()[package], folder) for package in packages]


def start(program: str, arguments: object, sources: list[Path], **env: str) -> subprocess.Popen:
    """Start a program of megablocks_worker.py in a new process; `result_of` waits for its result."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MEGABLOCKS_SOURCES": os.pathsep.join(map(str, sources)), **env}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("megablocks_worker.py")), program]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=variables, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    process.stdin.write(json.dumps(arguments))
    process.stdin.close()
    process.stdin = None  # else `communicate` would flush it
    return process


def result_of(process: subprocess.Popen) -> Any:
    """The result of a program; fails with the end of its error output."""
    out, err = process.communicate(timeout=1000)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out)


def install(sources: list[Path]) -> None:
    """Make `import megablocks` work in this process, with `sources` and the mocks below."""
    sys.path[:0] = [str(source) for source in sources]
    sys.modules["megablocks_ops"] = _module("megablocks_ops", sort, histogram, inclusive_cumsum, indices)
    sys.modules["grouped_gemm_backend"] = _module("grouped_gemm_backend", gmm)


def interpret_kernels() -> None:
    """Run Triton kernels in the interpreter, and record the launches."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set it before Python starts"
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction

    autotune, interpret = Autotuner.run, InterpretedFunction.run

    def first_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        del self.configs[1:]  # there is no GPU to time the others on
        return autotune(self, *args, **kwargs)

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        launch = _describe(self.fn, args, kwargs)
        if launch not in LAUNCHES:
            LAUNCHES.append(launch)
        return interpret(self, *args, **kwargs)

    Autotuner.run, InterpretedFunction.run = first_config, recorded


def sparse_allowed() -> AbstractContextManager:
    """MegaBlocks refuses mlp_impl="sparse" with Triton >= 3.2, judging by the version's text alone."""
    import triton

    return mock.patch.object(triton, "__version__", "3.1.0")


LAUNCHES: list[dict] = []  # each kind of kernel launch once, for another process to compile
STACKS_SEEN: set[int] = set()  # addresses of the weights that grouped GEMMs received


def _describe(fn: Any, args: tuple, kwargs: dict) -> dict:
    """The kernel and, for each argument, its Triton type or, for a constant, its value."""
    parameters = inspect.signature(fn).parameters
    given = dict(zip(parameters, args, strict=False)) | kwargs
    signature, constants = {}, {}
    for name, parameter in parameters.items():
        value = given[name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif value is None or "constexpr" in str(parameter.annotation):
            signature[name] = "constexpr"
            constants[name] = value if value is None or isinstance(value, int) else str(value)
        else:
            signature[name] = "i32"
    options = {key: given[key] for key in ("num_warps", "num_stages") if key in given}
    return {"kernel": [fn.__module__, fn.__name__], "signature": signature, "constants": constants, "options": options}


def _module(name: str, *functions: Any) -> ModuleType:
    module = ModuleType(name, "A mock: see tests/helpers/megablocks_cpu.py")
    for function in functions:
        setattr(module, function.__name__, function)
    return module


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """MOCK of csrc/sort.h: CUB's radix sort is stable and compares the lowest `end_bit` bits only."""
    assert x.ndim == 1
    assert x.dtype in INTEGERS
    assert x.dtype == x_out.dtype == iota_out.dtype
    order = (x.long() & ((1 << end_bit) - 1)).argsort(stable=True)
    x_out.copy_(x[order])
    iota_out.copy_(order)


def histogram(x: Tensor, bins: int) -> Tensor:
    """MOCK of csrc/histogram.h, stricter: CUB ignores values outside the bins, and we never pass any."""
    assert x.ndim == 1
    assert x.dtype in INTEGERS
    assert not x.numel() or (int(x.min()) >= 0 and int(x.max()) < bins)
    return torch.bincount(x.long(), minlength=bins).int()


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """MOCK of csrc/cumsum.h."""
    assert x.ndim == out.ndim == 2
    assert dim == 1
    assert x.dtype in INTEGERS
    assert out.dtype == x.dtype
    out.copy_(x.cumsum(1))


def indices(padded_bins: Tensor, block: int, block_rows: int, block_columns: int, out: Tensor) -> None:
    """MOCK of csrc/indices.h: each block row of the hidden matrix has its expert's column blocks."""
    assert padded_bins.dtype == torch.int32
    assert out.dtype == torch.int16
    assert out.shape == (block_rows * block_columns,)
    ends = padded_bins // block
    expert = torch.searchsorted(ends, torch.arange(block_rows, dtype=ends.dtype), right=True)
    columns = expert.unsqueeze(1) * block_columns + torch.arange(block_columns)
    out.copy_(columns.flatten())


def gmm(a: Tensor, b: Tensor, c: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> None:
    """MOCK of grouped_gemm's csrc/grouped_gemm.cu: one product per expert, accumulated in fp32.

    The kernel supports bf16 only. The mock also takes fp32, so that tests of the rest can use fp32 tolerances.
    """
    assert a.dtype == b.dtype == c.dtype
    assert a.dtype in (torch.bfloat16, torch.float32)
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert c.is_contiguous()
    assert all(matrix.shape[-1] * matrix.element_size() % 16 == 0 for matrix in (a, b, c))  # CUTLASS' alignment
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.device.type == "cpu"
    assert not (trans_a and trans_b)
    assert int(batch_sizes.sum()) == a.shape[0]
    if trans_a:  # (rows, m), (rows, n) -> (experts, m, n)
        assert b.shape[0] == a.shape[0]
        assert c.shape == (len(batch_sizes), a.shape[1], b.shape[1])
    else:
        assert b.shape[0] == len(batch_sizes)
        STACKS_SEEN.add(b.data_ptr())
    for e, rows in enumerate(torch.arange(a.shape[0]).split(batch_sizes.tolist())):
        if trans_a:
            c[e] = a[rows].float().T @ b[rows].float()
        else:
            c[rows] = (a[rows].float() @ (b[e].T if trans_b else b[e]).float()).to(c.dtype)
