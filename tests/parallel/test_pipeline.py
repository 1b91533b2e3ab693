"""Dividing layers into pipeline stages, and packing what stages send."""

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
from mythos_dist.parallel.pipeline import (
    LayerCosts,
    StageSpec,
    loops_with_grad,
    plan_loops,
    plan_stages,
    split_evenly,
)

CONFIGS = Path(__file__).parents[2] / "configs"

# ---- Splitting

integer_costs = st.integers(1, 9)  # integers: their sums are exact in any order


def quality(costs: list[int], loads: list[int], spans: list[range]) -> tuple[float, float]:
    """What split_evenly minimizes: the largest span, then the sum of squares."""
    sums = [load + sum(costs[i] for i in span) for load, span in zip(loads, spans, strict=True)]
    return max(sums), sum(s * s for s in sums)


def every_split(n: int, spans: int) -> list[list[range]]:
    """All ways to divide n layers into consecutive spans, which may be empty."""
    cuts = combinations_with_replacement(range(n + 1), spans - 1)
    return [[range(a, b) for a, b in pairwise((0, *cut, n))] for cut in cuts]


@given(
    st.lists(integer_costs, max_size=7),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=4),
)
# 12 + 17 + 17 has the smallest maximum so far, 18 + 13 + 15 the smallest squares, and the last span costs 18 anyway.
@example([3, 9, 6, 2, 6, 4, 3], [(0, 0), (11, 0), (9, 0), (11, 0)])
def test_a_split_is_as_even_as_any(costs, stages):
    """Against all splits: none has a smaller largest span, or the same with a smaller sum of squares."""
    loads, least = [load for load, _ in stages], [few for _, few in stages]
    allowed = [
        cut
        for cut in every_split(len(costs), len(stages))
        if all(len(span) >= few for span, few in zip(cut, least, strict=True))
    ]
    if not allowed:
        with pytest.raises(ValueError, match="cannot be divided"):
            split_evenly(costs, loads, least)
        return
    split = split_evenly(costs, loads, least)
    assert split in allowed
    assert quality(costs, loads, split) == min(quality(costs, loads, cut) for cut in allowed)


def test_a_split_of_equal_layers():
    """Ten equal layers on four stages, the last with a head that costs three: 3 + 3 + 3 + (1 + head)."""
    assert split_evenly([1.0] * 10, [0, 0, 0, 3.0], [0] * 4) == [range(3), range(3, 6), range(6, 9), range(9, 10)]


# ---- Stages

costs_strategy = st.builds(
    LayerCosts, block=integer_costs, loop=integer_costs, no_grad_loop=integer_costs, head=integer_costs
)


def layers_of(specs: list[StageSpec], loop_ranges: list[range]) -> list[tuple[str, int]]:
    """The layers that the stages run for one batch, in order."""
    names = []
    for spec, loops in zip(specs, loop_ranges, strict=True):
        names += (
            [("prelude", i) for i in spec.prelude] + [("loop", t) for t in loops] + [("coda", i) for i in spec.coda]
        )
    return names


def all_layers(prelude: int, n_loops: int, coda: int) -> list[tuple[str, int]]:
    sizes = [("prelude", prelude), ("loop", n_loops), ("coda", coda)]
    return [(kind, i) for kind, size in sizes for i in range(size)]


@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 4), st.integers(1, 8), costs_strategy)
def test_every_layer_is_run_by_one_stage_in_order(prelude, n_loops, coda, stages, costs):
    """Together the stages run all layers. The first stage reads tokens, the last computes the loss.

    Of the stages with loops one starts them and one ends them; only the first and the last stage may have no layers.
    """
    assume(stages <= n_loops + 2)
    config = MythosConfig(prelude_layers=prelude, coda_layers=coda)
    specs = plan_stages(config, n_loops, stages, costs)
    loop_ranges = plan_loops(tuple(specs), n_loops, 0, costs)
    assert len(specs) == stages
    assert layers_of(specs, loop_ranges) == all_layers(prelude, n_loops, coda)
    assert [spec.is_first for spec in specs] == [True] + [False] * (stages - 1)
    assert [spec.is_last for spec in specs] == [False] * (stages - 1) + [True]

    holders = [i for i, spec in enumerate(specs) if spec.has_loops]
    assert holders == list(range(holders[0], holders[-1] + 1))
    assert [i for i in holders if specs[i].starts_loops] == holders[:1]
    assert [i for i in holders if specs[i].ends_loops] == holders[-1:]
    for i, spec in enumerate(specs):
        assert spec.after_loops == (i > holders[-1])
        assert spec.has_loops or len(spec.prelude) + len(spec.coda) > 0 or i in (0, stages - 1)


@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4), costs_strategy)
def test_stages_are_as_even_as_any(prelude, n_loops, coda, stages, costs):
    """Against all splits of the layers: none has a smaller largest stage cost, nor has any split of the loops alone for
    the planned stages."""
    assume(stages <= n_loops + 2)
    layers = [costs.block] * prelude + [costs.loop] * n_loops + [costs.block] * coda
    loads = [0.0] * (stages - 1) + [costs.head]
    cuts = every_split(len(layers), stages)
    inner_hold_something = [cut for cut in cuts if all(len(span) for span in cut[1:-1])]
    best = min(quality(layers, loads, cut)[0] for cut in inner_hold_something)

    specs = plan_stages(MythosConfig(prelude_layers=prelude, coda_layers=coda), n_loops, stages, costs)
    loop_ranges = plan_loops(tuple(specs), n_loops, 0, costs)
    assert max(spent(specs, loop_ranges, 0, costs)) == best


def spent(specs: list[StageSpec], loop_ranges: list[range], no_grad: int, costs: LayerCosts) -> list[float]:
    """The cost of each stage in a step that runs `loop_ranges`, the first `no_grad` loops without gradient."""
    return [
        costs.block * (len(spec.prelude) + len(spec.coda))
        + sum(costs.no_grad_loop if t < no_grad else costs.loop for t in loops)
        + (costs.head if spec.is_last else 0)
        for spec, loops in zip(specs, loop_ranges, strict=True)
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
def test_a_step_may_run_fewer_or_more_loops_than_were_planned(prelude, planned, coda, stages, n_loops, no_grad, costs):
    """The stages with the looped block divide all loops of the step, in order and as evenly as possible."""
    assume(stages <= planned + 2 and no_grad <= n_loops)
    specs = plan_stages(MythosConfig(prelude_layers=prelude, coda_layers=coda), planned, stages, costs)
    loop_ranges = plan_loops(tuple(specs), n_loops, no_grad, costs)
    assert [t for loops in loop_ranges for t in loops] == list(range(n_loops))
    assert all(spec.has_loops or not loops for spec, loops in zip(specs, loop_ranges, strict=True))

    holders = [i for i, spec in enumerate(specs) if spec.has_loops]
    fixed = max([spent([spec], [range(0)], 0, costs)[0] for spec in specs if not spec.has_loops], default=0)
    best = min(
        max(spent([specs[i] for i in holders], cut, no_grad, costs)) for cut in every_split(n_loops, len(holders))
    )
    assert max(spent(specs, loop_ranges, no_grad, costs)) == max(best, fixed)


def test_a_plan_computed_by_hand():
    """2 + 9 + 2 layers on four stages. A loop costs 4, a block 2, the head 4: 48 in all, 12 per stage.

    In a step of 8 loops, 4 of them no-grad at 1 each, it is 8 per stage: the first runs all no-grad loops.
    """
    costs = LayerCosts(block=2, loop=4, no_grad_loop=1, head=4)
    config = MythosConfig(prelude_layers=2, coda_layers=2)
    specs = plan_stages(config, 9, 4, costs)
    assert [(list(p.prelude), p.has_loops, list(p.coda)) for p in specs] == [
        ([0, 1], True, []),
        ([], True, []),
        ([], True, []),
        ([], True, [0, 1]),
    ]
    assert plan_loops(tuple(specs), 9, 0, costs) == [range(2), range(2, 5), range(5, 8), range(8, 9)]
    assert plan_loops(tuple(specs), 8, 4, costs) == [range(4), range(4, 6), range(6, 8), range(8, 8)]


def test_only_the_last_stage_has_the_heads_cost():
    """Three loops of cost 2 on two stages without blocks, the head 1: 4 and 2 + 1; a cost on both would also allow 2
    and 4 + 1."""
    costs = LayerCosts(block=1, loop=2, no_grad_loop=2, head=1)
    specs = plan_stages(MythosConfig(prelude_layers=0, coda_layers=0), 3, 2, costs)
    assert plan_loops(tuple(specs), 3, 0, costs) == [range(2), range(2, 3)]


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9))
def test_loops_with_grad_are_those_after_the_first_ones_of_the_step(start, count, no_grad):
    loops = range(start, start + count)
    assert list(loops_with_grad(loops, no_grad)) == [t for t in loops if t >= no_grad]


def test_the_largest_model_is_balanced_over_four_stages():
    """1t at pipe=4: the most expensive stage is within 10 % of a quarter of the total, also with half the loops."""
    config = load_config(CONFIGS / "1t.yaml")
    costs = stage_costs(config)
    n_loops = config.model.max_loop_iters
    specs = plan_stages(config.model, n_loops, 4, costs)
    everything = costs.block * (config.model.prelude_layers + config.model.coda_layers) + costs.head
    for n, no_grad in [(n_loops, 0), (n_loops, n_loops // 2), (n_loops // 2, 0)]:
        total = everything + no_grad * costs.no_grad_loop + (n - no_grad) * costs.loop
        largest = max(spent(specs, plan_loops(tuple(specs), n, no_grad, costs), no_grad, costs))
        assert total / 4 <= largest <= 1.1 * total / 4


def test_a_single_stage_has_all_layers():
    config = MythosConfig(prelude_layers=3, coda_layers=1)
    (spec,) = plan_stages(config, 5, 1, LayerCosts(1, 1, 1, 1))
    assert spec == StageSpec.full(config)
    assert plan_loops((spec,), 7, 2, LayerCosts(1, 1, 1, 1)) == [range(7)]


# ---- Packing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
shapes = st.lists(st.integers(0, 5), max_size=3)
tensors_to_pack = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6)


def any_bits(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random bits, which include infinities, subnormals, and NaNs with arbitrary payloads."""
    integer = INTEGERS[dtype]
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(integer).view(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; unlike `==`, NaNs equal themselves and 0 differs from -0."""
    integer = INTEGERS[a.dtype]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def narrowest(kinds: list) -> torch.dtype:
    """The dtype of the packed tensor: nothing that is sent may be narrower."""
    return min((dtype for _, dtype in kinds), key=lambda dtype: dtype.itemsize)


@given(tensors_to_pack, st.integers(0, 2**31))
def test_packing_keeps_every_bit(kinds, seed):
    """Mixed dtypes, odd sizes, empty tensors, and tensors that are not contiguous."""
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
def test_gradients_are_packed_bit_for_bit(kinds, seed):
    """The gradients of the unpacked tensors are those of the packed tensors, NaN payloads included."""
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
    sends = [
        half * weight.to(torch.bfloat16),
        (half * 2).T,
        mass.exp(),
        loss * 3,
        half,
    ]  # the second stage does not use half
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
def test_a_packed_pipeline_has_the_gradients_of_one_graph(seed):
    """Two stages that exchange one packed tensor and its gradient, against the same graph unpacked: not a bit differs.

    What the second stage does not use gets a gradient of zeros.
    """
    for packed, plain in zip(two_stages(True, seed), two_stages(False, seed), strict=True):
        assert torch.equal(packed, plain)


def test_unpacked_tensors_own_their_storage():
    """They neither keep the packed tensor alive nor change when it is reused."""
    tensors = [torch.arange(6.0), torch.arange(4).to(torch.bfloat16)]
    flat = pack(tensors, torch.bfloat16)
    first, _ = unpack(flat, [(t.shape, t.dtype) for t in tensors])
    flat.zero_()
    assert first.tolist() == list(accumulate([0, 1, 1, 1, 1, 1]))
    assert first.untyped_storage().nbytes() == 6 * 4


def test_planning_many_stages_is_fast():
    """512 loops over 64 stages, in CPU time: trying every end of every span would take minutes."""
    began = time.process_time()
    specs = plan_stages(MythosConfig(prelude_layers=64, coda_layers=64), 512, 64, LayerCosts(3.0, 10.0, 3.0, 5.0))
    loop_ranges = plan_loops(tuple(specs), 512, 256, LayerCosts(3.0, 10.0, 3.0, 5.0))
    assert sum(map(len, loop_ranges)) == 512
    assert time.process_time() - began < 2
