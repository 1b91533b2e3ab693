"""Sharded parameters, and the vocabulary-parallel loss."""

import pytest
import torch
import torch.nn.functional as F
from helpers.launch import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos_dist.config.schema import ParallelConfig
from mythos_dist.parallel.mesh import SINGLE, Axis, build_mesh
from mythos_dist.parallel.tensor import IGNORED, Embedding, shard_of, shard_parameter, shard_range

# ---- Shards


def axes(name: str, size: int) -> list[Axis]:
    """An axis as each of its ranks sees it."""
    return [Axis(name, size, rank) for rank in range(size)]


@given(st.integers(1, 200), st.integers(1, 70))
def test_shard_ranges_tile_the_dimension(size, n_ranks):
    """Concatenated, the ranges are 0 .. size - 1; all ranks allocate the same minimal length."""
    parts = [shard_range(size, axis) for axis in axes("tensor", n_ranks)]
    assert [i for start, stop, _ in parts for i in range(start, stop)] == list(range(size))
    (local,) = {local for _, _, local in parts}
    assert local * n_ranks >= size > (local - 1) * n_ranks
    assert all(0 <= stop - start <= local for start, stop, _ in parts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 5), st.data())
def test_shards_of_a_parameter_tile_the_full_tensor(full_shape, n_expert, n_tensor, data):
    """Counted per element, every element belongs to exactly one rank of the axes that shard it.

    All ranks hold equal shapes, of which the shard gives the part without padding; an unsharded tensor is complete.
    """
    dims = data.draw(st.permutations(range(len(full_shape))))
    names = data.draw(st.sampled_from([[], ["tensor"], ["expert"], ["expert", "tensor"]]))[: len(full_shape)]
    size = {"expert": n_expert, "tensor": n_tensor}
    counters = torch.zeros(full_shape, dtype=torch.int64)
    shapes = set()
    ranks = [
        (e, t) for e in range(n_expert if "expert" in names else 1) for t in range(n_tensor if "tensor" in names else 1)
    ]
    for e, t in ranks:
        rank = {"expert": e, "tensor": t}
        axes_of_dims = {dim: Axis(name, size[name], rank[name]) for dim, name in zip(dims, names, strict=False)}
        parameter = shard_parameter(tuple(full_shape), axes_of_dims)
        part = shard_of(parameter)
        assert part.full_shape == tuple(full_shape)
        counters[tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))] += 1
        assert part.shape == tuple(b - a for a, b in zip(part.start, part.stop, strict=True))
        assert all(real <= held for real, held in zip(part.shape, parameter.shape, strict=True))
        shapes.add(tuple(parameter.shape))
    assert bool((counters == 1).all())
    assert len(shapes) == 1
    if not names:
        assert shapes == {tuple(full_shape)}


def test_an_unsharded_parameter_is_its_own_shard():
    part = shard_of(nn.Parameter(torch.empty(3, 5)))
    assert (part.full_shape, part.start, part.stop, part.shape) == ((3, 5), (0, 0), (3, 5), (3, 5))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("expert", [1, 4])
def test_deepspeed_reads_the_attributes_of_shards(tensor, expert):
    """Against DeepSpeed's predicates, and the group name of its own MoE layer."""
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.runtime.utils import is_model_parallel_parameter

    by_tensor, by_expert = Axis("tensor", tensor, 0), Axis("expert", expert, 0)
    plain = shard_parameter((8, 8), {})
    column = shard_parameter((8, 8), {0: by_tensor})
    stack = shard_parameter((8, 8, 8), {0: by_expert, 1: by_tensor})
    assert not is_model_parallel_parameter(plain)
    assert is_model_parallel_parameter(column) == is_model_parallel_parameter(stack) == (tensor > 1)
    assert not is_moe_param(plain)
    assert not is_moe_param(column)
    assert is_moe_param(stack) == (expert > 1)
    if expert > 1:
        layer = MoE(8, nn.Linear(8, 8, bias=False), num_experts=8, ep_size=expert)
        (theirs,) = {p.group_name for m in layer.modules() if isinstance(m, Experts) for p in m.parameters()}
        assert stack.group_name == theirs


# ---- The loss on one rank


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def losses_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Our loss and its gradient by logits (B, S, V) on one rank; the table is the identity matrix."""
    V = logits.shape[-1]
    embed = Embedding(V, V, SINGLE).to(logits.dtype)
    nn.init.eye_(embed.weight)
    logits = logits.clone().requires_grad_()
    loss = embed.loss(logits, labels).total
    (0.3 * loss).backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    return loss.detach(), logits.grad


@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1.0, 30.0, 1e4]),
    st.integers(0, 2**31),
)
def test_cross_entropy_equals_pytorchs(B, S, V, dtype, spread, seed):
    """Against F.cross_entropy in float64 of the same logits, a third of the labels ignored.

    Tolerance of the loss: a few fp32 roundings, of each position's highest logit and of the sum. An element of the
    gradient is a probability, or that minus one: fp32 rounds its exponent (a logit of 1e4 has an error of 1e-3), and
    the result is rounded once to the dtype of the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(B, S, V, generator=generator)).to(dtype)
    labels = torch.randint(V, (B, S), generator=generator)
    labels[torch.rand(B, S, generator=generator) < 1 / 3] = IGNORED
    loss, gradient = losses_of(logits, labels)

    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="sum")
    (0.3 * expected).backward()
    highest = logits.double().abs().max().item()
    eps = 2**-23
    assert abs(loss.item() - expected.item()) <= 4 * eps * B * S * (highest + 10)
    assert gradient.dtype == dtype
    assert exact.grad is not None
    tiny = torch.finfo(dtype).tiny  # what is smaller may be flushed
    allowed = 0.3 * (torch.finfo(dtype).eps * exact.grad.abs() / 0.3 + 4 * eps) + tiny
    assert bool(((gradient.double() - exact.grad).abs() <= allowed).all())


def test_large_logits_do_not_overflow():
    """Logits of 1e4 and -1e4: the loss is 0 or their difference, and gradients are 0, 1 and -1 (times 0.3)."""
    logits = torch.full((1, 2, 6), -1e4)
    logits[..., 2] = 1e4
    loss, gradient = losses_of(logits, torch.tensor([[2, 5]]))
    assert loss.item() == 2e4
    expected = torch.zeros(1, 2, 6)
    expected[0, 1, 2], expected[0, 1, 5] = 0.3, -0.3
    torch.testing.assert_close(gradient, expected)


def test_ignored_labels_have_no_loss_and_no_gradient():
    """With all labels ignored the loss and all gradients are zero."""
    loss, gradient = losses_of(torch.randn(2, 3, 9), torch.full((2, 3), IGNORED))
    assert loss.item() == 0.0
    assert not gradient.any()


def test_many_tokens_are_processed_in_chunks():
    """1,000 tokens of 3 channels, a vocabulary of 700: PyTorch's loss and gradients up to the order of fp32 sums, and
    no tensor is half as large as all logits."""
    generator = torch.Generator().manual_seed(0)
    embed = Embedding(700, 3, SINGLE)
    nn.init.normal_(embed.weight, generator=generator)
    states = torch.randn(2, 500, 3, generator=generator, requires_grad=True)
    labels = torch.randint(700, (2, 500), generator=generator)
    labels[0, 490:] = IGNORED
    with Shapes() as shapes:
        loss = embed.loss(states, labels).total
        gradients = torch.autograd.grad(loss, [states, embed.weight])
    assert max(torch.Size(shape).numel() for shape in shapes.seen) < 500 * 700
    logits = (states @ embed.weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [states, embed.weight]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert embed.loss(states, labels).total == loss


def divergence(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """PyTorch's KL(last readout || each), weighted and summed over labels that count; logits (R, S, V)."""
    log_p = logits.log_softmax(-1)
    divergences = F.kl_div(log_p, log_p[-1:].detach().expand_as(log_p), reduction="none", log_target=True).sum(-1)
    return (divergences * weights * (labels != IGNORED)).sum()


@given(st.integers(1, 4), st.integers(1, 400), st.integers(1, 40), st.sampled_from([0.0, 0.5, 3.0]), st.integers(0, 99))
def test_the_last_readout_teaches_the_others(R, S, V, teacher, seed):
    """R readouts, chunks that the tokens of a readout do not divide: loss, and gradients of states, table and weights,
    are PyTorch's; the teacher's part has no gradient for the last readout."""
    generator = torch.Generator().manual_seed(seed)
    embed = Embedding(V, 3, SINGLE)
    nn.init.normal_(embed.weight, generator=generator)
    states = torch.randn(R, S, 3, generator=generator, requires_grad=True)
    labels = torch.randint(V, (R, S), generator=generator)
    labels[torch.rand(R, S, generator=generator) < 0.2] = IGNORED
    weights = torch.rand(R, S, generator=generator, requires_grad=True)
    ours = embed.loss(states, labels, weights, readouts=R, teacher=teacher).total
    logits = states @ embed.weight.T
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(R, S)
    expected = (losses * weights).sum() + teacher * divergence(logits, labels, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    inputs = [states, embed.weight, weights]
    for got, want in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- The vocabulary sharded over several ranks


D = 12
CASES = [  # vocabulary, B, S, dtype, how large logits are, teacher (each sequence is a readout), sequence parallelism
    (515, 2, 8, torch.float32, 1.0, 0.0, False),
    (515, 2, 8, torch.float32, 1.0, 0.0, True),
    (515, 1, 4, torch.float32, 1e4, 0.0, True),
    (515, 2, 8, torch.bfloat16, 1.0, 0.0, True),
    (512, 2, 4, torch.float32, 1.0, 0.0, False),
    (5, 2, 4, torch.float32, 1.0, 0.0, False),  # 2 tokens a rank: on 4 ranks the last one has none
    (5, 1, 8, torch.float32, 1.0, 0.0, True),
    (1, 1, 4, torch.float32, 1.0, 0.0, False),
    (515, 3, 8, torch.float32, 1.0, 0.7, True),
    (515, 2, 8, torch.bfloat16, 1.0, 0.7, False),
    (5, 3, 4, torch.float32, 1.0, 0.7, False),
]


def inputs_of(case: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same on every rank: ids, labels (B, S), a table (V, D), a factor and an offset (B, S, D)."""
    V, B, S, dtype, spread, *_ = case
    generator = torch.Generator().manual_seed(V + S)
    ids = torch.randint(V, (B, S), generator=generator)
    ids[0, 0] = V - 1  # the last rank's last token
    labels = torch.randint(V, (B, S), generator=generator)
    labels[0, 1], labels[-1, -1] = IGNORED, V - 1
    table = torch.randn(V, D, generator=generator) / D**0.5
    factor, offset = (torch.randn(B, S, D, generator=generator) for _ in range(2))
    return ids, labels, table.to(dtype), (spread * factor).to(dtype), (spread * offset).to(dtype)


def both_ends(cases: list[tuple]) -> list[dict[str, Tensor]]:
    """This rank's loss and gradients of `table -> states * factor + offset -> table -> loss`."""
    import torch.distributed as dist

    world = dist.get_world_size()
    results = []
    for case in cases:
        V, B, S, dtype, _, teacher, sequence = case
        ids, labels, table, factor, offset = inputs_of(case)
        mesh = build_mesh(ParallelConfig(tensor=world, sequence=sequence))
        embed = Embedding(V, D, mesh).to(dtype)
        part = shard_of(embed.weight)
        assert tuple(embed.weight.shape) == (-(-V // world), D)
        with torch.no_grad():
            embed.weight.zero_()
            embed.weight[: part.shape[0]] = table[part.start[0] : part.stop[0]]
        if sequence:  # this rank's tokens of each sequence
            factor, offset = (x.chunk(world, dim=1)[mesh.tensor.rank] for x in (factor, offset))
        offset = offset.clone().requires_grad_()
        with Shapes() as shapes:
            states = embed.lookup(ids) * factor + offset
            loss = embed.loss(states, labels, readouts=B, teacher=teacher).total
            (0.3 * loss).backward()
        logits = embed.logits(states.detach())
        if V > B * S * D:  # otherwise a dimension of the states could be as large as the vocabulary
            full = [shape for shape in shapes.seen if max(shape, default=0) >= V]
            assert not full, f"a rank allocated {full}"
            if B * S > D:  # otherwise its shard of the table is larger than all logits
                assert max(torch.Size(shape).numel() for shape in shapes.seen) < B * S * V
            # The check itself: full logits would have been recorded.
            with Shapes() as shapes:
                assert embed.gather_logits(logits).shape == (B, S, V)
            assert any(shape[-1] >= V for shape in shapes.seen)
        assert embed.weight.grad is not None
        assert offset.grad is not None
        real, padding = embed.weight.grad.split([part.shape[0], embed.weight.shape[0] - part.shape[0]])
        assert not padding.any()
        results.append(
            {
                "loss": loss.detach(),
                "logits": embed.gather_logits(logits).detach(),
                "states": offset.grad,
                "table": real.clone(),
            }
        )
    return results


def expected_of(case: tuple) -> dict[str, Tensor]:
    """PyTorch's own embedding, product and loss on one process, in float64."""
    ids, labels, table, factor, offset = (x.double() if x.is_floating_point() else x for x in inputs_of(case))
    table.requires_grad_()
    offset.requires_grad_()
    logits = (F.embedding(ids, table) * factor + offset) @ table.T
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = loss + case[5] * divergence(logits, labels, torch.ones_like(labels))
    (0.3 * loss).backward()
    assert table.grad is not None
    assert offset.grad is not None
    return {"loss": loss.detach(), "logits": logits.detach(), "states": offset.grad, "table": table.grad}


@pytest.mark.launch
@pytest.mark.parametrize("world", [2, 4])
def test_a_sharded_vocabulary_gives_the_loss_and_gradients_of_one_process(world):
    """The table at both ends of a model, sharded over 2 and 4 ranks, against float64 on one process.

    On each rank: the loss, the gathered logits, the gradient of the states in between, and the rank's rows of the
    table's gradient. Tolerance: a few roundings of the dtype, of states, logits and sums over tokens. No rank
    allocates a tensor as wide as the vocabulary before logits are gathered.
    """
    ranks = run_ranks(world, both_ends, CASES)
    for case, results in zip(CASES, zip(*ranks, strict=True), strict=True):
        expected = expected_of(case)
        got = {
            "table": torch.cat([rank["table"] for rank in results]),
            "states": torch.cat([rank["states"] for rank in results], dim=1) if case[-1] else results[0]["states"],
        }
        # A position with logits of 1e4 has its probabilities from differences that fp32 knows to 1e-3.
        tolerance = 2e-2 if case[3] == torch.bfloat16 else 1e-6 if case[4] == 1.0 else 1e-3
        for rank in results:
            alone = {"loss": rank["loss"], "logits": rank["logits"]}
            if not case[-1]:
                alone["states"] = rank["states"]  # without sequence parallelism every rank holds all of them
            for name, value in (got | alone).items():
                difference = (value.double() - expected[name]).norm()
                assert difference <= tolerance * expected[name].norm() + 1e-12, (case, name)
            assert torch.equal(rank["loss"], results[0]["loss"])
