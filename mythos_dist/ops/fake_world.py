"""A fake process group and fake tensors, in which DeepSpeed's engines run one rank without memory or messages.

Fake tensors have shapes and no values. What needs values or a real process is replaced here.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mythos_dist.model import mythos, norm
from mythos_dist.model.activations import num_bytes
from mythos_dist.parallel.process import disable_cpu_op_builder


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it the attribute `name` of a module or class is `value`. Raises KeyError if `owner` does not define it."""
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Within it `variables` are set; afterwards the environment is as before, whatever the block has changed in it."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, logs and prints of DeepSpeed and torch: a dry run has no log for them."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _discard_stderr() -> Iterator[None]:
    """Discard standard error, that of child processes included."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """A process group of `world_size` ranks of which only `rank` exists; messages are discarded."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "DS_ACCELERATOR": "cpu",  # also on a machine with GPUs
    }
    with _environment(environment):
        with _discard_stderr():  # DeepSpeed calls a linker to find out which ops it could build
            import deepspeed

            disable_cpu_op_builder()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            deepspeed.init_distributed("gloo", verbose=False)
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors created within it have shapes and no values; code that needs values is replaced."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator
    from torch import _meta_registrations
    from torch._subclasses.fake_tensor import FakeTensorMode

    def no_gpu() -> bool:  # torch checks before every operation, and CUDA tensors need a driver
        return False

    def skip(*_: Any) -> None:
        pass

    replacements = [
        (torch.cuda, "is_available", no_gpu),
        (nn.Module, "_apply", _apply),
        (mythos, "init_parameters", skip),
        (norm, "_norm", _FusedNorm.apply),
        (PipelineEngine, "_recv_tensor_meta", _receive_shapes),
        # ZeRO-3 compares the ranks' next operations, by value.
        (partition_parameters, "assert_ints_same_as_other_ranks", skip),
        (partitioned_param_coordinator, "assert_ints_same_as_other_ranks", skip),
        (_meta_registrations, "_meta_grouped_mm_common", _meta_grouped_mm),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


class _FusedNorm(torch.autograd.Function):
    """The tensors of a GPU's `F.rms_norm`, one kernel forward and one backward. On tensors that say `cpu` torch runs a
    dozen operations instead, and model/norm.py a function whose backward holds four copies in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None


def _meta_grouped_mm(a: Tensor, b: Tensor, *_: Any, offs: Tensor, **__: Any) -> Tensor:
    """The output of a grouped GEMM. Torch's own meta kernel refuses fp32 and fp16, which the real one accepts."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])  # rows of groups, a matrix per group
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])  # columns of groups and rows of groups


def _receive_shapes(engine: Any, sender: int) -> Tensor:
    """The fake message with the shapes of the previous stage has no content; the model knows these shapes."""
    from deepspeed.runtime.pipe import engine as pipe

    pipe.p2p.recv(torch.empty(pipe.TENSOR_META_SIZE, dtype=torch.int32), sender)
    (stage,) = engine.module.forward_funcs
    inputs = stage.inputs[0]
    specs = stage.model.input_shapes(*inputs.input_ids.shape, inputs.readouts)
    dtype = next(stage.model.parameters()).dtype
    return engine._allocate_or_extend_buffers(0, [num_bytes(specs) // dtype.itemsize], dtype)


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that sets `.data`. The original swaps fake tensors, which fails while the meter refers to
    them."""
    for child in module.children():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = function(parameter.data)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
