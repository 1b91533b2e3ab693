"""Attention: document borders, memory, and what the cache holds."""

import pytest
import torch
from helpers.kv_cache import elements_per_token
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos_dist.config.variants import VARIANTS
from mythos_dist.model import KVCache, Mythos, MythosConfig
from mythos_dist.model.attend import attend
from mythos_dist.model.attention import apply_rope, build_context

ATTENTIONS = ["gqa", "mla"]


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_packed_documents_equal_documents_run_alone(attn_type, tiny, build_pair):
    """Each alone starts at position 0; RoPE sees differences only. fp32, angles of other size: 1e-4.

    Without the mask the first document of a row is the same and the later ones see what is not theirs.
    """
    config = tiny(attn_type=attn_type)
    model, _ = build_pair(config)
    model.eval()
    lengths = [[5, 1, 14], [20], [7, 13]]
    input_ids = torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(0))
    ids = [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    packed = model(input_ids, document_ids=torch.stack(ids))
    open_ = model(input_ids)
    for row, parts in enumerate(lengths):
        start = 0
        for n in parts:
            span = slice(start, start + n)
            alone = model(input_ids[row : row + 1, span])[0]
            torch.testing.assert_close(packed[row, span], alone, atol=1e-4, rtol=1e-4)
            close = torch.allclose(open_[row, span], alone, atol=1e-2, rtol=1e-2)
            assert close == (start == 0)
            start += n


def test_equal_ids_in_different_rows_are_different_documents(tiny, build_pair):
    """A row's last document does not continue in the next row."""
    model, _ = build_pair(tiny())
    input_ids = torch.arange(24).view(2, 12)
    borders = torch.tensor([[0] * 4 + [1] * 8, [1] * 6 + [0] * 6])
    both = model(input_ids, document_ids=borders)
    for row in range(2):
        alone = model(input_ids[row : row + 1], document_ids=borders[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_logits_do_not_depend_on_later_tokens(attn_type, tiny, build_pair):
    """Causality by experiment: change token i, and logits before i keep their values, the one at i does not."""
    model, _ = build_pair(tiny(attn_type=attn_type))
    input_ids = torch.arange(10).view(1, 10)
    before = model(input_ids)
    for i in range(10):
        changed = input_ids.clone()
        changed[0, i] = 39
        after = model(changed)
        torch.testing.assert_close(after[:, :i], before[:, :i], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after[:, i], before[:, i], atol=1e-2)


@pytest.mark.parametrize(("d", "v_dim", "kv_heads"), [(8, 8, 2), (12, 8, 4), (6, 10, 4)])
def test_attend_equals_softmax_written_out(d, v_dim, kv_heads):
    """Values narrower and wider than keys, shared heads, and 3 queries after 6 cached tokens; float64 formula."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, d, generator=generator)
    k = torch.randn(2, 9, kv_heads, d, generator=generator)
    v = torch.randn(2, 9, kv_heads, v_dim, generator=generator)
    expected = torch.zeros(2, 9, 4, v_dim, dtype=torch.float64)
    for b in range(2):
        for s in range(9):
            for h in range(4):
                group = h // (4 // kv_heads)
                scores = (k[b, : s + 1, group].double() @ q[b, s, h].double()) / d**0.5
                expected[b, s, h] = scores.softmax(0) @ v[b, : s + 1, group].double()
    expected = expected.flatten(2).float()
    torch.testing.assert_close(attend(q, k, v), expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend(q[:, 6:], k, v), expected[:, 6:].flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_rope_rotates_adjacent_pairs_by_position(tiny):
    """Against sine and cosine of position * theta^(-2i / R), pair by pair."""
    config = tiny(qk_rope_head_dim=6, rope_theta=100.0)
    context = build_context(config, torch.Size((1, 8)), torch.device("cpu"))
    x = torch.randn(1, 8, 1, 6)
    turned = apply_rope(x, context.rope)
    for position in range(8):
        for i in range(3):
            angle = torch.tensor(position * 100.0 ** (-2 * i / 6))
            a, b = x[0, position, 0, 2 * i : 2 * i + 2]
            pair = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])
            torch.testing.assert_close(turned[0, position, 0, 2 * i : 2 * i + 2], pair)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


def largest_tensor(model, input_ids: Tensor) -> int:
    with LargestTensor() as largest:
        model(input_ids).sum().backward()
    return largest.numel


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_no_tensor_grows_with_the_square_of_the_sequence(attn_type, tiny, build_pair):
    """512 tokens, forward and backward: nothing as large as one head's 512 x 512 scores. The reference makes them."""
    config = tiny(attn_type=attn_type, max_seq_len=512)
    ours, reference = build_pair(config)
    input_ids = torch.randint(40, (1, 512), generator=torch.Generator().manual_seed(0))
    assert largest_tensor(ours, input_ids) < 512 * 512
    assert largest_tensor(reference, input_ids) >= 512 * 512


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_the_cache_stores_latents_or_key_value_heads(attn_type, tiny, build_pair):
    """Per token, layer and loop: MLA stores its latent and one rotary key, GQA its key-value heads.

    The reference keeps MLA's rotary key once per head.
    """
    config = tiny(attn_type=attn_type)
    ours, reference = build_pair(config)
    cache, theirs = KVCache(), {}
    input_ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        ours(input_ids, 2, cache=cache)
        reference(input_ids, 2, kv_cache=theirs)
    needed = 12 + 4 if attn_type == "mla" else 2 * 2 * 8  # latent and rotary key; keys and values of two heads of 8
    assert elements_per_token(cache) == dict.fromkeys(("prelude.0", "recurrent.0", "recurrent.1", "coda.0"), needed)
    kept = {name: sum(t[0, 0].numel() for t in entry.values()) for name, entry in theirs.items()}
    assert set(kept.values()) == {12 + 4 * 4 if attn_type == "mla" else needed}


@pytest.mark.parametrize(("qk_norm", "needed"), [(False, 1024 + 64), (True, 1024 + 64 + 128)])
def test_the_cache_of_the_largest_variant_is_a_seventh_of_the_references_or_less(qk_norm, needed):
    """1t: latent and one rotary key, with qk_norm a scale for each of 128 heads; expanded rotary keys would make it
    1024 + 128 * 64."""
    config = MythosConfig(**VARIANTS["1t"] | {"prelude_layers": 0, "coda_layers": 0, "qk_norm": qk_norm})
    cache = KVCache()
    with torch.device("meta"):
        Mythos(config).bfloat16()(torch.zeros(1, 2, dtype=torch.long), 1, cache=cache)
    assert elements_per_token(cache) == {"recurrent.0": needed}
    assert needed * 7 < 1024 + 128 * 64
