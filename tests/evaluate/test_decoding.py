"""Sequences decoded token by token, against forward passes over full sequences."""

import pytest
import torch
import torch.nn.functional as F
from helpers.selection import first_is_quick

from mythos_dist.errors import UserError
from mythos_dist.evaluate.decoding import Drafts, Quality, Variant, decode_sequences, speculate_sequences
from mythos_dist.evaluate.decoding_command import parse_drafts
from mythos_dist.model import Mythos, MythosConfig
from mythos_dist.parallel.tensor import IGNORED

CONFIG = dict(
    vocab_size=50, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=32, max_loop_iters=6, prelude_layers=1, coda_layers=1,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_experts=4,
    n_shared_experts=1, n_experts_per_tok=2, expert_dim=16, lora_rank=4,
)  # fmt: skip


@pytest.fixture(scope="module", params=["mla", "gqa"])
def model(request) -> Mythos:
    return drawn(Mythos(MythosConfig(**CONFIG, attn_type=request.param), seed=1))


@torch.no_grad()
def drawn(model: Mythos) -> Mythos:
    """With larger weights, so that loops make a difference."""
    for parameter in model.parameters():
        parameter *= 3 if parameter.dim() > 1 else 1
    return model.eval()


@pytest.fixture(scope="module")
def sequences() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(50, (5, 13), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[1, 3:5] = labels[4, 0] = IGNORED
    return ids[:, :-1], labels


def expected(model: Mythos, inputs: torch.Tensor, labels: torch.Tensor, n_loops: int) -> tuple[float, float]:
    """Loss and accuracy by torch's cross entropy over a forward pass without a cache."""
    with torch.no_grad():
        logits = model(inputs, n_loops)
    right = (logits.argmax(-1) == labels)[labels != IGNORED]
    return float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)), float(
        right.float().mean()
    )


def check(quality: Quality, loss: float, accuracy: float, loops: float) -> None:
    assert quality.loss == pytest.approx(loss, rel=1e-5)
    assert quality.accuracy == pytest.approx(accuracy) and quality.loops == loops


@pytest.mark.parametrize("variant", [Variant("all"), Variant("all", "latent", 0.0), Variant("every:1")])
def test_without_approximation_the_loss_is_that_of_a_forward_pass(model, sequences, variant):
    check(decode_sequences(model, *sequences, 5, variant), *expected(model, *sequences, 5), 5)


@pytest.mark.parametrize("exit", first_is_quick(["latent", "kl"]))
@pytest.mark.parametrize("cache", first_is_quick(["all", "every:2", "last"]))
def test_where_every_token_exits_after_two_loops_the_loss_is_that_of_two_loops(model, sequences, exit, cache):
    """With every cache: the entries of two loops are those of a model that runs two."""
    quality = decode_sequences(model, *sequences, 6, Variant(cache, exit, 1e9))
    two = decode_sequences(model, *sequences, 2, Variant(cache))
    check(quality, two.loss, two.accuracy, 2)
    if cache == "all":
        check(quality, *expected(model, *sequences, 2), 2)


@pytest.mark.launch  # decodes each sequence twice
def test_tokens_that_exit_at_different_loops_are_each_counted_once(model, sequences):
    """Rows of a batch are then at different tokens; alone, each sequence has the same loss."""
    variant = Variant("last", "kl", 2e-4)
    together = decode_sequences(model, *sequences, 6, variant)
    assert 2 < together.loops < 6
    counts = (sequences[1] != IGNORED).sum(1).tolist()
    alone = [decode_sequences(model, sequences[0][i : i + 1], sequences[1][i : i + 1], 6, variant) for i in range(5)]
    loss = sum(one.loss * n for one, n in zip(alone, counts, strict=True)) / sum(counts)
    assert together.loss == pytest.approx(loss, rel=1e-5)
    assert together.loops == pytest.approx(sum(one.loops for one in alone) / 5)


@pytest.mark.launch
def test_a_shared_cache_is_smaller_and_changes_the_loss(model, sequences):
    results = {cache: decode_sequences(model, *sequences, 6, Variant(cache)) for cache in ("all", "every:3", "last")}
    layers = {cache: one.cache_bytes for cache, one in results.items()}
    assert layers["all"] / 8 == layers["every:3"] / 4 == layers["last"] / 3  # prelude, coda, and 6, 2 or 1 entries
    assert len({one.loss for one in results.values()}) == 3


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.launch
def test_drafts_are_counted_as_greedy_decoding_would_choose_them(attention, sequences):
    """Of each sequence, 6 tokens after its first 6, drafted one at a time: a draft is accepted if the model with the
    draft's loops has the same most likely token, by forward passes over the tokens so far. Without a coda, whose
    entries of earlier tokens are those of all loops."""
    model = drawn(Mythos(MythosConfig(**CONFIG | {"coda_layers": 0}, attn_type=attention), seed=1))
    found = speculate_sequences(model, sequences[0], 6, Drafts(2, 1))
    agreed = 0
    for sequence in sequences[0]:
        greedy = model.generate(sequence[None, :6], 6, n_loops=6, temperature=0)
        for end in range(7, 12):  # reading the prompt gives the first token
            with torch.no_grad():
                draft, full = (int(model(greedy[:, :end], n)[0, -1].argmax()) for n in (2, 6))
            assert full == greedy[0, end]
            agreed += draft == full
    assert (found.tokens, found.drafted, found.accepted) == (30, 25, agreed) and 0 < agreed < 25
    assert found.acceptance == agreed / 25 and found.loops == 6, "2 loops for a draft, 4 to verify it"


def test_drafts_are_parsed_with_all_problems():
    assert parse_drafts("1:4, 2:8,1:4") == [Drafts(1, 4), Drafts(2, 8)] and parse_drafts("") == []
    with pytest.raises(UserError, match=r"names '3'[\s\S]*names 'a:b'"):
        parse_drafts("3,a:b,1:2")
