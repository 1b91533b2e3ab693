"""Collectives that autograd differentiates."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from helpers.launch import run_ranks
from torch import Tensor, nn

from mythos_dist.config.schema import ParallelConfig
from mythos_dist.parallel.collectives import (
    all_gather,
    all_gather_many,
    all_reduce,
    all_to_all,
    copy,
    enter_tensor_parallel,
    leave_tensor_parallel,
    reduce_scatter,
)
from mythos_dist.parallel.mesh import SINGLE, Axis, Mesh, build_mesh
from mythos_dist.parallel.tensor import replicated

WORLD = 3
ROWS = [[2, 0, 1], [1, 3, 0], [0, 2, 2]]  # all-to-all: from each rank to each rank
Values = list[Tensor]  # of each rank


def inputs(name: str) -> tuple[Values, Values]:
    """Each rank's x, and the gradient that its y gets, in float64; x is equal where the collective expects that, and
    the gradient is equal where every rank does the same with y. The input is a transposed view."""
    generator = torch.Generator().manual_seed(0)
    width = {"reduce_scatter": 2 * WORLD, "leave sequence": 2 * WORLD}.get(name, 2)
    xs = [torch.randn(5, width, 6, generator=generator, dtype=torch.float64).transpose(0, 2) for _ in range(WORLD)]
    if name == "all_to_all":
        xs = [x.flatten()[: 4 * sum(ROWS[r])].view(-1, 4) for r, x in enumerate(xs)]
    if name in ("copy", "enter"):
        xs = [xs[0].clone() for _ in range(WORLD)]
    shape = reference(name, xs)[0].shape
    ys = [torch.randn(reference(name, xs)[r].shape, generator=generator, dtype=torch.float64) for r in range(WORLD)]
    if name in ("all_reduce", "leave", "all_gather of equal work"):
        ys = [ys[0].view(shape) for _ in range(WORLD)]
    return xs, ys


def reference(name: str, xs: Values) -> Values:
    """Each rank's y, computed by one process."""
    if name in ("copy", "enter"):
        return xs
    if name in ("all_reduce", "leave"):
        return [sum(xs[1:], xs[0])] * WORLD
    if name.startswith("all_gather "):
        return [torch.cat(xs, -1)] * WORLD
    if name in ("all_gather", "enter sequence"):
        return [torch.cat(xs, 1)] * WORLD
    if name in ("reduce_scatter", "leave sequence"):
        return list(sum(xs[1:], xs[0]).chunk(WORLD, 1))
    parts = [x.split(rows) for x, rows in zip(xs, ROWS, strict=True)]
    return [torch.cat([part[r] for part in parts]) for r in range(WORLD)]


def ours(name: str, x: Tensor, axis: Axis) -> Tensor:
    """This rank's y."""
    mesh, rank = Mesh(tensor=axis, sequence="sequence" in name), axis.rank
    calls: dict[str, Callable[[], Tensor]] = {
        "copy": lambda: copy(x, axis),
        "all_reduce": lambda: all_reduce(x, axis),
        "all_gather": lambda: all_gather(x, axis, 1),
        "all_gather of the last dim": lambda: all_gather(x, axis, -1, partial=True),
        "all_gather of equal work": lambda: all_gather(x, axis, -1, partial=False),
        "reduce_scatter": lambda: reduce_scatter(x, axis, 1),
        "all_to_all": lambda: all_to_all(x, axis, ROWS[rank], [rows[rank] for rows in ROWS]),
    }
    enter = name.startswith("enter")
    return calls.get(name, lambda: enter_tensor_parallel(x, mesh) if enter else leave_tensor_parallel(x, mesh))()


NAMES = ["copy", "all_reduce", "all_gather", "all_gather of the last dim", "all_gather of equal work"]
NAMES += ["reduce_scatter", "all_to_all", "enter", "enter sequence", "leave", "leave sequence"]


def forward_and_backward() -> list[tuple[Tensor, Tensor, bool]]:
    """Of each collective: this rank's y, its x's gradient, and whether x is unchanged."""
    axis = build_mesh(ParallelConfig(tensor=WORLD)).tensor
    found = []
    for name in NAMES:
        xs, grads = inputs(name)
        x = xs[axis.rank].requires_grad_()
        before = x.detach().clone()
        y = ours(name, x, axis)
        (gradient,) = torch.autograd.grad(y, x, grads[axis.rank])
        found.append((y.detach(), gradient, torch.equal(x, before)))
    return found


@pytest.mark.launch
def test_collectives_have_the_values_and_gradients_of_one_process():
    """Three ranks against PyTorch's cat, chunk and sum on one process, float64.

    The gradient of the sum over ranks of <y, its gradient>; where every rank does the same work with y, of one rank's.
    """
    ranks = run_ranks(WORLD, forward_and_backward)
    for name, found in zip(NAMES, zip(*ranks, strict=True), strict=True):
        xs, grads = inputs(name)
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        if name in ("copy", "enter"):  # one tensor that every rank uses
            leaves = leaves[:1] * WORLD
        ys = reference(name, leaves)
        same_work = name in ("all_reduce", "leave", "all_gather of equal work")
        pairs = list(zip(ys, grads, strict=True))[: 1 if same_work else WORLD]
        expected = torch.autograd.grad(sum((y * g).sum() for y, g in pairs), leaves)  # type: ignore[arg-type]
        for r, (y, gradient, unchanged) in enumerate(found):
            torch.testing.assert_close(y, ys[r].detach(), msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(gradient, expected[r], msg=lambda text, name=name: f"{name}: {text}")
            assert unchanged, name


def gather_three() -> list[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Three tensors by one message and one by one: results, and gradients of both."""
    axis = build_mesh(ParallelConfig(tensor=WORLD)).tensor
    generator = torch.Generator().manual_seed(axis.rank)
    found = []
    for dim, partial in ((0, True), (-1, True), (1, False)):
        tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((2, 3), (4, 1), (1, 5, 2))]
        shapes = [all_gather(x, axis, dim).shape for x in tensors]
        directions = [torch.randint(-99, 99, shape, generator=generator).float() for shape in shapes]  # exact sums
        gathered = all_gather_many(tensors, axis, dim, partial=partial)
        expected = [all_gather(x, axis, dim, partial=partial) for x in tensors]
        for each in (gathered, expected):
            found.append([x.detach() for x in each])
            found.append(list(torch.autograd.grad(each, tensors, directions)))
    return found


@pytest.mark.launch
def test_several_tensors_are_gathered_in_one_message():
    """Along the first, the last and the second dim, against one message each; bit for bit."""
    for found in run_ranks(WORLD, gather_three):
        for many, one in zip(found[::4] + found[1::4], found[2::4] + found[3::4], strict=True):
            assert all(map(torch.equal, many, one))


def test_over_one_rank_collectives_are_the_identity():
    x, axis = torch.randn(2, 3), Axis("tensor")
    results = [copy(x, axis), all_reduce(x, axis), all_gather(x, axis, 0), reduce_scatter(x, axis, 0)]
    results += [all_to_all(x, axis, [2], [2]), *all_gather_many([x, x], axis, 0)]
    results += [enter_tensor_parallel(x, SINGLE), leave_tensor_parallel(x, SINGLE)]
    assert all(result is x for result in results)


def gradients_of_replicas() -> list[tuple[str, float]]:
    """Rank r's gradient is r + 1, twice in a backward pass; what the parameter gets."""
    found = []
    for sequence in (False, True):
        for in_parallel_region in (False, True):
            mesh = build_mesh(ParallelConfig(tensor=WORLD, sequence=sequence))
            layer = replicated(nn.Linear(1, 1, bias=False), mesh, in_parallel_region=in_parallel_region)
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            ((dist.get_rank() + 1) * (weight.sum() + weight.mean())).backward()
            assert weight.grad is not None
            found.append((weight.gradient_sum, weight.grad.item()))  # type: ignore[attr-defined]
    return found


@pytest.mark.launch
def test_partial_gradients_of_replicated_weights_are_summed():
    """1 + 2 + 3, times the two uses, with sequence parallelism or between entering and leaving tensor parallelism."""
    for rank, found in enumerate(run_ranks(WORLD, gradients_of_replicas)):
        own = 2.0 * (rank + 1)
        assert found == [("sequence", own), ("always", 12.0), ("sequence", 12.0), ("always", 12.0)]
