"""Dispatching tokens to experts on other ranks and combining the results."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from helpers.launch import run_ranks
from torch import Tensor

from mythos_dist.config.schema import MythosConfig, ParallelConfig
from mythos_dist.model.experts import Experts
from mythos_dist.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from mythos_dist.parallel.expert import combine, dispatch
from mythos_dist.parallel.mesh import build_mesh
from mythos_dist.parallel.tensor import shard_of

pytestmark = pytest.mark.launch

E, D, F = 8, 16, 10  # experts, model, hidden width: 10 is not a multiple of 16 bytes


@dataclass(frozen=True)
class Case:
    """One routing, equal on the ranks of a tensor group; each replica draws its own tokens."""

    k: int
    tokens: int
    to: tuple[int, ...] = tuple(range(E))  # experts that tokens may go to
    uneven: bool = False  # replica r has r tokens more
    backend: str = "grouped"
    dtype: torch.dtype = torch.float32
    selective: bool = False


CASES = [
    *(Case(k, 13) for k in (1, 2, 3, 4)),
    Case(8, 5),  # every token to every expert
    Case(1, 9, to=(5,)),  # one rank gets all there is
    Case(2, 9, to=(0, 1)),  # on 4 ranks both are the first one's
    Case(2, 9, to=(0, 7)),  # on 4 ranks two get nothing
    Case(3, 6, to=(1, 2, 3)),
    *(Case(k, 1) for k in (1, 2, 4)),
    Case(2, 4, uneven=True),
    Case(2, 13, selective=True),
    Case(1, 9, to=(5,), selective=True),
]
CASES += [replace(case, backend="reference") for case in CASES if not case.selective]
HALF = [replace(case, dtype=torch.bfloat16) for case in CASES[:9]]


STACKS = {"w1": D, "w3": D, "w2": F}  # gate, up and down; the length of their dot products


def stacks() -> dict[str, Tensor]:
    """Weights of all experts (E, F, D), as large as keeps what goes through them at its size."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(E, F, D, generator=generator) / width**0.5 for name, width in STACKS.items()}


def inputs_of(case: Case, replica: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, D), weights and index (N, k), and the gradient that comes back, (N, D)."""
    generator = torch.Generator().manual_seed(1000 * replica + case.k)
    N = case.tokens + case.uneven * replica
    x, direction = (torch.randn(N, D, generator=generator) for _ in range(2))
    weights = torch.rand(N, case.k, generator=generator)
    to = torch.tensor(case.to)
    index = torch.stack([to[torch.randperm(len(to), generator=generator)[: case.k]] for _ in range(N)])
    return x.to(case.dtype), weights, index, direction.to(case.dtype)


class Messages:
    """Replaces `all_to_all_single` and records the shapes of what this process sends and receives."""

    def __init__(self):
        self.sent: list[tuple[int, ...]] = []
        self.got: list[tuple[int, ...]] = []
        self._real = dist.all_to_all_single

    def __enter__(self) -> "Messages":
        dist.all_to_all_single = self
        return self

    def __exit__(self, *_) -> None:
        dist.all_to_all_single = self._real

    def __call__(self, output: Tensor, input: Tensor, *arguments, **keywords):
        self.sent.append(tuple(input.shape))
        self.got.append(tuple(output.shape))
        return self._real(output, input, *arguments, **keywords)


def forward_and_backward(parallel: ParallelConfig, cases: list[Case]) -> list[dict]:
    """What each case gives on this rank: outputs, all gradients, and the shapes of the messages."""
    mesh = build_mesh(parallel)
    results = []
    for case in cases:
        config = MythosConfig(dim=D, n_experts=E, n_experts_per_tok=case.k, expert_dim=F)
        experts = Experts(config, case.backend, mesh, case.selective).to(case.dtype)
        x, weights, index, direction = inputs_of(case, mesh.data.rank)
        with torch.no_grad():
            for name, parameter in experts.named_parameters():
                part = shard_of(parameter)
                parameter.zero_()
                parameter[tuple(slice(size) for size in part.shape)] = stacks()[name][
                    tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
                ].to(case.dtype)
        x.requires_grad_()
        weights.requires_grad_()
        with Messages() as messages:
            sums = experts(enter_tensor_parallel(x, mesh), enter_tensor_parallel(weights, mesh), index)
            y = leave_tensor_parallel(combine(*sums, mesh), mesh)
            forward = len(messages.sent)
            y.backward(direction)
        gradients = {}
        for name, parameter in experts.named_parameters():
            part = shard_of(parameter)
            assert parameter.grad is not None, f"{name} has no gradient on rank {dist.get_rank()} with {case}"
            real = tuple(slice(size) for size in part.shape)
            padding = parameter.grad.clone()
            padding[real] = 0.0
            assert not padding.any()
            gradients[name] = parameter.grad[real].clone()
        results.append(
            {
                "y": y.detach(),
                "x": x.grad,
                "weights": weights.grad,
                **gradients,
                "sent": messages.sent,
                "got": messages.got,
                "forward": forward,
                "replica": mesh.data.rank,
                "stage": mesh.pipe.rank,
                "tensor": mesh.tensor.rank,
            }
        )
    return results


def layout_after_layout(layouts: list[ParallelConfig], cases: list[Case]) -> list[list[dict]]:
    return [forward_and_backward(parallel, cases) for parallel in layouts]


def expected_of(case: Case, replicas: int) -> dict[str, list[Tensor]]:
    """One process, float64, no routing at all: every expert works on every token, and the weight is 0 if not chosen.

    Outputs and gradients of the inputs per replica; the experts' gradients are sums over all replicas.
    """
    leaves = {name: stack.to(case.dtype).double().requires_grad_() for name, stack in stacks().items()}
    gate, up, down = (leaves[name] for name in STACKS)
    results: dict[str, list[Tensor]] = {"y": [], "x": [], "weights": []}
    for replica in range(replicas):
        x, weights, index, direction = inputs_of(case, replica)
        x, weights = (leaf.double().requires_grad_() for leaf in (x, weights))
        y = torch.zeros_like(x)
        for e in range(E):
            weight = (weights * (index == e)).sum(1, keepdim=True)
            g = x @ gate[e].T
            y = y + weight * ((g / (1 + (-g).exp()) * (x @ up[e].T)) @ down[e])
        y.backward(direction.double())
        assert x.grad is not None
        assert weights.grad is not None
        for name, value in {"y": y.detach(), "x": x.grad, "weights": weights.grad}.items():
            results[name].append(value)
    for name, stack in leaves.items():
        assert stack.grad is not None
        results[name] = [stack.grad]
    return results


def close(ours: Tensor, exact: Tensor, tolerance: float) -> bool:
    """Relative to the norm, or to 1 where less is left: a weight's gradient is a sum of terms of that size."""
    return bool((ours.double() - exact).norm() <= tolerance * exact.norm().clamp(min=1.0))


LAYOUTS = {
    2: [ParallelConfig(expert=2)],
    4: [
        ParallelConfig(expert=4),
        ParallelConfig(expert=2),  # two copies of all experts
        ParallelConfig(expert=2, tensor=2),
        ParallelConfig(expert=2, pipe=2),
    ],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_experts_on_several_ranks_equal_those_on_one_process(world):
    """Outputs and all gradients, for every routing above, against float64 without routing.

    In fp32 to 1e-6, a few roundings; in bf16, where router weights are rounded on their way as well, to a few
    roundings of 2^-9. An expert without tokens has a gradient of zeros. `check_messages` sees which rows travel.
    """
    ranks = run_ranks(world, layout_after_layout, LAYOUTS[world], CASES + HALF)
    for parallel, of_layout in zip(LAYOUTS[world], zip(*ranks, strict=True), strict=True):
        for case, results in zip(CASES + HALF, zip(*of_layout, strict=True), strict=True):
            check(case, parallel, list(results), world // (parallel.tensor * parallel.pipe))


def check(case: Case, parallel: ParallelConfig, results: list[dict], replicas: int) -> None:
    """What all ranks found, in one case of one layout."""
    tolerance = 1e-6 if case.dtype == torch.float32 else 1e-2
    expected = expected_of(case, replicas)
    for rank in results:
        for name in ("y", "x", "weights"):
            exact = expected[name][rank["replica"]]
            assert rank[name].dtype == (torch.float32 if name == "weights" else case.dtype)
            assert close(rank[name], exact, tolerance), (parallel, case, name)
        check_messages(case, parallel, rank)
    for name in STACKS:
        for stage in range(parallel.pipe):
            full = torch.zeros(E, F, D, dtype=torch.float64)
            for rank in results:
                if rank["stage"] == stage:  # holders of the same experts add up, as they do in DeepSpeed's optimizer
                    full[shard_in_stack(rank, parallel)] += rank[name].double()
            assert close(full, expected[name][0], tolerance), (parallel, case, name)
            unused = [e for e in range(E) if not expected[name][0][e].any()]
            assert not full[unused].any(), (parallel, case, name)


def shard_in_stack(rank: dict, parallel: ParallelConfig) -> tuple[slice, slice]:
    """A rank's experts and its range of their hidden width, by hand."""
    experts = E // parallel.expert
    first = rank["replica"] % parallel.expert * experts
    width = -(-F // parallel.tensor)
    return slice(first, first + experts), slice(rank["tensor"] * width, (rank["tensor"] + 1) * width)


def check_messages(case: Case, parallel: ParallelConfig, rank: dict) -> None:
    """A token goes to each rank that holds one of its experts once, whatever their number, and comes back once.

    First the counts, then the rows, with a weight and an expert's number for each expert that they can have there;
    then the results; in the backward pass the gradients of both. Selective recomputation sends nothing again.
    """
    local = E // parallel.expert
    _, _, index, _ = inputs_of(case, rank["replica"])
    rows = sum(len({e // local for e in experts}) for experts in index.tolist())
    block = rank["replica"] // parallel.expert * parallel.expert  # the replicas that share a copy with this one
    mine = rank["replica"] % parallel.expert
    arriving = 0
    for replica in range(block, block + parallel.expert):
        _, _, index, _ = inputs_of(case, replica)
        arriving += sum(any(e // local == mine for e in experts) for experts in index.tolist())
    channels = D // parallel.tensor
    message = channels + 2 * min(case.k, local)
    counts = (parallel.expert, 2)
    assert rank["forward"] == 3
    assert rank["sent"] == [counts, (rows, message), (arriving, channels), (rows, channels), (arriving, message)]
    assert rank["got"] == [counts, (arriving, message), (rows, channels), (arriving, channels), (rows, message)]


def dispatched_rows(case: Case) -> dict:
    """The dispatched rows of one case on 2 ranks, on this rank."""
    mesh = build_mesh(ParallelConfig(expert=2))
    x, weights, index, _ = inputs_of(case, mesh.data.rank)
    with Messages() as messages:
        received = dispatch(x, weights, index, E, mesh)
    rows = [messages.sent[1][0], messages.got[1][0]]
    return {
        "rows": received.rows,
        "weights": received.weights,
        "experts": received.experts,
        "pairs": received.pairs,
        "moved": rows,
    }


def test_a_token_with_two_experts_on_a_rank_is_sent_there_once():
    """Both replicas send all of their 6 tokens to experts 4 and 6, which the second of two ranks holds.

    6 rows leave each rank, not 12; none arrives at the first and 12 at the second, by replica and by token. Each comes
    with both experts, numbered from the rank's first, and their weights.
    """
    case = Case(2, 6, to=(4, 6))
    first, second = run_ranks(2, dispatched_rows, case)
    assert (first["moved"], first["pairs"]) == ([6, 0], 0)
    assert (second["moved"], second["pairs"]) == ([6, 12], 24)
    x, weights, index, _ = (torch.cat(parts) for parts in zip(inputs_of(case, 0), inputs_of(case, 1), strict=True))
    assert torch.equal(second["rows"], x)
    got = torch.zeros(12, 4).scatter(1, second["experts"], second["weights"])
    assert torch.equal(got, torch.zeros(12, 4).scatter(1, index - 4, weights))


def test_an_unused_slot_has_weight_zero():
    """Tokens go to experts 0 and 7: each row arrives with one expert and an unused slot of weight 0."""
    case = Case(2, 6, to=(0, 7))
    _, weights, index, _ = (torch.cat(parts) for parts in zip(inputs_of(case, 0), inputs_of(case, 1), strict=True))
    for expert, received in zip((0, 7), run_ranks(2, dispatched_rows, case), strict=True):
        assert (received["moved"], received["pairs"]) == ([12, 12], 12)
        assert received["experts"].tolist() == [[expert % 4, 4]] * 12
        assert torch.equal(received["weights"][:, 0], weights[index == expert])
        assert not received["weights"][:, 1].any()
