"""Weight gradients that loops add up in place, against autograd's own sums."""

import pytest
import torch
from helpers.selection import first_is_quick
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_dist.model import Mythos
from mythos_dist.model.recompute import Recompute


def gradients(model: Mythos, input_ids: Tensor, sums: bool, monkeypatch, **settings) -> dict[str, Tensor]:
    """Of one pass; without `sums` autograd accumulates."""
    with monkeypatch.context() as patch:
        if not sums:
            patch.setattr(model.recurrent.block.ffn.experts, "start_pass", lambda loops: None)
            model.recurrent.block.ffn.experts._sums = None
        model.zero_grad()
        model(input_ids, labels=input_ids, **settings)["objective"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [None, Recompute("loop"), Recompute("loop", 2), Recompute("selective")])
@pytest.mark.parametrize("backprop", [None, 1, 2])
@pytest.mark.parametrize("dtype", first_is_quick([torch.float32, torch.bfloat16]))
def test_gradient_sums_equal_autograd(dtype, backprop, recompute, tiny, enliven, monkeypatch):
    """Every loop, the last one, the last two; experts without tokens get zeros. Only the order of sums may differ."""
    config = tiny(n_experts=12, expert_dim=8)
    model = enliven(Mythos(config, recompute=recompute)).to(dtype)
    model.recurrent.block.ffn.router.bias[:3] = -1e4
    input_ids = torch.arange(20).view(2, 10)
    ours, theirs = (gradients(model, input_ids, sums, monkeypatch, backprop=backprop) for sums in (True, False))
    assert not ours["recurrent.block.ffn.experts.w1"][:3].any()
    assert ours["recurrent.block.ffn.experts.w1"][3:].any()
    for name, gradient in ours.items():
        close = 1e-6 if dtype == torch.float32 else 1e-2
        assert (gradient - theirs[name]).float().norm() <= close * theirs[name].float().norm(), name


def test_a_second_or_partial_backward_is_correct(tiny, enliven):
    """The gradient of the experts is the same after another backward pass that did not ask for it, and doubles when
    asked for twice; passes that overlap, as a pipeline's do, keep their sums apart."""
    model = enliven(Mythos(tiny(expert_dim=8)))
    weight = model.recurrent.block.ffn.experts.w2
    first, second = (model(ids, labels=ids)["objective"] for ids in torch.arange(32).view(2, 1, 16))
    (once,) = torch.autograd.grad(first, weight, retain_graph=True)
    torch.autograd.grad(first, model.embed.weight, retain_graph=True)
    second.backward()
    assert weight.grad is not None
    alone = weight.grad.clone()
    first.backward(retain_graph=True)
    first.backward()
    torch.testing.assert_close(weight.grad, alone + 2 * once)


class LargestFill(TorchDispatchMode):
    """Counts the new tensors of a shape that operations allocate."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.made = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and out.shape == self.shape and "new" not in str(func):
            known = {id(a) for a in args if isinstance(a, Tensor)} | {id(v) for v in (kwargs or {}).values()}
            self.made += id(out) not in known and "empty" in str(func)
        return out


def test_backward_allocates_one_gradient_for_all_loops(tiny, enliven):
    """Three stacks of experts, so three tensors of their size in a backward pass through any number of loops."""
    model = enliven(Mythos(tiny(n_experts=12, expert_dim=8)))
    shape = model.recurrent.block.ffn.experts.w1.shape
    ids = torch.arange(16).view(1, 16)
    for n_loops in (2, 5):
        losses = model(ids, n_loops, labels=ids)
        with LargestFill(shape) as seen:
            losses["objective"].backward()
        assert seen.made == 3
