"""Layers whose weights are cut over the tensor axis, and the loss over a vocabulary that is (Shoeybi et al. 2019).

A cut dimension of F numbers gives every rank ceil(F / size) of them; what the last ranks lack is filled with zeros.
Zeros get zero gradients in every layer here, so they stay zeros: exact, and invisible outside of the parameter.
DeepSpeed learns from marks on the parameters which gradient norms to add up (`tensor_model_parallel`) and which
gradients stay among the holders of an expert (`allreduce`, `group_name`).
"""

# B batch, S sequence, N = B * S tokens, D model, V vocabulary; "local" means this rank's part.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mythos_dist.parallel.collectives import _all_reduce, all_gather, enter_tensor_parallel, leave_tensor_parallel
from mythos_dist.parallel.mesh import Axis, Mesh

_LEAST_ROWS = 256  # tokens whose logits are made at a time, at least: fewer would make small products
IGNORED = -100  # a label that does not count (PyTorch's own default)


@dataclass(frozen=True)
class ParameterShard:
    """Which part of a whole tensor a parameter holds; its numbers behind that part are zeros."""

    whole: tuple[int, ...]  # shape of the whole tensor
    start: tuple[int, ...]  # per dimension
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many numbers per dimension are real."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))


def shard_range(size: int, axis: Axis) -> tuple[int, int, int]:
    """Start and stop of this rank's part of `size` numbers, and how many it allocates: ceil(size / axis.size)."""
    local = -(-size // axis.size)
    return min(axis.rank * local, size), min((axis.rank + 1) * local, size), local


def expert_group_name(axis: Axis) -> str:
    """What DeepSpeed calls the group of ranks that share one copy of the experts."""
    return f"ep_size_{axis.size}"


def shard_parameter(whole: tuple[int, ...], cuts: Mapping[int, Axis]) -> nn.Parameter:
    """This rank's part of a tensor of shape `whole`, dimension d cut over the axis `cuts[d]`; values not set."""
    ranges = [shard_range(size, cuts.get(dim, Axis("none"))) for dim, size in enumerate(whole)]
    parameter = nn.Parameter(torch.empty([local for _, _, local in ranges]))
    parameter.slice = ParameterShard(whole, tuple(r[0] for r in ranges), tuple(r[1] for r in ranges))  # type: ignore[attr-defined]
    parameter.shard_axes = {dim: axis.name for dim, axis in cuts.items()}  # type: ignore[attr-defined]
    for axis in cuts.values():
        if axis.name == "tensor" and axis.size > 1:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        if axis.name == "expert" and axis.size > 1:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = expert_group_name(axis)  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: Tensor) -> ParameterShard:
    """The part that a parameter holds; all of it unless it was made by `shard_parameter`."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves a shape of (0,) between uses
    return getattr(parameter, "slice", ParameterShard(shape, (0,) * len(shape), shape))


def replicated(module: nn.Module, mesh: Mesh, *, inside: bool = False) -> nn.Module:
    """Add up, over the tensor axis, the gradients of a module's parameters that every rank holds whole.

    Their gradients are partial with sequence parallelism, where each rank sees its own tokens, and always `inside`
    work that is divided over the axis. Once per backward pass: a hook on a leaf gets the sum of all its uses.
    """
    for parameter in module.parameters(recurse=False):
        parameter.gradient_sum = "always" if inside else "sequence"  # type: ignore[attr-defined]
        if mesh.tensor.size > 1 and (inside or mesh.sequence):
            parameter.register_hook(lambda grad: _all_reduce(grad, mesh.tensor))
    return module


class ParallelLinear(nn.Module):
    """x @ weight^T, the weight (outputs, inputs) cut over the tensor axis along its outputs or its inputs.

    Cut outputs: whole x -> this rank's outputs. Cut inputs: this rank's inputs -> a partial sum of all outputs.
    """

    def __init__(self, inputs: int, outputs: int, cut: Literal["outputs", "inputs"], mesh: Mesh):
        super().__init__()
        self.weight = shard_parameter((outputs, inputs), {0 if cut == "outputs" else 1: mesh.tensor})

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs, local if cut) -> (..., outputs, local if cut)."""
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """One table (V, D), cut by tokens, for both ends of the model; both go through `forward`, where ZeRO-3 gathers."""

    def __init__(self, vocab_size: int, dim: int, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.vocab_size = vocab_size
        self.first, self.last, _ = shard_range(vocab_size, mesh.tensor)
        self.weight = shard_parameter((vocab_size, dim), {0: mesh.tensor})

    def forward(
        self, x: Tensor, as_head: bool = False, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> Any:
        """ids (B, S) -> states (B, S or S / tensor, D); as head: states -> this rank's logits (B, S, local V).

        With labels (B, S), and weights (B, S) fp32 or None for ones: states -> a `HeadLoss`.
        """
        if labels is not None:
            rows = enter_tensor_parallel(x, self.mesh).flatten(0, 1)
            real, differentiate = self.last - self.first, torch.is_grad_enabled()
            weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
            axis, flat = self.mesh.tensor, (labels.flatten(), weights.flatten())
            total, losses, correct = _HeadLoss.apply(rows, self.weight, *flat, axis, self.first, real, differentiate)
            return HeadLoss(total, losses.view_as(labels), correct.view_as(labels))
        if as_head:
            return F.linear(enter_tensor_parallel(x, self.mesh), self.weight)
        mine = (x >= self.first) & (x < self.last)
        rows = F.embedding(torch.where(mine, x - self.first, 0), self.weight)
        if self.mesh.tensor.size > 1:
            rows = rows * mine.unsqueeze(-1)
        return leave_tensor_parallel(rows, self.mesh)

    def gather_logits(self, logits: Tensor) -> Tensor:
        """(B, S, local V) -> (B, S, V) on every rank."""
        return all_gather(logits, self.mesh.tensor, -1, partial=False)[..., : self.vocab_size]


class HeadLoss(NamedTuple):
    """What a head has to say of its labels; those that are IGNORED have a loss of 0 and are not correct."""

    total: Tensor  # (): sum of weights * losses, fp32; what gradient flows from
    losses: Tensor  # (B, S) fp32: cross entropies in nats
    correct: Tensor  # (B, S) bool: whether the label has the highest logit


class _HeadLoss(torch.autograd.Function):
    """The head's product and the cross entropy of its logits, a piece of the tokens at a time, gradients included.

    So the logits of all tokens never exist, in any precision, and nothing is computed twice: a piece's gradient is
    known as soon as its logits are, but for the factor that the backward pass brings.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        axis: Axis,
        first: int,
        real: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D), weight (local V, D) of which `real` rows are tokens from `first` on, labels and weights (N,) ->
        (), (N,), (N,) of a HeadLoss."""
        N, D = x.shape
        step = max(_LEAST_ROWS, N * D // weight.shape[0])  # a piece's logits are about as large as x
        losses, correct = weights.new_empty(N), torch.empty_like(labels, dtype=torch.bool)
        grads = [torch.empty_like(x), torch.zeros_like(weight)] if differentiate else []
        for start in range(0, N, step):
            piece = slice(start, start + step)
            losses[piece], correct[piece], gradient = _cross_entropy(
                x[piece] @ weight.t(), labels[piece], weights[piece], axis, first, real
            )
            if grads:
                torch.mm(gradient, weight, out=grads[0][piece])
                torch.addmm(grads[1], gradient.t(), x[piece], out=grads[1])
        ctx.save_for_backward(*grads, losses)
        ctx.mark_non_differentiable(losses, correct)
        return losses @ weights, losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor):  # type: ignore[override]
        grad_x, grad_weight, losses = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, losses * grad, None, None, None, None


def _cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, axis: Axis, first: int, real: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, local V), labels and weights (N,) -> cross entropies (N,), whether they are correct (N,), and the
    gradient of the cross entropies' weighted sum (N, local V).

    Three numbers per position travel between the parts of the vocabulary, never the logits.
    """
    x = logits.float()
    x[:, real:] = float("-inf")
    highest = x.amax(-1, keepdim=True)
    if axis.size > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=axis.group)
    x.sub_(highest)
    counts = labels != IGNORED
    mine = counts & (labels >= first) & (labels < first + real)
    column = torch.where(mine, labels - first, 0).unsqueeze(-1)
    target = x.gather(-1, column).squeeze(-1).where(mine, 0.0)
    x.exp_()
    sums = torch.stack([x.sum(-1), target])  # of the exponentials; and the label's logit, from whoever holds it
    if axis.size > 1:
        dist.all_reduce(sums, group=axis.group)
    weights = weights * counts
    x.mul_((weights / sums[0]).unsqueeze(-1))  # probabilities, 0 where a label does not count
    x.scatter_add_(-1, column, (-weights * mine).unsqueeze(-1))
    return (sums[0].log() - sums[1]).where(counts, 0.0), (sums[1] == 0) & counts, x.to(logits.dtype)
