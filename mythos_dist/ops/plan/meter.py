"""Measuring a step as it runs: bytes of live tensors by part and their peak, and FLOPs of matrix products.

Works on real and on fake tensors alike: a storage counts from the operation that makes it until it is freed. Under
`FakeTensorMode` no number exists, so whatever asks for one gets a 1 (a bool: false).
The trap: torch adds fake gradients out of place where real ones are added in place, which would show as memory that
no real run needs; `_accumulated` does what the real engine does (torch/csrc/autograd/input_buffer.cpp). With real
tensors it adds out of place as long as any dispatch mode watches, and the meter counts what is then there.
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

_HEAD = (aten.zeros_like,)  # the head makes its gradient on the way forward (parallel/tensor.py)


def _product(m: int, k: int, n: int) -> int:
    return 2 * m * k * n


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    m, k = a.shape
    return _product(m, k, b.shape[-1])


def _bmm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    batch, m, k = a.shape
    return batch * _product(m, k, b.shape[-1])


def _pairs(q: Tensor, k: Tensor, causal: bool) -> float:
    """(query, key) pairs that are looked at, over all heads: q (B, H, S, d), k (B, K, T, d)."""
    (B, H, S, _), T = q.shape, k.shape[2]
    return B * H * (S * (S + 1) / 2 if causal else S * T)


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> float:
    return 2 * _pairs(q, k, is_causal) * (q.shape[-1] + v.shape[-1])


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float, is_causal: bool, **_: Any
) -> float:
    # Scores again, then the gradients of scores, values, queries and keys (Dao 2023).
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
    """Within `with Meter() as meter:` keeps the books. A CUDA allocator hands out multiples of `round_to` bytes."""

    def __init__(self, round_to: int = 512):
        super().__init__()
        self.round_to = round_to
        self.phase = "build"
        self.live: Counter[str] = Counter()  # bytes by part
        self.total = 0
        self.peak = 0  # bytes
        self.at_peak: dict[str, int] = {}  # bytes by part
        self.peak_phase = ""
        self.flops = 0.0
        self.operations = 0
        self.weight_shapes: set[torch.Size] = set()  # what counts as a gradient
        self.gather_parameters: set[str] = set()  # process groups whose all-gathers make parameters whole (ZeRO-3)
        self._storages: dict[int, tuple[int, list[str]]] = {}  # bytes and part

    def reset(self) -> None:
        """Forget peak and FLOPs; what is live stays so."""
        self.peak, self.at_peak, self.flops, self.operations = 0, {}, 0.0, 0
        self._note_peak()

    def mark(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Say which part tensors belong to, whenever they were made."""
        for tensor in tensors:
            size, holder = self._storages.get(self._follow(tensor, part), (0, [part]))
            self.live[holder[0]] -= size
            self.live[part] += size
            holder[0] = part

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return _some_number(args[0])
        self.operations += 1
        if func is aten.add.Tensor and _accumulated(args):
            return args[0]
        packet = func._overloadpacket
        out = func(*args, **kwargs)
        if packet in FLOPS:
            self.flops += FLOPS[packet](*args, **kwargs)
        if func.namespace == "c10d":
            self._written(func, args)
        backward = torch._C._current_graph_task_id() != -1
        for tensor in _tensors(out):
            if tensor.device.type != "meta":  # shapes that DeepSpeed keeps
                self._follow(tensor, self._part_of(tensor, packet, backward))
        return out

    def _part_of(self, tensor: Tensor, packet: Any, backward: bool) -> str:
        if self.phase != "passes":
            return "workspace"
        if tensor.shape in self.weight_shapes and (
            self._differentiates(tensor, packet) if backward else packet in _HEAD
        ):
            return "gradients"
        return "workspace" if backward else "activations"

    @staticmethod
    def _differentiates(tensor: Tensor, packet: Any) -> bool:
        """Whether an operation of a backward pass makes a weight's gradient, if its shape is that of a weight. Products
        of experts' rows have two dimensions, as other weights have; what is recomputed runs with gradients on."""
        products = (aten.mm, aten.mul, aten.add, aten._to_copy)
        return not torch.is_grad_enabled() and (
            packet in products or (packet is aten._grouped_mm and tensor.dim() == 3)
        )

    def _written(self, func: Any, args: tuple) -> None:
        """The results of a collective, which stand first among its arguments."""
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

    def _follow(self, tensor: Tensor, part: str) -> int:
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


def _some_number(tensor: Tensor) -> bool | int | float:
    if type(tensor) is Tensor:
        return tensor.item()
    if tensor.dtype in (torch.bool, torch.uint8):  # DeepSpeed's flag that gradients overflow is a byte
        return False
    return 1.0 if tensor.is_floating_point() else 1


def _accumulated(args: tuple) -> bool:
    """Whether autograd's engine adds up two gradients here, and nobody else holds the first: then it adds in place."""
    a, b = args[0], args[1]
    if torch._C._current_graph_task_id() == -1 or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in _PASS_ON:
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_engine_run_backward" or type(a) is Tensor:
        return False
    return torch._C._storage_Use_Count(a.untyped_storage()._cdata) <= _ALONE


_PASS_ON = {
    "__torch_dispatch__",
    "__call__",
    "inner",
    "_fn",
    "wrapper",
}  # frames between an operation and its dispatch mode
_ALONE = 2  # uses of a storage: of the tensor itself, and of the handle that asks


def _tensors(nested: Any) -> Iterable[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for inner in nested:
            yield from _tensors(inner)
