"""Initial values."""

import pytest
import torch
from torch import nn

from mythos_dist.model import Mythos
from mythos_dist.model.init import STD, init_parameters, normal_block


def test_values_depend_on_the_seed_and_the_name_only(tiny):
    """The global generator and the order of construction do not matter; another seed changes every matrix."""
    config = tiny()
    torch.manual_seed(1)
    first = dict(Mythos(config, seed=3).named_parameters())
    torch.manual_seed(2)
    again = dict(Mythos(config, seed=3).named_parameters())
    other = dict(Mythos(config, seed=4).named_parameters())
    deeper = dict(Mythos(tiny(prelude_layers=3), seed=3).named_parameters())
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, deeper[name])
        if value.dim() > 1 and not name.endswith("norm.weight"):
            assert not (value == other[name]).any()


def test_no_two_parameters_share_their_numbers(tiny):
    """Equal shapes under different names are drawn apart."""
    model = Mythos(tiny(prelude_layers=2))
    tables = [p.flatten()[:16] for n, p in model.named_parameters() if p.dim() > 1]
    firsts = {tuple(t.tolist()) for t in tables}
    assert len(firsts) == len(tables) > 20


def test_a_block_drawn_alone_is_the_slice_of_the_whole():
    """A table of 3,000,000 numbers takes three generators; whoever needs the second block draws that one only.

    No two blocks are alike: of a million pairs of random numbers hardly any is equal.
    """
    table = nn.Module()
    table.weight = nn.Parameter(torch.empty(3000, 1000))
    init_parameters(table, seed=5)
    rows = 2**20 // 1000
    assert torch.equal(table.weight[rows : 2 * rows], normal_block(5, "weight", 1, rows, 1000))
    assert (table.weight[:rows] == table.weight[rows : 2 * rows]).double().mean() < 1e-3
    tail = 3000 - 2 * rows
    assert torch.equal(table.weight[2 * rows :], normal_block(5, "weight", 2, tail, 1000))


def test_matrices_are_normal_with_the_references_deviation(build_reference, tiny):
    """Over 600,000 numbers the sample's deviation and mean lie within 1 % of 0.02, and tails are normal ones.

    The reference's own draw of the same model is held to the same bounds.
    """
    config = tiny(dim=128, vocab_size=500, n_experts=16, expert_dim=64)
    for model in (Mythos(config), build_reference(config)):
        values = torch.cat(
            [p.detach().flatten() for n, p in model.named_parameters() if p.dim() > 1 and "norm" not in n]
        )
        assert values.numel() > 600_000
        assert values.std().item() == pytest.approx(0.02, rel=0.01)
        assert abs(values.mean().item()) < 0.01 * 0.02
        beyond = (values.abs() > 2 * 0.02).double().mean().item()
        assert beyond == pytest.approx(0.0455, rel=0.05)  # a normal variable beyond two deviations
    assert STD == 0.02


def test_norms_injection_and_halting_start_where_the_reference_does(build_reference, tiny):
    """All that is not drawn: equal to a fresh reference, but for the halting bias, which it draws and we set to 0."""
    config = tiny()
    reference = dict(build_reference(config).named_parameters())
    compared = 0
    for name, value in Mythos(config).named_parameters():
        if value.dim() == 1 and name != "recurrent.act.halt.bias":
            assert torch.equal(value, reference[name]), name
            compared += 1
    assert compared > 10


def test_a_model_on_the_meta_device_stays_there(tiny):
    """Nothing is drawn until someone gives it storage."""
    with torch.device("meta"):
        model = Mythos(tiny())
    assert all(p.is_meta for p in model.parameters())
    real = model.to_empty(device="cpu")
    init_parameters(real, seed=7)
    for ours, fresh in zip(real.parameters(), Mythos(tiny(), seed=7).parameters(), strict=True):
        assert torch.equal(ours, fresh)
