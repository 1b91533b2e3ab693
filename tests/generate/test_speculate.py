"""Self-speculation: the tokens of greedy decoding, for fewer passes of the looped block."""

import random

import pytest
import torch
from helpers.greedy import check_greedy
from helpers.selection import first_is_quick

from mythos_dist.config.schema import ActConfig
from mythos_dist.errors import UserError
from mythos_dist.generate.sampling import Sampling
from mythos_dist.generate.speculate import speculate

GREEDY = Sampling(max_new_tokens=12, temperature=0)


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(2)
    return [[draw.randrange(40) for _ in range(draw.randint(1, 12))] for _ in range(count)]


@torch.no_grad()
def greedy(model, prompt: list[int], n_loops: int, new: int) -> list[int]:
    """By full forward passes without a cache."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens]), n_loops)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.launch
@pytest.mark.parametrize("count", [45, pytest.param(200, marks=pytest.mark.long)])  # three of each pair
def test_prompts_give_the_tokens_of_greedy_decoding(model, count):
    """Drafts of one to three loops and one to five tokens; loops are counted as they were run."""
    drafted = accepted = 0
    for i, prompt in enumerate(prompts(count)):
        draft_loops, draft_tokens = 1 + i % 3, 1 + i % 5
        result = speculate(model, None, prompt, GREEDY, n_loops=4, draft_loops=draft_loops, draft_tokens=draft_tokens)
        check_greedy(model, prompt, result.request.tokens, 12, 4)
        assert result.request.finish_reason == "length"
        assert 0 <= result.accepted <= result.drafted
        rounds = (result.loops - draft_loops * result.drafted) / (4 - draft_loops)
        assert rounds == int(rounds) and -(-11 // draft_tokens) <= rounds <= 11
        drafted, accepted = drafted + result.drafted, accepted + result.accepted
    assert 0 < accepted < drafted


@pytest.mark.parametrize(
    "changes",
    first_is_quick(
        [
            {"attn_type": "gqa"},
            {"mode": "reference"},
            {"kv_sharing": "every:2"},
            {"act": ActConfig(mode="safe")},
            {"act": ActConfig(mode="ponder")},
            {"lora": "per_loop", "loop_signal": True},
        ]
    ),
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_models_give_the_tokens_of_greedy_decoding(changes, build):
    model = build(**changes)
    for prompt in prompts(8):
        result = speculate(model, None, prompt, GREEDY, n_loops=4, draft_loops=2, draft_tokens=3)
        check_greedy(model, prompt, result.request.tokens, 12, 4)


def test_drafts_that_agree_save_loops(build):
    """A model whose later loops change nothing, as its block and injection add zeros and the decay scales all channels
    alike: every draft is right, so all 11 tokens after the first take one draft each and one verification together."""
    model = build(lora="none", initial_state="e")
    with torch.no_grad():
        for name, value in model.recurrent.named_parameters():
            if name.endswith(("wo.weight", "ffn.shared.down.weight", "w2", "injection.B.weight")):
                value.zero_()
            if name.endswith(("log_A", "delta")):
                value.zero_()
    result = speculate(model, None, [1, 2, 3], GREEDY, n_loops=4, draft_loops=1, draft_tokens=11)
    assert result.request.tokens == greedy(model, [1, 2, 3], 4, 12)
    assert result.accepted == result.drafted == 11
    assert result.loops == 11 + 3 and result.loops_per_token == pytest.approx(14 / 11)


def test_a_stop_token_among_the_drafts_ends_the_request(model):
    free = greedy(model, [5, 6], 4, 12)
    stop = free[5]
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_tokens=(stop,))
    result = speculate(model, None, [5, 6], sampling, n_loops=4, draft_loops=3, draft_tokens=5)
    assert result.request.tokens == free[: free.index(stop) + 1] and result.request.finish_reason == "stop"


def test_one_error_lists_all_problems(model):
    with pytest.raises(UserError) as raised:
        sampling = Sampling(exit="latent", temperature=1.0)
        speculate(model, None, [], sampling, n_loops=4, draft_loops=4, draft_tokens=0)
    assert len(raised.value.problems) == 6
