"""Layers whose weights are sharded over the tensor axis, and the vocabulary-parallel loss (Shoeybi et al. 2019).

Sharding a dimension of F elements gives every rank ceil(F / size) of them; the last ranks' shards are padded with
zeros. Padding gets zero gradients in every layer here, so it stays zero: results are exact, and nothing outside the
parameter sees it. DeepSpeed reads attributes of the parameters: `tensor_model_parallel`, whose gradient norms are
summed over the tensor axis, and `allreduce` and `group_name`, whose gradients stay within an expert's group.

Decisions: MODEL-10, PARALLEL-1, PARALLEL-7, LOOPS-7.
"""

# B batch, S sequence, N = B * S tokens, D model, V vocabulary; "local V" is this rank's shard of V, with padding.

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mythos_dist.parallel.collectives import (
    all_gather,
    all_reduce,
    enter_tensor_parallel,
    gather_rows,
    leave_tensor_parallel,
    sum_and_scatter,
)
from mythos_dist.parallel.few_rows import few_rows_linear
from mythos_dist.parallel.mesh import Axis, Mesh

_MIN_CHUNK = 256  # tokens whose logits are computed at a time, at least: smaller matrix products are slow
IGNORED = -100  # a label without loss (PyTorch's default ignore_index)


@dataclass(frozen=True)
class ParameterShard:
    """Which part of the full tensor a parameter holds; the elements after that part are zero padding."""

    full_shape: tuple[int, ...]
    start: tuple[int, ...]  # per dimension
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the shard without padding."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))


def shard_range(size: int, axis: Axis) -> tuple[int, int, int]:
    """Start and stop of this rank's shard of `size` elements, and the padded length, ceil(size / axis.size)."""
    local = -(-size // axis.size)
    return min(axis.rank * local, size), min((axis.rank + 1) * local, size), local


def expert_group_name(axis: Axis) -> str:
    """DeepSpeed's name of the group of ranks that share one copy of the experts."""
    return f"ep_size_{axis.size}"


def shard_parameter(full_shape: tuple[int, ...], axes: Mapping[int, Axis]) -> nn.Parameter:
    """This rank's shard of a tensor, dimension d sharded over the axis `axes[d]`; values are not initialized.

    The axes' names are recorded in `parameter.shard_axes`, by dimension.
    """
    ranges = [shard_range(size, axes.get(dim, Axis("none"))) for dim, size in enumerate(full_shape)]
    starts = tuple(start for start, _, _ in ranges)
    stops = tuple(stop for _, stop, _ in ranges)
    parameter = nn.Parameter(torch.empty([local for _, _, local in ranges]))
    parameter.shard = ParameterShard(full_shape, starts, stops)  # type: ignore[attr-defined]
    parameter.shard_axes = {dim: axis.name for dim, axis in axes.items()}  # type: ignore[attr-defined]
    for axis in axes.values():
        if axis.name == "tensor" and axis.size > 1:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        if axis.name == "expert" and axis.size > 1:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = expert_group_name(axis)  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: Tensor) -> ParameterShard:
    """What a parameter holds: the full tensor, unless `shard_parameter` created it."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # with ZeRO-3, `shape` is (0,) between uses
    return getattr(parameter, "shard", ParameterShard(shape, (0,) * len(shape), shape))


def replicated(module: nn.Module, mesh: Mesh, *, in_parallel_region: bool = False) -> nn.Module:
    """All-reduce, over the tensor axis, the gradients of a module's own parameters, which every rank holds in full.

    Each rank's gradient is partial with sequence parallelism, where ranks see different tokens, and always
    `in_parallel_region`, between `enter_tensor_parallel` and `leave_tensor_parallel`. Once per backward pass: a hook
    on a leaf gets the sum over all its uses. `parameter.gradient_sum` records which of the two holds.
    """
    for parameter in module.parameters(recurse=False):
        parameter.gradient_sum = "always" if in_parallel_region else "sequence"  # type: ignore[attr-defined]
        if mesh.tensor.size > 1 and (in_parallel_region or mesh.sequence):
            parameter.register_hook(lambda grad: all_reduce(grad, mesh.tensor))
    return module


class ParallelLinear(nn.Module):
    """x @ weight^T, the weight (outputs, inputs) sharded over the tensor axis by its outputs or its inputs.

    "outputs" is Megatron-LM's column-parallel linear: full x -> this rank's outputs.
    "inputs" is its row-parallel linear: this rank's inputs -> a partial sum of all outputs; without a bias, which every
    rank would add.
    """

    def __init__(
        self, inputs: int, outputs: int, sharded: Literal["outputs", "inputs"], mesh: Mesh, bias: bool = False
    ):
        super().__init__()
        assert sharded == "outputs" or not bias
        self.weight = shard_parameter((outputs, inputs), {0 if sharded == "outputs" else 1: mesh.tensor})
        self.bias = shard_parameter((outputs,), {0: mesh.tensor}) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs, local if sharded) -> (..., outputs, local if sharded)."""
        return few_rows_linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """The table (V, D) of the input embedding and the output head, sharded over V.

    `lookup`, `logits` and `loss` go through `forward`, because ZeRO-3 gathers the table before a module's forward and
    frees it afterwards.
    """

    def __init__(self, vocab_size: int, dim: int, mesh: Mesh, chunk_tokens: int = 0):
        """chunk_tokens: the most tokens whose logits the loss computes at a time; 0: as many as make logits as large
        as the hidden states."""
        super().__init__()
        self.mesh = mesh
        self.chunk_tokens = chunk_tokens
        self.vocab_size = vocab_size
        self.start, self.stop, _ = shard_range(vocab_size, mesh.tensor)
        self.weight = shard_parameter((vocab_size, dim), {0: mesh.tensor})

    def forward(self, use: Callable[..., Any], *arguments: Any) -> Any:
        """`use(*arguments)`, with the table gathered."""
        return use(*arguments)

    def lookup(self, ids: Tensor) -> Tensor:
        """Token ids (B, S) -> their rows (B, S or S / tensor, D)."""
        return self(self._lookup, ids)

    def logits(self, x: Tensor) -> Tensor:
        """x (B, S or S / tensor, D) -> this rank's logits (B, S, local V)."""
        return self(self._logits, x)

    def loss(
        self, x: Tensor, labels: Tensor, weights: Tensor | None = None, readouts: int = 1, teacher: float = 0.0
    ) -> "HeadLoss":
        """x (B, S or S / tensor, D), labels (B, S), and weights (B, S) fp32 or None for ones -> the loss.

        teacher: x is `readouts` batches of the same sequences, one after the other. The last one's output
        distribution p is the target of the others, whose loss is cross entropy plus `teacher` times KL(p || theirs); p
        has no gradient.
        """
        return self(self._loss, x, labels, weights, readouts, teacher)

    def gather_logits(self, logits: Tensor) -> Tensor:
        """(B, S, local V) -> (B, S, V) on every rank."""
        return all_gather(logits, self.mesh.tensor, -1, partial=False)[..., : self.vocab_size]

    def _lookup(self, ids: Tensor) -> Tensor:
        is_local = (ids >= self.start) & (ids < self.stop)
        rows = F.embedding(torch.where(is_local, ids - self.start, 0), self.weight)
        if self.mesh.tensor.size > 1:
            rows = rows * is_local.unsqueeze(-1)
        return leave_tensor_parallel(rows, self.mesh)

    def _logits(self, x: Tensor) -> Tensor:
        return few_rows_linear(enter_tensor_parallel(x, self.mesh), self.weight)

    def _loss(self, x: Tensor, labels: Tensor, weights: Tensor | None, readouts: int, teacher: float) -> "HeadLoss":
        if weights is None:
            weights = torch.ones_like(labels, dtype=torch.float32)
        # With chunk_tokens, _HeadLoss gathers each rank's part of a sequence one chunk at a time.
        gathers_chunks = self.mesh.sequence and self.chunk_tokens > 0
        if not gathers_chunks:
            x = enter_tensor_parallel(x, self.mesh)
        parts = self.mesh.tensor.size if gathers_chunks else 1
        labels, weights = (each.view(len(x), parts, -1).movedim(1, 0).flatten(1) for each in (labels, weights))
        total, losses, correct = _HeadLoss.apply(
            x.flatten(0, 1),
            self.weight,
            labels,
            weights,
            self.mesh.tensor,
            self.start,
            self.stop - self.start,
            labels.shape[1] // readouts * (readouts - 1) if teacher else 0,
            teacher,
            self.chunk_tokens,
            torch.is_grad_enabled(),
        )
        losses, correct = (each.view(parts, len(x), -1).movedim(0, 1).flatten(1) for each in (losses, correct))
        return HeadLoss(total, losses, correct)


class HeadLoss(NamedTuple):
    """The loss of the output head; an IGNORED label has a loss of 0 and is not correct."""

    total: Tensor  # (): sum of weights * losses, fp32; backward starts here
    losses: Tensor  # (B, S) fp32 in nats: cross entropies, of student readouts plus the teacher's term
    correct: Tensor  # (B, S) bool: whether the label has the highest logit


class _HeadLoss(torch.autograd.Function):
    """The head's matrix product and the cross entropy of its logits, with gradients, one chunk of tokens at a time.

    The logits of all tokens never exist at once, in any precision, and nothing is recomputed: forward computes a
    chunk's gradient from its logits, and backward only multiplies it by the incoming gradient.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        axis: Axis,
        start: int,
        num_local: int,
        num_student_rows: int,
        teacher: float,
        most_tokens: int,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D), weight (local V, D) whose first `num_local` rows are the tokens from `start` on, labels and
        weights (P, N) -> the fields of a HeadLoss: (), (P, N), (P, N).

        P is 1, or the ranks of the axis: then each has other rows of x, and labels are those of all. The first
        `num_student_rows` rows are distilled from the others, which repeat for each readout.
        """
        (N, D), parts = x.shape, len(labels)
        chunk_size = max(_MIN_CHUNK, labels.numel() * D // weight.shape[0])  # a chunk's logits are about as large as x
        chunk_size = max(1, min(chunk_size, most_tokens or chunk_size) // parts)
        losses, correct = torch.empty_like(weights), torch.empty_like(labels, dtype=torch.bool)
        grads = [torch.empty_like(x), torch.zeros_like(weight)] if needs_grad else []
        for chunk in _chunks(0, num_student_rows, chunk_size) + _chunks(num_student_rows, N, chunk_size):
            distillation = None
            if chunk.stop <= num_student_rows:
                rows = num_student_rows + torch.arange(chunk.start, chunk.stop, device=x.device) % (
                    N - num_student_rows
                )
                distillation = Distillation(_rows_of_parts(x[rows], axis, parts) @ weight.t(), teacher)
            rows = _rows_of_parts(x[chunk], axis, parts)
            of_chunk = _cross_entropy(
                rows @ weight.t(),
                labels[:, chunk].flatten(),
                weights[:, chunk].flatten(),
                axis,
                start,
                num_local,
                distillation,
            )
            losses[:, chunk], correct[:, chunk] = (each.view(parts, -1) for each in of_chunk[:2])
            grad_logits = of_chunk[2]
            if needs_grad:
                if parts == 1:
                    torch.mm(grad_logits, weight, out=grads[0][chunk])
                else:
                    grads[0][chunk] = sum_and_scatter(grad_logits @ weight, axis)
                torch.addmm(grads[1], grad_logits.t(), rows, out=grads[1])
            del of_chunk, grad_logits, distillation  # else they would exist beside the next chunk's logits
        ctx.save_for_backward(*grads, losses)
        ctx.mark_non_differentiable(losses, correct)
        return losses.flatten() @ weights.flatten(), losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor):  # type: ignore[override]
        grad_x, grad_weight, losses = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, losses * grad, *[None] * 7


def _rows_of_parts(x: Tensor, axis: Axis, parts: int) -> Tensor:
    """x (n, D) -> (n * parts, D): the rows of all ranks of the axis, one rank after the other."""
    return x if parts == 1 else gather_rows(x, axis)


def _chunks(first: int, stop: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, stop)) for start in range(first, stop, size)]


class Distillation(NamedTuple):
    """The last readout as the teacher of an earlier one, the student, for the same tokens."""

    logits: Tensor  # (N, local V) of the teacher
    weight: float  # of KL(teacher || student)


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    axis: Axis,
    start: int,
    num_local: int,
    distillation: Distillation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, local V), labels and weights (N,) -> losses (N,), whether the label has the highest logit (N,), and
    the gradient of the losses' weighted sum by the logits (N, local V).

    A loss is the cross entropy, with distillation plus its weight times KL(teacher || student).
    Ranks exchange three values per token (maximum, sum of exponentials, the label's logit), and with distillation three
    more (the teacher's maximum and sum, and the sum of the divergence), never the logits.
    """
    x = _shifted(logits, axis, num_local)
    counts = labels != IGNORED
    is_local = counts & (labels >= start) & (labels < start + num_local)
    column = torch.where(is_local, labels - start, 0).unsqueeze(-1)
    target = x.gather(-1, column).squeeze(-1).where(is_local, 0.0)
    p, kl_sums = None if distillation is None else _shifted(distillation.logits, axis, num_local), []
    if p is not None:
        difference = (p - x)[:, :num_local]
        p.exp_()
        # A product of matrices, because p * difference would be another tensor of this size.
        difference_sum = torch.bmm(p[:, :num_local].unsqueeze(1), difference.unsqueeze(2)).view(-1)
        del difference
        kl_sums = [p.sum(-1), difference_sum]
    x.exp_()
    sums = torch.stack([x.sum(-1), target, *kl_sums])  # `target` is 0 on all ranks but that of the label's shard
    if axis.size > 1:
        dist.all_reduce(sums, group=axis.group)
    exp_sum, target, *kl_sums = sums
    losses, weights = exp_sum.log() - target, weights * counts
    x.mul_((weights / exp_sum).unsqueeze(-1))  # weight * softmax; 0 where the label is ignored
    if distillation is not None and p is not None:
        teacher_sum, difference_sum = kl_sums
        losses += distillation.weight * (difference_sum / teacher_sum - teacher_sum.log() + exp_sum.log())
        x.mul_(1 + distillation.weight).addcmul_(p, (-distillation.weight * weights / teacher_sum).unsqueeze(-1))
    x.scatter_add_(-1, column, (-weights * is_local).unsqueeze(-1))
    return losses.where(counts, 0.0), (target == 0) & counts, x.to(logits.dtype)


def _shifted(logits: Tensor, axis: Axis, num_local: int) -> Tensor:
    """logits (N, local V) in fp32, minus the highest of a token's over all ranks; -inf in the padding."""
    x = logits.float()
    x[:, num_local:] = float("-inf")
    highest = x.amax(-1, keepdim=True)
    if axis.size > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=axis.group)
    return x.sub_(highest)
