"""Transposed copies of the experts' `down`: the same logits, only within `use`, only in fp32 on a CPU."""

import pytest
import torch

from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.sampling import Sampling
from mythos_dist.model.transposed import TransposedWeights


@pytest.mark.parametrize("tokens", [1, 2, 3, 18, 19])
@torch.inference_mode()
def test_logits_are_those_without_copies(tokens, model):
    """Up to rounding, for numbers of tokens on both sides of the limit: 36 pairs for 6 experts."""
    ids = torch.arange(tokens).unsqueeze(0)
    expected = model(ids)
    with TransposedWeights(model).use():
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_experts_use_the_copies_within_use_and_the_weights_after_it(build):
    """The copies are those of weights that have changed since."""
    model, ids = build(), torch.tensor([[3]])
    expected, copies = model(ids), TransposedWeights(model)
    changed = [parameter for name, parameter in model.named_parameters() if name.endswith(".w2")]
    assert len(changed) == 1
    changed[0].zero_()
    with pytest.raises(ZeroDivisionError), copies.use():
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
        raise ZeroDivisionError
    assert (model(ids) - expected).abs().max() > 1e-3


def test_size_of_the_copies_and_no_copies_in_half_precision(build):
    """fp32: down of 6 experts, 16 x 32 each."""
    model = build()
    assert TransposedWeights(model).num_bytes == 4 * 6 * 16 * 32
    assert TransposedWeights(model.to(torch.bfloat16)).num_bytes == 0


def test_an_engine_without_copies_gives_the_same_tokens(model):
    tokens = []
    for copy_weights in (True, False):
        engine = DecodingEngine(model, None, n_loops=4, max_batch=3, copy_weights=copy_weights)
        requests = [engine.submit([i, 5], Sampling(max_new_tokens=10, temperature=0)) for i in range(3)]
        engine.run()
        tokens.append([request.tokens for request in requests])
    assert tokens[0] == tokens[1]
