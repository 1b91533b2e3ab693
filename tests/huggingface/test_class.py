"""The class for transformers computes what our module computes, in every mode and with every switch."""

import pytest
import torch
import torch.nn.functional as F
from helpers.huggingface import WIDTHS, close, model_settings, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mythos_dist.config.schema import ActConfig, MythosConfig

pytestmark = pytest.mark.launch  # transformers is 4 seconds of imports

examples = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples
@given(model=model_settings(), loops=st.integers(1, 5), seed=st.integers(0, 99))
def test_logits_are_those_of_our_module(build_pair, model, loops, seed):
    """Also beyond the loops of the LoRA's table, for which the last row is used."""
    ours, theirs = build_pair(*model, seed=seed)
    input_ids = tokens(2, 9, seed=seed)
    with torch.no_grad():
        close(theirs(input_ids, num_loops=loops).logits, ours(input_ids, loops))


@examples
@given(model=model_settings(), seed=st.integers(0, 99), checkpointing=st.booleans())
def test_loss_and_gradients_are_those_of_our_module(build_pair, model, seed, checkpointing):
    """Labels are shifted as transformers does. With recomputation as without."""
    ours, theirs = build_pair(*model, seed=seed)
    input_ids = tokens(2, 9, seed=seed)
    logits = ours.train()(input_ids, 3)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    expected.backward()
    if checkpointing:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    loss = theirs.train()(input_ids, labels=input_ids, num_loops=3).loss
    loss.backward()
    close(loss, expected)
    gradients = {name: p.grad for name, p in theirs.model.named_parameters()}
    gradients["unembed.weight"] = theirs.lm_head.weight.grad  # if it is not the embedding
    largest = max(float(p.grad.abs().max()) for p in ours.parameters() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        expected_gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        torch.testing.assert_close(actual, expected_gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


@examples
@given(model=model_settings(), loops=st.integers(1, 4), chunk=st.integers(1, 9))
def test_cached_is_uncached(build_pair, model, loops, chunk):
    """Tokens are read in chunks, with keys and values of the earlier ones from the cache."""
    _, theirs = build_pair(*model)
    input_ids, cache, parts = tokens(2, 11), None, []
    with torch.no_grad():
        for part in input_ids.split(chunk, dim=1):
            output = theirs(part, past_key_values=cache, use_cache=True, num_loops=loops)
            cache = output.past_key_values
            parts.append(output.logits)
        close(torch.cat(parts, 1), theirs(input_ids, num_loops=loops, use_cache=False).logits)


@examples
@given(model=model_settings(), loops=st.integers(1, 4), padding=st.integers(1, 5))
def test_left_padded_rows_are_single_rows(build_pair, model, loops, padding):
    """Logits of the tokens that are not padding. Random hidden states depend on the row, so the row is the first."""
    _, theirs = build_pair(*model)
    input_ids = tokens(2, 10)
    mask = torch.ones_like(input_ids)
    mask[0, :padding] = 0
    with torch.no_grad():
        batch = theirs(input_ids, attention_mask=mask, num_loops=loops).logits
        close(batch[:1, padding:], theirs(input_ids[:1, padding:], num_loops=loops).logits)
    assert bool(batch.isfinite().all())


def test_a_cache_belongs_to_one_number_of_loops(build_pair):
    _, theirs = build_pair(MythosConfig(**WIDTHS))
    cache = theirs(tokens(1, 4), num_loops=2, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"num_loops=3, but the cache holds keys of 2 loops"):
        theirs(tokens(1, 1), num_loops=3, past_key_values=cache)


@pytest.mark.parametrize("loops", [0, 513])
def test_loops_out_of_range_are_refused(build_pair, loops):
    _, theirs = build_pair(MythosConfig(**WIDTHS))
    with pytest.raises(ValueError, match=f"num_loops={loops} must be"):
        theirs(tokens(1, 4), num_loops=loops)


def test_a_sequence_beyond_the_context_is_refused(build_pair):
    _, theirs = build_pair(MythosConfig(**WIDTHS))
    with pytest.raises(ValueError, match="65 tokens is longer than the context, 64"):
        theirs(tokens(1, 65))


def test_hidden_states_are_those_of_each_loop(build_pair):
    """With halting off, the coda's input is the last loop's h; without a coda its norm is the output."""
    _, theirs = build_pair(MythosConfig(**WIDTHS, coda_layers=0), ActConfig(mode="off"))
    states = theirs(tokens(2, 5), num_loops=3, output_hidden_states=True).hidden_states
    assert len(states) == 2 + 3 + 1
    close(theirs.model.norm(states[-2]), states[-1])
    fewer = theirs(tokens(2, 5), num_loops=2, output_hidden_states=True).hidden_states
    close(fewer[3], states[3])


def test_the_router_bias_stays_exact_in_bf16(build_pair):
    """A step of 1e-3 is below the resolution of bf16 near 0.3."""
    _, theirs = build_pair(MythosConfig(**WIDTHS))
    before = theirs.model.recurrent.block.ffn.router.bias.clone()
    theirs.to(torch.bfloat16)
    assert torch.equal(theirs.model.recurrent.block.ffn.router.bias, before)
    assert theirs.model.embed.weight.dtype == torch.bfloat16
