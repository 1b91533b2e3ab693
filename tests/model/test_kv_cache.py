"""The key-value cache: rows of different lengths, latents without expansion, loops that share entries, bytes."""

import pytest
import torch
from helpers.kv_cache import elements_per_token
from helpers.selection import first_is_quick
from torch import Tensor

from mythos_dist.errors import UserError
from mythos_dist.model import KVCache, Mythos, MythosConfig, attention
from mythos_dist.model.attention_sizes import attention_sizes
from mythos_dist.model.kv_cache import cache_bytes_per_token, loops_per_entry

LOOPS = 4
SHAPES = [("gqa", False), ("gqa", True), ("mla", False), ("mla", True)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}-{'qk_norm' if shape[1] else 'plain'}")
def model(request, tiny, enliven) -> Mythos:
    attn_type, qk_norm = request.param
    return enliven(Mythos(tiny(attn_type=attn_type, qk_norm=qk_norm))).eval()


def random_ids(rows: int, length: int) -> Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunks", first_is_quick([(4, 5, 7), (16,), (9, 1, 1, 1, 1, 1, 1, 1), (14, 2), (1,) * 16]))
@torch.no_grad()
def test_any_chunks_equal_the_full_forward(chunks, model):
    """fp32: only the order of summation differs."""
    input_ids = random_ids(3, 16)
    cache = KVCache()
    parts = [model(part, LOOPS, cache=cache) for part in input_ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids, LOOPS), atol=1e-5, rtol=1e-5)
    assert cache.lengths == [16] * 3


@torch.no_grad()
def test_a_prompt_of_a_model_with_narrow_latents_is_causal(tiny, enliven):
    """Attention to latents, cheaper here even for a prompt, saw later tokens."""
    model = enliven(Mythos(tiny(kv_lora_rank=2, qk_nope_head_dim=64, v_head_dim=64))).eval()
    input_ids = random_ids(2, 7)
    torch.testing.assert_close(model(input_ids, LOOPS, cache=KVCache()), model(input_ids, LOOPS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("new_tokens", [1, 3])
@torch.no_grad()
def test_rows_of_different_lengths_equal_each_row_alone(new_tokens, model):
    """Prompts of 3, 9 and 6 tokens, padded on the right with other tokens, then more tokens for all; per row against a
    full forward without a cache."""
    lengths, ids = [3, 9, 6], random_ids(3, 9 + 3 * new_tokens)
    prompt = random_ids(3, 18)[:, 9:].clone()
    for row, length in enumerate(lengths):
        prompt[row, :length] = ids[row, :length]
    cache = KVCache()
    first = model(prompt, LOOPS, cache=cache)
    cache.lengths = lengths
    logits = [[first[row, :length]] for row, length in enumerate(lengths)]
    for i in range(3):
        starts = [length + i * new_tokens for length in lengths]
        new = torch.stack([ids[row, start : start + new_tokens] for row, start in enumerate(starts)])
        for row, part in enumerate(model(new, LOOPS, cache=cache)):
            logits[row].append(part)
    assert cache.lengths == [length + 3 * new_tokens for length in lengths]
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, : length + 3 * new_tokens], LOOPS)[0]
        torch.testing.assert_close(torch.cat(logits[row]), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@torch.no_grad()
def test_selected_and_moved_rows_keep_their_tokens(order, model):
    """Row 2 of a pool is read alone, moved over row 0, and continued there beside row 1; buffers grow in between. Rows
    in another order than the pool's are gathered."""
    ids = random_ids(2, 30)
    pool = KVCache(rows=3)
    model(ids[:1, :4], LOOPS, cache=pool.select([1]))
    model(ids[1:, :7], LOOPS, cache=pool.select([2]))
    pool.move_row(2, 0)
    both = pool.select(order)
    assert pool.lengths == [7, 4, 7] and both.lengths == [pool.lengths[row] for row in order]
    new = torch.stack([ids[1, 7:27], ids[0, 4:24]])
    last = model(new[order], LOOPS, cache=both)[:, -1]
    assert pool.lengths == [27, 24, 7]
    alone = [model(ids[1:, :27], LOOPS)[0, -1], model(ids[:1, :24], LOOPS)[0, -1]]
    torch.testing.assert_close(last, torch.stack(alone)[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_latents_are_attended_to_without_expanding_the_cache(qk_norm, tiny, enliven, monkeypatch):
    """One new token after 40: no product of kv_up with 41 rows; with expansion forced the logits are the same."""
    model = enliven(Mythos(tiny(qk_norm=qk_norm))).eval()
    ids, expanded = random_ids(2, 41), []
    hooks = [
        layer.kv_up.register_forward_hook(lambda module, args, out: expanded.append(args[0].shape[0]))
        for layer in model.modules()
        if isinstance(layer, attention.MLAttention)
    ]

    def last(limit: int) -> Tensor:
        cache = KVCache()
        model(ids[:, :40], LOOPS, cache=cache)
        expanded.clear()
        monkeypatch.setattr(attention, "MAX_SCORES", limit)
        return model(ids[:, 40:], LOOPS, cache=cache)

    absorbed = last(1 << 20)
    assert not expanded
    torch.testing.assert_close(absorbed, last(0), atol=1e-5, rtol=1e-5)
    assert expanded == [2 * 41] * (LOOPS + 2)
    for hook in hooks:
        hook.remove()


def entries_of_loops(model: Mythos, mode: str) -> list[str]:
    cache = KVCache(mode=mode)
    model(random_ids(1, 5), LOOPS, cache=cache)
    return [key for key in elements_per_token(cache) if key.startswith("recurrent")]


@torch.no_grad()
def test_modes_keep_an_entry_for_one_loop_for_k_loops_or_for_all(tiny, enliven):
    """Entries by mode; with one loop per entry every mode is exact."""
    model = enliven(Mythos(tiny())).eval()
    assert [len(entries_of_loops(model, mode)) for mode in ("all", "every:1", "every:3", "every:4", "last")] == [
        4, 4, 2, 1, 1,
    ]  # fmt: skip
    ids = random_ids(1, 9)
    cache = KVCache(mode="last")
    parts = [model(part, 1, cache=cache) for part in ids.split((5, 1, 3), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_a_shared_entry_loops_read_earlier_tokens_last_loop(tiny, enliven):
    """By hand: a cache of all loops whose entries of earlier tokens are all replaced by those of the last loop."""
    model = enliven(Mythos(tiny())).eval()
    ids = random_ids(1, 6)
    shared, replaced = KVCache(mode="last"), KVCache()
    for cache in (shared, replaced):
        model(ids[:, :5], LOOPS, cache=cache)
    for position in range(5):
        replaced.repeat_entry("recurrent.3", [f"recurrent.{t}" for t in range(3)], 0, position)
    expected = model(ids[:, 5:], LOOPS, cache=replaced)
    torch.testing.assert_close(model(ids[:, 5:], LOOPS, cache=shared), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, model(ids, LOOPS)[:, 5:], atol=1e-3)


@pytest.mark.parametrize("mode", ["", "every", "every:0", "every:513", "every:-1", "first", "every:1.5"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(UserError, match="use all, last, or every:K"):
        KVCache(mode=mode)
    assert loops_per_entry("every:512") == 512


@pytest.mark.parametrize("mode", ["all", "last", "every:3"])
@torch.no_grad()
def test_the_cache_has_the_bytes_of_the_closed_formula(mode, model):
    cache = KVCache(mode=mode)
    model(random_ids(1, 5), LOOPS, cache=cache)
    held = elements_per_token(cache)
    assert set(held.values()) == {attention_sizes(model.config).cached}
    assert 4 * sum(held.values()) == cache_bytes_per_token(model.config, LOOPS, mode, element_bytes=4)


def test_bytes_of_the_largest_variant():
    """1t: (64 loops + 12 layers) x 1,088 values x 2 bytes, and 13 entries if all loops share one."""
    config = MythosConfig(
        attn_type="mla", dim=16384, n_heads=128, n_kv_heads=16, kv_lora_rank=1024, qk_rope_head_dim=64,
        prelude_layers=6, coda_layers=6, qk_norm=False,
    )  # fmt: skip
    assert cache_bytes_per_token(config, 64) == 76 * 1088 * 2
    assert cache_bytes_per_token(config, 64, "last") == 13 * 1088 * 2
