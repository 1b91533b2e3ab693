"""Transposed copies of weights: the same logits, only within `use`, only in fp32 on a CPU."""

import pytest
import torch

from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.sampling import Sampling
from mythos_dist.model.transposed import TransposedWeights


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 30])
@torch.inference_mode()
def test_logits_are_those_without_copies(tokens, model):
    """Up to rounding, for numbers of tokens on both sides of every limit: 2 rows, and 6 pairs for 6 experts."""
    ids = torch.arange(tokens).unsqueeze(0)
    expected = model(ids)
    with TransposedWeights(model).use():
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_layers_use_the_copies_within_use_and_the_weights_after_it(build):
    """The copies are those of weights that have changed since."""
    model, ids = build(), torch.tensor([[3]])
    expected, copies = model(ids), TransposedWeights(model)
    changed = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".w1", ".w3", ".gate.weight", ".up.weight"))
    ]
    assert len(changed) == 8  # of the experts, the shared experts, prelude and coda
    for parameter in changed:
        parameter.zero_()
    with pytest.raises(ZeroDivisionError), copies.use():
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
        raise ZeroDivisionError
    assert (model(ids) - expected).abs().max() > 0.1


@torch.inference_mode()
def test_the_output_head_uses_its_copy_for_two_rows_at_most(build):
    """Of the table (40, 32): its first row is zeroed after the copy was made."""
    model = build()
    copies, rows = TransposedWeights(model), torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    expected = rows @ model.embed.weight.T.clone()
    model.embed.weight[0] = 0
    with copies.use():
        torch.testing.assert_close(model.embed.logits(rows[:, :2]), expected[:, :2], atol=1e-5, rtol=1e-5)
        assert model.embed.logits(rows)[..., 0].eq(0).all()


def test_size_of_the_copies_and_no_copies_in_half_precision(build):
    """fp32: gate and up of 6 experts (16 x 32 each), of 32 shared channels, of the two dense layers, and the head."""
    model = build()
    dense = 2 * model.config.ffn_dim * 32
    assert TransposedWeights(model).num_bytes == 4 * (2 * 6 * 16 * 32 + 2 * 32 * 32 + 2 * dense + 40 * 32)
    assert TransposedWeights(model.to(torch.bfloat16)).num_bytes == 0


def test_an_engine_without_copies_gives_the_same_tokens(model):
    tokens = []
    for copy_weights in (True, False):
        engine = DecodingEngine(model, None, n_loops=4, max_batch=3, copy_weights=copy_weights)
        requests = [engine.submit([i, 5], Sampling(max_new_tokens=10, temperature=0)) for i in range(3)]
        engine.run()
        tokens.append([request.tokens for request in requests])
    assert tokens[0] == tokens[1]
