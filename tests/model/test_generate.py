"""Generation with the key-value cache, compared with forward passes without one."""

import pytest
import torch
from helpers.selection import first_is_quick
from torch import Tensor

from mythos_dist.errors import UserError
from mythos_dist.model import KVCache, Mythos

ATTENTIONS = ["gqa", "mla"]


def prompts(config, rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def greedy_without_cache(model: Mythos, input_ids: Tensor, new: int, n_loops: int | None = None) -> Tensor:
    for _ in range(new):
        input_ids = torch.cat([input_ids, model(input_ids, n_loops)[:, -1:].argmax(-1)], dim=1)
    return input_ids


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("chunks", [(16,), (9, 1, 1, 1, 1, 1, 1, 1), (4, 5, 7), (1,) * 16])
@torch.no_grad()
def test_cached_forwards_equal_the_full_forward(chunks, attn_type, tiny, build_pair):
    """One shot, token by token, and in chunks; other kernels sum in another order: 1e-4."""
    config = tiny(attn_type=attn_type)
    model, _ = build_pair(config)
    input_ids = prompts(config, rows=3, length=16)
    cache = KVCache()
    parts = [model(part, 4, cache=cache) for part in input_ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids, 4), atol=1e-4, rtol=1e-4)
    assert cache.tokens == 16


def test_the_reference_cannot_read_a_prompt_in_chunks(tiny, build_pair):
    """Its mask covers the new tokens only, not the cached ones."""
    config = tiny()
    _, reference = build_pair(config)
    cache: dict = {}
    reference(prompts(config), kv_cache=cache)
    with pytest.raises(RuntimeError, match="must match the size"):
        reference(prompts(config), kv_cache=cache, start_pos=9)


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("n_loops", first_is_quick([None, 1, 5]))
def test_temperature_zero_is_greedy_decoding(n_loops, attn_type, tiny, build_pair):
    """Token for token, twice the same; the reference divides by zero."""
    config = tiny(attn_type=attn_type)
    model, reference = build_pair(config)
    out = model.generate(prompts(config), 12, n_loops=n_loops, temperature=0)
    assert torch.equal(out, greedy_without_cache(model, prompts(config), 12, n_loops))
    assert torch.equal(out, model.generate(prompts(config), 12, n_loops=n_loops, temperature=0))
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        reference.generate(prompts(config), 12, temperature=0)


@pytest.mark.parametrize("prefill_chunk", [1, 4, 9, 100])
def test_prefill_chunks_do_not_change_the_output(prefill_chunk, tiny, build_pair):
    config = tiny()
    model, _ = build_pair(config)
    out = model.generate(prompts(config), 6, temperature=0, prefill_chunk=prefill_chunk)
    assert torch.equal(out, greedy_without_cache(model, prompts(config), 6))


def test_a_batch_equals_its_rows_alone(tiny, build_pair):
    config = tiny()
    model, _ = build_pair(config)
    rows = [model.generate(row.unsqueeze(0), 8, temperature=0) for row in prompts(config, rows=4)]
    assert torch.equal(model.generate(prompts(config, rows=4), 8, temperature=0), torch.cat(rows))


def test_top_k_beyond_the_vocabulary_samples_from_all_tokens(tiny, build_pair):
    """41 of 40 tokens is the same as no limit, with the same random numbers; the reference raises."""
    config = tiny()
    model, reference = build_pair(config)
    unlimited, beyond = (
        model.generate(prompts(config), 20, top_k=top_k, generator=torch.Generator().manual_seed(1))
        for top_k in (0, 41)
    )
    assert torch.equal(unlimited, beyond)
    with pytest.raises(RuntimeError, match="out of range"):
        reference.generate(prompts(config), 2, top_k=41)


@torch.no_grad()
@pytest.mark.launch
def test_samples_follow_the_softmax_of_the_top_k(tiny, build_pair):
    """4000 draws of one token at temperature 2 and top 3: shares within 0.04 of the probabilities (five deviations)."""
    config = tiny()
    model, _ = build_pair(config)
    prompt = prompts(config, rows=1)
    logits = model(prompt)[0, -1]
    likeliest = logits.topk(3).indices
    expected = torch.zeros(40)
    expected[likeliest] = (logits[likeliest] / 2).softmax(0)
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(prompt.expand(4000, -1), 1, temperature=2.0, top_k=3, generator=generator)[:, -1]
    shares = torch.bincount(drawn, minlength=40) / 4000
    assert (shares - expected).abs().max() < 0.04
    assert not shares[expected == 0].any()


def test_stopped_rows_are_padded_and_generation_ends_when_all_have_stopped(tiny, build_pair):
    """Compared with the same rows without a stop token: equal up to the first one, then only stop tokens."""
    config = tiny()
    model, _ = build_pair(config)
    generator = torch.Generator()
    free = model.generate(prompts(config, rows=6), 40, generator=generator.manual_seed(2))
    stop = int(free[:, 9:].flatten().mode().values)  # the token drawn most often
    out = model.generate(prompts(config, rows=6), 40, stop_token=stop, generator=generator.manual_seed(2))
    ends = []
    for row, unstopped in zip(out[:, 9:].tolist(), free[:, 9:].tolist(), strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else len(unstopped)
        ends.append(end)
        assert row[:end] == unstopped[: min(end, len(row))]
        assert set(row[end:]) <= {stop}
    assert out.shape[1] == 9 + max(ends)
    assert min(ends) < max(ends)


def test_generation_fills_the_context_and_no_more(tiny, build_pair):
    config = tiny(max_seq_len=16)
    model, _ = build_pair(config)
    assert model.generate(prompts(config)).shape == (2, 16)
    assert model.generate(prompts(config), 0).shape == (2, 9)
    assert Mythos(tiny(max_output_tokens=5)).generate(prompts(config)).shape == (2, 14)


def test_generation_restores_training_mode(tiny):
    """Dropout is off while generating; afterwards the mode is restored."""
    config = tiny(dropout=0.5)
    model = Mythos(config).train()
    first = model.generate(prompts(config), 6, temperature=0)
    assert torch.equal(first, model.generate(prompts(config), 6, temperature=0))
    assert model.training
    with pytest.raises(UserError):
        model.generate(prompts(config), 1, n_loops=0)
    assert model.training
    model.eval().generate(prompts(config), 1)
    assert not model.training


@pytest.mark.parametrize(
    ("input_ids", "settings", "named"),
    [
        (torch.zeros(1, 4).long(), {"max_new_tokens": 61}, "max_new_tokens=61"),
        (torch.zeros(1, 4).long(), {"max_new_tokens": -1}, "max_new_tokens=-1"),
        (torch.zeros(1, 4).long(), {"temperature": -0.5}, "temperature=-0.5"),
        (torch.zeros(1, 4).long(), {"temperature": float("nan")}, "temperature=nan"),
        (torch.zeros(1, 4).long(), {"top_k": -1}, "top_k=-1"),
        (torch.zeros(1, 4).long(), {"prefill_chunk": 0}, "prefill_chunk=0"),
        (torch.zeros(1, 4).long(), {"n_loops": 0}, "n_loops=0"),
        (torch.tensor([[0, 40]]), {}, "token id 40"),
        (torch.tensor([[-1, 3]]), {}, "token id -1"),
        (torch.zeros(4).long(), {}, "shape"),
        (torch.zeros(1, 0).long(), {}, "shape"),
        (torch.zeros(0, 4).long(), {}, "shape"),
        (torch.zeros(1, 65).long(), {}, "shorten it to at most 63 tokens"),
        (torch.zeros(1, 64).long(), {}, "shorten the prompt"),
        (torch.zeros(1, 4), {}, "dtype torch.float32"),
        (torch.zeros(1, 4).long(), {"temperature": float("inf")}, "temperature=inf"),
        (torch.zeros(1, 4).long(), {"temperature": "hot"}, "temperature='hot'"),
        (torch.zeros(1, 4).long(), {"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        (torch.zeros(1, 4).long(), {"n_loops": 2.5}, "n_loops=2.5 must be a whole number"),
        (torch.zeros(1, 4).long(), {"n_loops": 10**9}, "n_loops=1000000000 must be at most"),
        (torch.zeros(1, 4).long(), {"stop_token": 40}, "stop_token=40"),
    ],
)
def test_errors_name_the_invalid_argument(input_ids, settings, named, tiny):
    with pytest.raises(UserError) as raised:
        Mythos(tiny()).generate(input_ids, **{"max_new_tokens": 2, **settings})
    assert named in str(raised.value)


@pytest.mark.parametrize("temperature", first_is_quick([5e-324, 1e-45, 1e-38, 1e-9]))
def test_tiny_temperatures_are_greedy(temperature, tiny, build_pair):
    """Logits divided by them overflow fp32."""
    config = tiny()
    model, _ = build_pair(config)
    expected = model.generate(prompts(config), 12, temperature=0)
    assert torch.equal(model.generate(prompts(config), 12, temperature=temperature), expected)


@pytest.mark.launch
def test_huge_temperatures_sample_uniformly(tiny, build_pair):
    config = tiny()
    model, _ = build_pair(config)
    new = model.generate(prompts(config, rows=1).expand(2000, -1), 1, temperature=1e308, top_k=2)[:, -1]
    assert torch.unique(new, return_counts=True)[1].tolist() == pytest.approx([1000, 1000], abs=120)  # five deviations


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_non_finite_logits_raise(temperature, tiny, build_pair):
    config = tiny()
    model, _ = build_pair(config)
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        model.generate(torch.zeros(1, 3).long(), 2, temperature=temperature)


def test_one_error_lists_all_invalid_arguments(tiny):
    with pytest.raises(UserError) as raised:
        Mythos(tiny()).generate(torch.tensor([[99]]), 100, temperature=-1, top_k=-1, prefill_chunk=0)
    assert len(raised.value.problems) == 5
