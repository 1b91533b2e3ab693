"""Bytes and FLOPs of single operations, on real and on fake tensors, against sums by hand."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from mythos_dist.ops.plan.meter import Meter

KB = 1024
MODES = {"real": contextlib.nullcontext, "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True)}


@pytest.fixture(params=MODES)
def tensors(request):
    """Real tensors, and fake ones."""
    with MODES[request.param]():
        yield


def test_a_storage_counts_until_it_is_freed(tensors):
    """Views and in-place operations take no memory; a temporary tensor shows in the peak."""
    with Meter() as meter:
        a = torch.zeros(KB)
        assert meter.total == 4 * KB
        a.view(2, -1).mul_(2)
        assert meter.total == meter.peak == 4 * KB
        b = (a + 1) * 2
        assert (meter.total, meter.peak) == (8 * KB, 12 * KB)
        del a, b
        assert (meter.total, meter.peak) == (0, 12 * KB)


def test_a_storage_counts_while_a_view_refers_to_it(tensors):
    with Meter() as meter:
        a = torch.zeros(KB)[:1]
        assert meter.total == 4 * KB
        del a
        assert meter.total == 0


def test_sizes_are_rounded_as_by_the_cuda_allocator(tensors):
    """Multiples of 512 bytes, zero for an empty tensor, zero for meta tensors."""
    with Meter() as meter:
        kept = [torch.zeros(1), torch.zeros(129), torch.zeros(0), torch.zeros(KB, device="meta")]
        assert meter.total == 512 + 1024
    assert len(kept) == 4


def test_parts_follow_from_phase_and_marks(tensors):
    with Meter() as meter:
        weight = torch.zeros(16, 64, requires_grad=True)
        meter.mark([weight], "parameters")
        assert +meter.live == {"parameters": 4 * KB}
        meter.phase, meter.weight_shapes = "passes", {weight.shape}
        y = torch.ones(8, 64) @ weight.t()
        assert +meter.live == {"parameters": 4 * KB, "activations": 2 * KB + 512}
        meter.reset()
        y.sum().backward()
        assert meter.live["gradients"] == 4 * KB
        assert meter.peak == sum(meter.at_peak.values()) >= 10 * KB + 512


def flops_of(function, *arguments) -> float:
    with Meter() as meter:
        function(*arguments)
    return meter.flops


def test_flops_of_matrix_products(tensors):
    """2 per multiply-add, bias not counted; each row of a grouped GEMM once."""
    a, b, c = torch.ones(8, 16), torch.ones(16, 24), torch.ones(24)
    assert flops_of(torch.mm, a, b) == flops_of(torch.addmm, c, a, b) == 2 * 8 * 16 * 24
    assert flops_of(torch.bmm, a.expand(3, 8, 16), b.expand(3, 16, 24)) == 3 * 2 * 8 * 16 * 24
    rows, stack, ends = torch.ones(8, 16).bfloat16(), torch.ones(3, 16, 24).bfloat16(), torch.tensor([2, 2, 8]).int()
    assert flops_of(lambda: F.grouped_mm(rows, stack, offs=ends)) == 2 * 8 * 16 * 24
    assert flops_of(lambda: F.grouped_mm(rows.t(), rows, offs=ends)) == 2 * 16 * 8 * 16


def test_flops_of_causal_attention(tensors):
    """Half the scores and the diagonal: two products forward; five backward, which recomputes the scores."""
    B, H, S, d = 2, 3, 16, 8
    q, k, v = (torch.ones(B, H, S, d, requires_grad=True) for _ in range(3))
    product = 2 * B * H * S * (S + 1) / 2 * d
    with Meter() as meter:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert meter.flops == 2 * product
        out.sum().backward()
        assert meter.flops == 7 * product
    assert flops_of(F.scaled_dot_product_attention, q, k, v) == 2 * 2 * B * H * S * S * d


def test_the_backward_of_a_linear_layer_costs_two_forward_passes(tensors):
    layer, x = nn.Linear(16, 24, bias=False), torch.ones(8, 16, requires_grad=True)
    assert flops_of(lambda: layer(x).sum().backward()) == 3 * 2 * 8 * 16 * 24


# matmul: the weight, the sum, and the gradient to be added. F.linear: after its transposed view autograd's first
# addition creates a new tensor: the weight, two gradients, their sum.
@pytest.mark.parametrize(("product", "matrices"), [(torch.matmul, 3), (F.linear, 4)])
def test_fake_gradient_sums_take_as_much_memory_as_real_ones(product, matrices):
    """A weight that is used in three loops, against the allocator's profile.

    With fake tensors torch itself adds out of place, so that each addition would hold three matrices.
    """
    size = 256

    def run() -> None:
        weight, x = torch.zeros(size, size, requires_grad=True), torch.ones(1, size)
        for _ in range(3):
            x = product(x, weight)
        x.sum().backward()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler and profiler.profiler.kineto_results
    events: Any = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    allocated = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    with MODES["fake"](), Meter() as meter:
        run()
    vectors = 16 * size * 4
    assert allocated == pytest.approx(matrices * size * size * 4, abs=vectors)
    assert meter.peak == pytest.approx(allocated, abs=vectors)
