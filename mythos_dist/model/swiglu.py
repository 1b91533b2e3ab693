"""SwiGLU: silu(gate) * up, and the product back to the model's width, in one autograd function.

The backward recomputes the hidden rows, which are as large as gate or up, from its inputs. That costs two passes over
values that it reads anyway.

Decisions: MODEL-7.
"""

# M rows, F hidden width, D model.

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.process import on_cpu
from mythos_dist.parallel.tensor import ParallelLinear

# Elements of gate per chunk on a CPU, so that a chunk fits its cache (1,024 rows of 512: 7 ms for a backward, against
# 10 for 8,192 rows at once and 18 with a new tensor for each operation).
_CHUNK_ELEMENTS = 1 << 19


def _chunks(gate: Tensor) -> list[slice]:
    rows = gate.shape[0]
    step = max(1, _CHUNK_ELEMENTS // gate.shape[1]) if on_cpu(gate) else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]


def swiglu_forward(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times the weight per row, if given: gate, up (M, F), weight (M,) -> (M, F)."""
    hidden = F.silu(gate).mul_(up)
    return hidden if weight is None else hidden.mul_(weight.unsqueeze(-1))


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad (M, F) of `swiglu_forward`'s output, and its arguments -> its output, the gradients of gate, up and weight.

    `grad` is overwritten: it becomes the gradient of gate. Without a weight its gradient is empty.
    """
    hidden, grad_up = torch.empty_like(gate), torch.empty_like(gate)
    grad_weight = gate.new_empty(0) if weight is None else torch.empty_like(weight)
    for c in _chunks(gate):
        active = torch.ops.aten.silu.out(gate[c], out=grad_up[c])
        torch.mul(active, up[c], out=hidden[c])
        if weight is not None:
            torch.sum(grad[c] * hidden[c], -1, out=grad_weight[c])
            hidden[c].mul_(weight[c].unsqueeze(-1))
            grad[c].mul_(weight[c].unsqueeze(-1))
        active.mul_(grad[c])
        torch.ops.aten.silu_backward.grad_input(grad[c].mul_(up[c]), gate[c], grad_input=grad[c])
    return hidden, grad, grad_up, grad_weight


class GatedLinear(ParallelLinear):
    """(silu(gate) * up) @ weight^T, the weight (outputs, hidden) sharded over the tensor axis along its inputs."""

    def __init__(self, hidden: int, outputs: int, mesh: Mesh):
        super().__init__(hidden, outputs, "inputs", mesh)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        """gate, up (N, local hidden) -> partial sums (N, outputs)."""
        if torch.is_inference_mode_enabled():  # launching the autograd function takes longer than a row
            return super().forward(swiglu_forward(gate, up))
        return _Gated.apply(gate, up, self.weight)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(swiglu_forward(gate, up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        gate, up, weight = ctx.saved_tensors
        hidden, grad_gate, grad_up, _ = swiglu_backward(grad @ weight, gate, up)
        return grad_gate, grad_up, grad.t() @ hidden
