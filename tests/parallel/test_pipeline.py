"""Layers cut into stages, and what travels between them."""

import time
from itertools import accumulate, combinations_with_replacement, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import MythosConfig
from mythos_dist.model.flops import stage_costs
from mythos_dist.parallel.packing import pack, unpack
from mythos_dist.parallel.pipeline import LayerCosts, StageSpec, plan_loops, plan_stages, split_evenly

CONFIGS = Path(__file__).parents[2] / "configs"

# ---- Cutting

whole_costs = st.integers(1, 9)  # whole numbers: their sums are exact in whatever order


def quality(costs: list[int], loads: list[int], stretches: list[range]) -> tuple[float, float]:
    """What is to be small: the dearest stretch, then the sum of squares."""
    sums = [load + sum(costs[i] for i in stretch) for load, stretch in zip(loads, stretches, strict=True)]
    return max(sums), sum(s * s for s in sums)


def every_cut(n: int, stretches: int) -> list[list[range]]:
    """All ways to cut n layers into neighbouring stretches, empty ones included."""
    cuts = combinations_with_replacement(range(n + 1), stretches - 1)
    return [[range(a, b) for a, b in pairwise((0, *cut, n))] for cut in cuts]


@given(
    st.lists(whole_costs, max_size=7),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=4),
)
# 12 + 17 + 17 is the cheapest beginning, 18 + 13 + 15 has fewer squares, and the last stretch costs 18 after either.
@example([3, 9, 6, 2, 6, 4, 3], [(0, 0), (11, 0), (9, 0), (11, 0)])
def test_a_split_is_as_even_as_any(costs, stages):
    """Against all cuts, one by one: none has a cheaper dearest stretch, nor equally dear ones that differ less."""
    loads, least = [load for load, _ in stages], [few for _, few in stages]
    allowed = [
        cut
        for cut in every_cut(len(costs), len(stages))
        if all(len(stretch) >= few for stretch, few in zip(cut, least, strict=True))
    ]
    if not allowed:
        with pytest.raises(ValueError, match="cannot be divided"):
            split_evenly(costs, loads, least)
        return
    found = split_evenly(costs, loads, least)
    assert found in allowed
    assert quality(costs, loads, found) == min(quality(costs, loads, cut) for cut in allowed)


def test_a_split_that_can_be_seen():
    """Ten equal layers on four stages, the last of which has a head worth three: 3 + 3 + 3 + (1 + head)."""
    assert split_evenly([1.0] * 10, [0, 0, 0, 3.0], [0] * 4) == [range(3), range(3, 6), range(6, 9), range(9, 10)]


# ---- Stages

costs_strategy = st.builds(LayerCosts, block=whole_costs, loop=whole_costs, no_grad_loop=whole_costs, head=whole_costs)


def layers_of(parts: list[StageSpec], turns: list[range]) -> list[tuple[str, int]]:
    """The layers that stages run for one batch, in the order in which they run."""
    names = []
    for part, loops in zip(parts, turns, strict=True):
        names += (
            [("prelude", i) for i in part.prelude] + [("loop", t) for t in loops] + [("coda", i) for i in part.coda]
        )
    return names


def line(prelude: int, n_loops: int, coda: int) -> list[tuple[str, int]]:
    sizes = [("prelude", prelude), ("loop", n_loops), ("coda", coda)]
    return [(kind, i) for kind, size in sizes for i in range(size)]


@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 4), st.integers(1, 8), costs_strategy)
def test_every_layer_is_run_by_one_stage_in_order(prelude, n_loops, coda, stages, costs):
    """Stage after stage they run the whole line. Tokens enter at the first stage and the loss is on the last.

    Of the stages with loops one starts them and one ends them; only the first and the last stage may have no layer.
    """
    assume(stages <= n_loops + 2)
    config = MythosConfig(prelude_layers=prelude, coda_layers=coda)
    parts = plan_stages(config, n_loops, stages, costs)
    turns = plan_loops(tuple(parts), n_loops, 0, costs)
    assert len(parts) == stages
    assert layers_of(parts, turns) == line(prelude, n_loops, coda)
    assert [part.first for part in parts] == [True] + [False] * (stages - 1)
    assert [part.last for part in parts] == [False] * (stages - 1) + [True]

    holders = [i for i, part in enumerate(parts) if part.has_loops]
    assert holders == list(range(holders[0], holders[-1] + 1))
    assert [i for i in holders if parts[i].starts_loops] == holders[:1]
    assert [i for i in holders if parts[i].ends_loops] == holders[-1:]
    for i, part in enumerate(parts):
        assert part.after_loops == (i > holders[-1])
        assert part.has_loops or len(part.prelude) + len(part.coda) > 0 or i in (0, stages - 1)


@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4), costs_strategy)
def test_stages_are_as_even_as_any(prelude, n_loops, coda, stages, costs):
    """Against all cuts of the line of layers: none has a cheaper dearest stage. Nor has any split of the loops alone
    once the stages are fixed."""
    assume(stages <= n_loops + 2)
    layers = [costs.block] * prelude + [costs.loop] * n_loops + [costs.block] * coda
    loads = [0.0] * (stages - 1) + [costs.head]
    cuts = every_cut(len(layers), stages)
    inner_hold_something = [cut for cut in cuts if all(len(stretch) for stretch in cut[1:-1])]
    best = min(quality(layers, loads, cut)[0] for cut in inner_hold_something)

    parts = plan_stages(MythosConfig(prelude_layers=prelude, coda_layers=coda), n_loops, stages, costs)
    turns = plan_loops(tuple(parts), n_loops, 0, costs)
    assert max(spent(parts, turns, 0, costs)) == best


def spent(parts: list[StageSpec], turns: list[range], frozen: int, costs: LayerCosts) -> list[float]:
    """What each stage costs in a step that runs `turns`, the first `frozen` loops without gradient."""
    return [
        costs.block * (len(part.prelude) + len(part.coda))
        + sum(costs.no_grad_loop if t < frozen else costs.loop for t in loops)
        + (costs.head if part.last else 0)
        for part, loops in zip(parts, turns, strict=True)
    ]


@given(
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 9),
    costs_strategy,
)
def test_a_step_may_run_fewer_or_more_loops_than_were_planned(prelude, planned, coda, stages, n_loops, frozen, costs):
    """The stages that hold the looped block share out all loops of the step, in order and as evenly as can be."""
    assume(stages <= planned + 2 and frozen <= n_loops)
    parts = plan_stages(MythosConfig(prelude_layers=prelude, coda_layers=coda), planned, stages, costs)
    turns = plan_loops(tuple(parts), n_loops, frozen, costs)
    assert [t for loops in turns for t in loops] == list(range(n_loops))
    assert all(part.has_loops or not loops for part, loops in zip(parts, turns, strict=True))

    holders = [i for i, part in enumerate(parts) if part.has_loops]
    fixed = max([spent([part], [range(0)], 0, costs)[0] for part in parts if not part.has_loops], default=0)
    best = min(max(spent([parts[i] for i in holders], cut, frozen, costs)) for cut in every_cut(n_loops, len(holders)))
    assert max(spent(parts, turns, frozen, costs)) == max(best, fixed)


def test_a_plan_that_can_be_worked_out_by_hand():
    """2 + 9 + 2 layers on four stages. A loop costs 4, a block 2, the head 4: 48 in all, and 12 each can be had.

    In a step of 8 loops, 4 of them without gradient at 1 each, it is 8 each: the first stage runs all of those.
    """
    costs = LayerCosts(block=2, loop=4, no_grad_loop=1, head=4)
    config = MythosConfig(prelude_layers=2, coda_layers=2)
    parts = plan_stages(config, 9, 4, costs)
    assert [(list(p.prelude), p.has_loops, list(p.coda)) for p in parts] == [
        ([0, 1], True, []),
        ([], True, []),
        ([], True, []),
        ([], True, [0, 1]),
    ]
    assert plan_loops(tuple(parts), 9, 0, costs) == [range(2), range(2, 5), range(5, 8), range(8, 9)]
    assert plan_loops(tuple(parts), 8, 4, costs) == [range(4), range(4, 6), range(6, 8), range(8, 8)]


def test_the_largest_model_is_even_over_four_stages():
    """1t at pipe 4: the dearest stage is within 10 % of a quarter of everything, and so it stays at half the loops."""
    config = load_config(CONFIGS / "1t.yaml")
    costs = stage_costs(config)
    n_loops = config.model.max_loop_iters
    parts = plan_stages(config.model, n_loops, 4, costs)
    everything = costs.block * (config.model.prelude_layers + config.model.coda_layers) + costs.head
    for n, frozen in [(n_loops, 0), (n_loops, n_loops // 2), (n_loops // 2, 0)]:
        total = everything + frozen * costs.no_grad_loop + (n - frozen) * costs.loop
        dearest = max(spent(parts, plan_loops(tuple(parts), n, frozen, costs), frozen, costs))
        assert total / 4 <= dearest <= 1.1 * total / 4


def test_one_stage_holds_everything():
    config = MythosConfig(prelude_layers=3, coda_layers=1)
    (part,) = plan_stages(config, 5, 1, LayerCosts(1, 1, 1, 1))
    assert part == StageSpec.full(config)
    assert plan_loops((part,), 7, 2, LayerCosts(1, 1, 1, 1)) == [range(7)]


# ---- What travels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
shapes = st.lists(st.integers(0, 5), max_size=3)
tensors_to_pack = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6)


def any_bits(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random bits: infinities, subnormal numbers, and NaNs with all kinds of payloads among them."""
    integer = INTEGERS[dtype]
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(integer).view(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; unlike `==` it holds NaNs equal to themselves and 0 unequal to -0."""
    integer = INTEGERS[a.dtype]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def narrowest(kinds: list) -> torch.dtype:
    """The dtype of the message: whatever the model computes in, which nothing that travels is narrower than."""
    return min((dtype for _, dtype in kinds), key=lambda dtype: dtype.itemsize)


@given(tensors_to_pack, st.integers(0, 2**31))
def test_packing_keeps_every_bit(kinds, seed):
    """Mixed dtypes, odd sizes, no elements at all, and tensors that do not lie in memory one number after the other."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [any_bits(shape, dtype, generator) for shape, dtype in kinds]
    tensors += [any_bits([3, 5], dtype, generator).T for _, dtype in kinds]
    like = [(tensor.shape, tensor.dtype) for tensor in tensors]
    dtype = narrowest(kinds)
    flat = pack(tensors, dtype)
    assert flat.dtype == dtype
    assert flat.dim() == 1
    assert flat.numel() * dtype.itemsize == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for tensor, back in zip(tensors, unpack(flat, like), strict=True):
        assert back.shape == tensor.shape
        assert same_bits(tensor, back)


@given(tensors_to_pack, st.integers(0, 2**31))
def test_gradients_travel_back_bit_for_bit(kinds, seed):
    """Whatever gradients arrive at what was unpacked leave at what was packed: NaN payloads and all."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [any_bits(shape, dtype, generator).requires_grad_() for shape, dtype in kinds]
    gradients = [any_bits(shape, dtype, generator) for shape, dtype in kinds]
    like = [(tensor.shape, tensor.dtype) for tensor in tensors]
    outputs = unpack(pack(tensors, narrowest(kinds)), like)
    for got, sent in zip(torch.autograd.grad(outputs, tensors, gradients), gradients, strict=True):
        assert same_bits(got, sent)


def two_stages(packed: bool, seed: int) -> list[Tensor]:
    """A loss over two stages in bf16 and fp32, and the gradients of everything: through one packed tensor that the
    second stage gets as a leaf, as DeepSpeed hands it over, or in one graph without packing."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(shape, generator=generator) for shape in ([3, 5], [3, 5], [3], [1], [5, 7])]
    x, weight, mass, loss, wide = (leaf.requires_grad_() for leaf in leaves)
    half = x.to(torch.bfloat16)
    sends = [half * weight.to(torch.bfloat16), (half * 2).T, mass.exp(), loss * 3, half]  # half goes unused behind
    if packed:
        first = pack(sends, torch.bfloat16)
        flat = first.detach().clone().requires_grad_()
        arrived = unpack(flat, [(tensor.shape, tensor.dtype) for tensor in sends])
    else:
        arrived = sends
    y, turned, m, auxiliary, _ = arrived
    hidden = (y + turned.T).float() * m.unsqueeze(1)
    total = (hidden @ wide).square().sum() + auxiliary.square().sum() + m.sum()
    total.backward()
    if packed:
        assert flat.grad is not None
        first.backward(flat.grad)
    assert all(leaf.grad is not None for leaf in leaves)
    return [total.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("seed", range(5))
def test_a_packed_pipeline_learns_as_one_graph_does(seed):
    """Two stages that exchange one packed tensor and its gradient, against the same graph unpacked: not a bit differs.

    What the second stage does not use gets a gradient of zeros.
    """
    for packed, plain in zip(two_stages(True, seed), two_stages(False, seed), strict=True):
        assert torch.equal(packed, plain)


def test_a_part_of_the_message_can_be_kept_while_the_rest_goes():
    """What is unpacked owns its storage: it neither holds the whole message alive nor changes when that is reused."""
    tensors = [torch.arange(6.0), torch.arange(4).to(torch.bfloat16)]
    flat = pack(tensors, torch.bfloat16)
    first, _ = unpack(flat, [(t.shape, t.dtype) for t in tensors])
    flat.zero_()
    assert first.tolist() == list(accumulate([0, 1, 1, 1, 1, 1]))
    assert first.untyped_storage().nbytes() == 6 * 4


def test_many_loops_are_dealt_out_to_many_stages_at_once():
    """512 loops over 64 stages, in processor time: trying every end of every stretch would take minutes."""
    began = time.process_time()
    parts = plan_stages(MythosConfig(prelude_layers=64, coda_layers=64), 512, 64, LayerCosts(3.0, 10.0, 3.0, 5.0))
    turns = plan_loops(tuple(parts), 512, 256, LayerCosts(3.0, 10.0, 3.0, 5.0))
    assert sum(map(len, turns)) == 512
    assert time.process_time() - began < 2
