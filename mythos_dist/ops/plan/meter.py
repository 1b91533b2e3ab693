"""Measure a step as it runs: bytes of live tensors by part, their peak, and FLOPs of matrix products.

Works on real and on fake tensors: a storage counts from the operation that creates it until it is freed. Fake tensors
have no values, so `item()` returns 1 (for a bool, False).
The trap: torch adds fake gradients out of place where it adds real ones in place, which would count memory that no real
run needs; `_is_in_place_sum` does what the real engine does (torch/csrc/autograd/input_buffer.cpp). With real tensors
torch adds out of place while any dispatch mode is active, and the meter counts that memory.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# See `plan.memory.PARTS`.
Part = Literal["parameters", "gradients", "optimizer", "activations", "workspace", "communication"]

aten = torch.ops.aten

_HEAD_GRADIENT = aten.zeros_like  # the head creates its gradient in the forward pass (parallel/tensor.py)


def _product(m: int, k: int, n: int) -> int:
    return 2 * m * k * n


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    m, k = a.shape
    return _product(m, k, b.shape[-1])


def _bmm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    batch, m, k = a.shape
    return batch * _product(m, k, b.shape[-1])


def _pairs(q: Tensor, k: Tensor, causal: bool) -> float:
    """(query, key) pairs that attention computes, over all heads: q (B, H, S, d), k (B, K, T, d)."""
    (B, H, S, _), T = q.shape, k.shape[2]
    return B * H * (S * (S + 1) / 2 if causal else S * T)


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> float:
    return 2 * _pairs(q, k, is_causal) * (q.shape[-1] + v.shape[-1])


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float, is_causal: bool, **_: Any
) -> float:
    # Scores recomputed, then the gradients of scores, values, queries and keys (Dao 2023).
    return 2 * _pairs(q, k, is_causal) * (3 * q.shape[-1] + 2 * v.shape[-1])


# FLOPs of an operation from its arguments: 2 per multiply-add, attention's causal half only.
FLOPS: dict[Any, Callable[..., float]] = {
    aten.mm: _mm,
    aten.addmm: lambda c, a, b, **_: _mm(a, b),
    aten.bmm: _bmm,
    aten.baddbmm: lambda c, a, b, **_: _bmm(a, b),
    aten._grouped_mm: _mm,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Meter(TorchDispatchMode):
    """Counts inside `with Meter() as meter:`. round_to: CUDA's allocator rounds sizes up to a multiple of this.
    on_flops: called with the FLOPs of each operation that has some."""

    def __init__(self, round_to: int = 512, on_flops: Callable[[float], object] = lambda flops: None):
        super().__init__()
        self._on_flops = on_flops
        self.round_to = round_to
        self.phase = "build"
        self.live: Counter[str] = Counter()  # bytes by part
        self.total = 0
        self.peak = 0  # bytes
        self.at_peak: dict[str, int] = {}  # bytes by part
        self.peak_phase = ""
        self.flops = 0.0
        self.operations = 0
        self.weight_shapes: set[torch.Size] = set()  # a tensor of such a shape can be a gradient
        self.bucket = 0  # elements of the buffer in which ZeRO reduces gradients
        self.partition = 0  # elements of this rank's part of them in ZeRO-2; with one replica as many
        self.gather_parameters: set[str] = set()  # process groups whose all-gathers unshard parameters (ZeRO-3)
        self._storages: dict[int, tuple[int, list[str]]] = {}  # bytes and part

    def reset(self) -> None:
        """Reset peak and FLOPs; live tensors stay counted."""
        self.peak, self.at_peak, self.flops, self.operations = 0, {}, 0.0, 0
        self._note_peak()

    def mark(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Assign tensors to a part, whenever they were created."""
        for tensor in tensors:
            size, holder = self._storages.get(self._track(tensor, part), (0, [part]))
            self.live[holder[0]] -= size
            self.live[part] += size
            holder[0] = part

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return _item(args[0])
        self.operations += 1
        if func is aten.add.Tensor and _is_in_place_sum(args):
            return args[0]
        packet = func._overloadpacket
        out = func(*args, **kwargs)
        if packet in FLOPS:
            flops = FLOPS[packet](*args, **kwargs)
            self.flops += flops
            self._on_flops(flops)
        if func.namespace == "c10d":
            self._mark_collective_output(func, args)
        backward = torch._C._current_graph_task_id() != -1
        for tensor in _tensors(out):
            if tensor.device.type != "meta":  # DeepSpeed keeps shapes as meta tensors
                self._track(tensor, self._part_of(tensor, packet, backward))
        return out

    def _part_of(self, tensor: Tensor, packet: Any, backward: bool) -> str:
        if self.phase != "passes":
            return "workspace"
        if tensor.shape == (self.bucket,):
            return "communication"
        if tensor.shape == (self.partition,):
            return "gradients"
        if tensor.shape in self.weight_shapes and (
            self._is_weight_gradient(tensor, packet) if backward else packet is _HEAD_GRADIENT
        ):
            return "gradients"
        return "workspace" if backward else "activations"

    @staticmethod
    def _is_weight_gradient(tensor: Tensor, packet: Any) -> bool:
        """Whether an operation of a backward pass that returns the shape of a weight computes a weight's gradient.

        Products of experts' rows are 2-D, as other weights are; recomputation runs with gradients enabled.
        """
        products = (aten.mm, aten.mul, aten.add, aten._to_copy)
        return not torch.is_grad_enabled() and (
            packet in products or (packet is aten._grouped_mm and tensor.dim() == 3)
        )

    def _mark_collective_output(self, func: Any, args: tuple) -> None:
        """The outputs of a collective, which are its first argument."""
        parameters = False
        if self.gather_parameters and func.name().startswith("c10d::_allgather_base_"):
            group = torch.distributed.ProcessGroup.unbox(next(arg for arg in args if hasattr(arg, "_type")))
            parameters = group.group_name in self.gather_parameters
        for tensor in _tensors(args[0]):
            held = self._storages.get(tensor.untyped_storage()._cdata)
            if held and parameters and held[1][0] in ("activations", "workspace"):
                self.mark([tensor], "parameters")
            elif held and held[1][0] == "workspace":
                self.mark([tensor], "communication")

    def _track(self, tensor: Tensor, part: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = -(-storage.nbytes() // self.round_to) * self.round_to
            holder = [part]
            self._storages[key] = size, holder
            weakref.finalize(storage, self._freed, key).atexit = False
            self.live[part] += size
            self.total += size
            if self.total > self.peak:
                self._note_peak()
        return key

    def _freed(self, key: int) -> None:
        size, holder = self._storages.pop(key)
        self.live[holder[0]] -= size
        self.total -= size

    def _note_peak(self) -> None:
        self.peak, self.at_peak, self.peak_phase = self.total, dict(self.live), self.phase


def _item(tensor: Tensor) -> bool | int | float:
    if type(tensor) is Tensor:
        return tensor.item()
    if tensor.dtype in (torch.bool, torch.uint8):  # DeepSpeed's flag that gradients overflow is a byte
        return False
    return 1.0 if tensor.is_floating_point() else 1


def _is_in_place_sum(args: tuple) -> bool:
    """Whether autograd's engine sums two gradients here and nothing else refers to the first: then it adds in place."""
    a, b = args[0], args[1]
    if torch._C._current_graph_task_id() == -1 or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in _DISPATCH_FRAMES:
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_engine_run_backward" or type(a) is Tensor:
        return False
    return torch._C._storage_Use_Count(a.untyped_storage()._cdata) <= _UNSHARED


# Functions between an operation and its dispatch mode.
_DISPATCH_FRAMES = {"__torch_dispatch__", "__call__", "inner", "_fn", "wrapper"}
_UNSHARED = 2  # uses of a storage: the tensor itself, and the handle of this query


def _tensors(nested: Any) -> Iterable[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for inner in nested:
            yield from _tensors(inner)
