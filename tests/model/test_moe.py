"""Routing, routed experts and the auxiliary losses."""

import math
from collections import Counter

import pytest
import torch
from helpers.selection import first_is_quick
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_dist.model import ExpertsConfig, Mythos
from mythos_dist.model.moe import FFN, MoE


class CountOps(TorchDispatchMode):
    """Counts the ATen operations of a forward or backward pass; on a GPU each is a kernel launch or more."""

    def __init__(self):
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        return func(*args, **kwargs or {})


def one_moe(config, experts: ExpertsConfig, enliven, seed: int = 0) -> MoE:
    moe = enliven(MoE(config, experts), seed)
    moe.router.bias.zero_()
    return moe


def operations(module: nn.Module, x: Tensor) -> Counter[str]:
    with CountOps() as count:
        y = module(x)
        (y if isinstance(y, Tensor) else y[0]).sum().backward()
    return count.ops


def test_the_grouped_backend_launches_as_many_kernels_for_any_number_of_experts(tiny, enliven, build_reference):
    """Forward and backward, 4 and 64 experts: the same operations. The reference runs some per expert."""
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    few, many = (operations(one_moe(tiny(n_experts=n), ExpertsConfig(), enliven), x) for n in (4, 64))
    assert few == many
    few, many = (operations(build_reference(tiny(n_experts=n)).recurrent.block.ffn, x) for n in (4, 64))
    assert many.total() > 5 * few.total()


@pytest.mark.parametrize("backend", first_is_quick(["grouped", "reference"]))
@pytest.mark.parametrize("k", range(1, 9))
def test_experts_without_tokens_get_zero_gradients(k, backend, tiny, build_pair):
    """All tokens go to the same k of ten experts: the others' gradients are zeros, and none is missing.

    The reference leaves None, and a rank whose gradient is missing hangs the reduction of the others.
    """
    config = tiny(n_experts=10, n_experts_per_tok=k, expert_dim=5)
    ours, reference = build_pair(config, experts=ExpertsConfig(backend=backend))
    favored = torch.zeros(10)
    favored[-k:] = 1e4
    ours.recurrent.block.ffn.router.bias.copy_(favored)
    reference.recurrent.block.ffn.router_bias.copy_(favored)

    input_ids = torch.arange(12).view(2, 6)
    losses = ours(input_ids, labels=input_ids)
    losses["objective"].backward()
    assert losses["expert_counts"].tolist() == [[0] * (10 - k) + [12] * k] * 3
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        if ".experts." in name:
            used = parameter.grad.flatten(1).ne(0).any(1)
            assert used.tolist() == [False] * (10 - k) + [True] * k

    reference(input_ids).sum().backward()
    missing = {n for n, p in reference.named_parameters() if p.grad is None}
    assert missing == {
        f"recurrent.block.ffn.routed_experts.{e}.{leaf}.weight"
        for e in range(10 - k)
        for leaf in ("gate", "up", "down")
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("backend", ["grouped", "reference"])
@pytest.mark.parametrize(("dim", "expert_dim"), [(32, 16), (31, 17), (5, 1), (4, 64)])
def test_backends_equal_a_loop_over_experts(dim, expert_dim, backend, dtype, tolerance, tiny, enliven):
    """Output and all gradients against each token's own experts, written out, in float64.

    Tolerances are a few roundings of the dtype (2^-24, 2^-9, 2^-12). Widths that are not multiples of 16 bytes and, in
    half precision, rows that are not multiples of 16 are padded for the grouped GEMM and must not show. Experts 0
    and 6 get no token.
    """
    config = tiny(dim=dim, expert_dim=expert_dim, n_experts=7, n_experts_per_tok=3, n_shared_experts=0)
    moe = one_moe(config, ExpertsConfig(backend=backend), enliven).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, dim, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(20, 3, generator=generator, requires_grad=True)
    index = torch.stack([1 + torch.randperm(5, generator=generator)[:3] for _ in range(20)])
    direction = torch.randn(20, dim, generator=generator).to(dtype)
    y, _ = moe.experts(x, weights, index)
    leaves = [x, weights, moe.experts.w1, moe.experts.w3, moe.experts.w2]
    gradients = torch.autograd.grad(y, leaves, direction)

    x64, w64, gate, up, down = (leaf.detach().double().requires_grad_() for leaf in leaves)
    rows = []
    for n in range(20):
        terms = []
        for j in range(3):
            e = int(index[n, j])
            g = gate[e] @ x64[n]
            terms.append(w64[n, j] * (down[e].T @ (g / (1 + (-g).exp()) * (up[e] @ x64[n]))))
        rows.append(sum(terms))
    expected = torch.stack(rows)
    exact = torch.autograd.grad(expected, [x64, w64, gate, up, down], direction.double())
    for ours, theirs in zip([y, *gradients], [expected, *exact], strict=True):
        assert (ours.detach() - theirs.detach()).norm() <= tolerance * theirs.detach().norm()


@pytest.mark.parametrize("tokens", [1, 2, 18])
@torch.inference_mode()
def test_a_few_tokens_in_inference_mode_equal_a_loop_over_experts(tokens, tiny, enliven, monkeypatch):
    """36 pairs for 6 experts at most: the grouped GEMM is not called."""
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0))
    grouped, reference = (one_moe(tiny(), ExpertsConfig(backend=name), enliven) for name in ("grouped", "reference"))
    expected = reference(x)[0]
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None)
    torch.testing.assert_close(grouped(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_shared_experts_are_the_sum_of_their_parts(tiny):
    """One wide SwiGLU against the sum of its slices: only the order of summation differs."""
    wide = FFN(8, 15)
    for parameter in wide.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 8)
    parts = 0
    for lane in (slice(0, 5), slice(5, 10), slice(10, 15)):
        hidden = nn.functional.silu(x @ wide.gate.weight[lane].T) * (x @ wide.up.weight[lane].T)
        parts = parts + hidden @ wide.down.weight[:, lane].T
    torch.testing.assert_close(wide(x), parts)


def routed(config, experts: ExpertsConfig, enliven) -> tuple[float, list[list[list[float]]], Tensor]:
    """The auxiliary loss of one pass and, in plain Python, the router's logits (B, S, E), with the counts."""
    moe = one_moe(config, experts, enliven)
    x = torch.randn(2, 9, config.dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, stats = moe(x)
        logits = (x.double() @ moe.router.weight.double().T).tolist()
    return stats.loss.item(), logits, stats.counts


def test_z_loss_is_the_mean_squared_logsumexp(tiny, enliven):
    """ST-MoE's formula term by term, in float64."""
    loss, logits, _ = routed(tiny(), ExpertsConfig(z_loss=0.3), enliven)
    terms = [math.log(sum(math.exp(z) for z in token)) ** 2 for row in logits for token in row]
    assert loss == pytest.approx(0.3 * sum(terms) / len(terms), rel=1e-5)


def test_sequence_balance_loss_equals_deepseek_v3s_formula(tiny, enliven):
    """DeepSeek-V3, equations 17 to 20: alpha * sum_i f_i P_i for each sequence, here with softmax scores.

    f_i = E / (k S) * (tokens whose k best scores hold i), P_i = mean of i's scores; the mean over sequences.
    """
    config = tiny()
    loss, logits, _ = routed(config, ExpertsConfig(sequence_balance_loss=0.7), enliven)
    total = 0.0
    for row in logits:
        E, S, k = config.n_experts, len(row), config.n_experts_per_tok
        scores = [[math.exp(z) / sum(math.exp(other) for other in token) for z in token] for token in row]
        for i in range(E):
            holds = sum(1 for token in scores if sorted(token, reverse=True).index(token[i]) < k)
            total += E / (k * S) * holds * sum(token[i] for token in scores) / S
    assert loss == pytest.approx(0.7 * total / len(logits), rel=1e-5)


def test_auxiliary_losses_enter_the_objective_once(tiny):
    """The objective is the cross entropy and the mean over loops of each loop's loss, whatever the loops."""
    config = tiny()
    model = Mythos(config, experts=ExpertsConfig(z_loss=1.0))
    input_ids = torch.arange(8).view(1, 8)
    seen: list[Tensor] = []
    model.recurrent.block.ffn.router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    for n_loops in (1, 4):
        seen.clear()
        losses = model(input_ids, n_loops, labels=input_ids)
        weight = model.recurrent.block.ffn.router.weight.detach()
        per_loop = [(x @ weight.T).logsumexp(-1).square().mean().item() for x in seen]
        assert len(per_loop) == n_loops
        extra = (losses["objective"] - losses["cross_entropy"]).item()
        assert extra == pytest.approx(sum(per_loop) / n_loops, rel=1e-4)  # a difference of two fp32 numbers


def test_the_bias_affects_selection_but_not_weights(tiny, enliven):
    """With a bias that forces experts 4 and 5, their weights are still softmax scores, renormalized to 1."""
    moe = one_moe(tiny(n_experts_per_tok=2), ExpertsConfig(), enliven)
    moe.router.bias[4:] = 1e4
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    weights, index, _ = moe.router(x)
    scores = (x[0] @ moe.router.weight.T).softmax(-1)[:, 4:]
    assert index.sort(-1).values.tolist() == [[4, 5]] * 7
    expected = (scores / scores.sum(-1, keepdim=True)).gather(-1, index - 4)
    torch.testing.assert_close(weights, expected)
