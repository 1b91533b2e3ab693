"""The engine: requests of a batch get what each gets alone, whenever they join, leave, exit or are cancelled."""

import random

import pytest
import torch
from helpers.greedy import check_greedy
from helpers.selection import first_is_quick

from mythos_dist.config.schema import ActConfig
from mythos_dist.errors import UserError
from mythos_dist.generate.engine import DecodingEngine, Request
from mythos_dist.generate.sampling import Sampling
from mythos_dist.model import KVCache, Mythos

N_LOOPS = 4
GREEDY = Sampling(max_new_tokens=8, temperature=0)


def prompts(count: int, longest: int = 12) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(40) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def decode(model: Mythos, prompt: list[int], sampling: Sampling, **settings) -> Request:
    """One request in an engine of its own."""
    engine = DecodingEngine(model, None, n_loops=N_LOOPS, max_batch=1, **settings)
    request = engine.submit(prompt, sampling)
    engine.run()
    return request


MODELS = [
    {"attn_type": "mla"},
    {"attn_type": "gqa"},
    {"mode": "reference"},
    {"lora": "per_loop"},
    {"initial_state": "e", "loop_signal": True},
    {"kv_sharing": "every:2"},
    {"kv_sharing": "first", "attn_type": "gqa"},
    {"act": ActConfig(mode="safe")},
    {"act": ActConfig(mode="reference")},
    {"act": ActConfig(mode="ponder")},
]


@pytest.mark.parametrize("changes", first_is_quick(MODELS), ids=lambda changes: "-".join(map(str, changes.values())))
def test_requests_at_different_loops_get_what_full_forwards_give(changes, build):
    """Prompts of many lengths with 1, 3 and 4 loops share 5 rows, so rows are at different loops most of the time."""
    model = build(**changes)
    engine = DecodingEngine(model, None, n_loops=N_LOOPS, max_batch=5)
    cases = [(prompt, 1 + i % 8, (1, 3, None)[i % 3]) for i, prompt in enumerate(prompts(14))]
    requests = [
        engine.submit(prompt, Sampling(max_new_tokens=new, temperature=0, n_loops=n)) for prompt, new, n in cases
    ]
    engine.run()
    for request, (prompt, new, n) in zip(requests, cases, strict=True):
        check_greedy(model, prompt, request.tokens, new, n or N_LOOPS)
        assert request.loops == [n or N_LOOPS] * new and request.finish_reason == "length"


@pytest.mark.parametrize("chunk", first_is_quick([3, 512]))
@pytest.mark.parametrize("cache", first_is_quick(["all", "last", "every:2"]))
@pytest.mark.parametrize("exit_", first_is_quick(["latent", None, "kl", "halting"]))
def test_a_request_does_not_depend_on_the_others(cache, exit_, chunk, build):
    """Sampled, with filters, penalties and exits, joining at different steps: the tokens and loops of each alone.
    Rows leave and change places while prompts are read in chunks of 3 tokens."""
    model = build(act=ActConfig(mode="safe"))
    draw = random.Random(0)
    thresholds = {None: None, "latent": 0.25, "kl": 0.003, "halting": 0.8}
    cases = [
        (
            prompt,
            Sampling(
                max_new_tokens=draw.randint(1, 9), temperature=draw.choice([0, 0.7, 1.3]), top_k=draw.choice([0, 5]),
                top_p=draw.choice([1.0, 0.8]), min_p=draw.choice([0.0, 0.1]), seed=i,
                repetition_penalty=draw.choice([1.0, 1.3]), exit=exit_, exit_threshold=thresholds[exit_],
            ),
        )
        for i, prompt in enumerate(prompts(12))
    ]  # fmt: skip
    engine = DecodingEngine(model, None, n_loops=N_LOOPS, max_batch=4, cache=cache, prefill_chunk=chunk)
    requests = []
    for i, case in enumerate(cases):
        requests.append(engine.submit(*case))
        if i % 2:
            engine.step()
    engine.run()
    alone = [decode(model, *case, cache=cache, prefill_chunk=chunk) for case in cases]
    assert [request.tokens for request in requests] == [request.tokens for request in alone]
    assert [request.loops for request in requests] == [request.loops for request in alone]
    used = {loops for request in requests for loops in request.loops[1:]}
    assert used == {N_LOOPS} if exit_ is None else len(used) > 1 and max(used) <= N_LOOPS


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model):
    sampling = Sampling(max_new_tokens=20, seed=3)
    first = decode(model, [1, 2, 3], sampling).tokens
    assert first == decode(model, [1, 2, 3], sampling).tokens
    assert first != decode(model, [1, 2, 3], Sampling(max_new_tokens=20, seed=4)).tokens


def test_step_returns_the_requests_with_new_tokens_and_nothing_when_idle(model):
    engine = DecodingEngine(model, None, n_loops=N_LOOPS, max_batch=2)
    assert engine.step() == []
    requests = [engine.submit(prompt, GREEDY) for prompt in prompts(3)]
    empty = engine.submit([1], Sampling(max_new_tokens=0))
    seen = {id(request): 0 for request in requests}
    while updated := engine.step():
        for request in updated:
            if request is not empty:
                assert len(request.tokens) > seen[id(request)]
                seen[id(request)] = len(request.tokens)
    assert set(seen.values()) == {8} and (empty.tokens, empty.finish_reason) == ([], "length")


def test_a_long_prompt_does_not_hold_up_the_other_rows(model):
    """It is read in 10 chunks of 4 tokens: in each of 9 steps the other rows get a token, in the 10th it gets its own.
    Prompts that fit into what is left of a chunk are read in the same step."""
    engine = DecodingEngine(model, None, n_loops=N_LOOPS, max_batch=5, prefill_chunk=4)
    running = [engine.submit([i, 1, 2], Sampling(max_new_tokens=20, temperature=0)) for i in range(2)]
    engine.step()
    before = [len(request.tokens) for request in running]
    assert before == [2, 2], "the first two prompts are read before anything is decoded"
    long = engine.submit(prompts(1, 12)[0][:1] * 40, GREEDY)
    for step in range(1, 11):
        updated = engine.step()
        assert [len(request.tokens) for request in running] == [n + step for n in before]
        assert (long in updated) == (step == 10) and bool(long.tokens) == (step == 10)
    short = [engine.submit([3, 4], GREEDY), engine.submit([5], GREEDY)]
    engine.step()
    assert all(request.tokens for request in short)
    engine.run()
    for request in [*running, long, *short]:
        new = request.sampling.max_new_tokens
        check_greedy(model, request.prompt, request.tokens, new, N_LOOPS)


def test_a_prompt_that_is_being_read_can_be_cancelled(model):
    """Its rows are free for the next one, and the others' tokens do not change."""
    engine = DecodingEngine(model, None, n_loops=N_LOOPS, max_batch=2, prefill_chunk=4)
    running = engine.submit([1, 2], Sampling(max_new_tokens=30, temperature=0))
    engine.step()
    cancelled = engine.submit([5] * 9, GREEDY)
    engine.step()
    assert len(running.tokens) == 3 and not cancelled.tokens
    engine.cancel(cancelled)
    last = engine.submit([6, 7] * 5, GREEDY)
    engine.run()
    assert (cancelled.finish_reason, cancelled.tokens) == ("cancelled", [])
    for request in (running, last):
        new = request.sampling.max_new_tokens
        check_greedy(model, request.prompt, request.tokens, new, N_LOOPS)


def test_cancelled_requests_free_their_rows(model):
    """Cancelled while running, while waiting, and when finished; the others' tokens do not change."""
    engine = DecodingEngine(model, None, n_loops=N_LOOPS, max_batch=3)
    cases = prompts(6)
    requests = [engine.submit(prompt, GREEDY) for prompt in cases]
    engine.step()
    engine.cancel(requests[0])
    engine.cancel(requests[5])
    engine.run()
    engine.cancel(requests[1])
    reasons = [request.finish_reason for request in requests]
    assert reasons == ["cancelled", "length", "length", "length", "length", "cancelled"]
    for request, prompt in list(zip(requests, cases, strict=True))[1:5]:
        check_greedy(model, prompt, request.tokens, 8, N_LOOPS)
    assert not requests[5].tokens and len(requests[0].tokens) < 8


def test_a_stop_token_ends_a_request(model):
    free = decode(model, [5, 6], GREEDY).tokens
    stop = free[3]
    stopped = decode(model, [5, 6], Sampling(max_new_tokens=8, temperature=0, stop_tokens=(stop,)))
    assert stopped.tokens == free[: free.index(stop) + 1] and stopped.finish_reason == "stop"


def test_logprobs_are_the_models(model):
    """Of the chosen token and of the highest, against a full forward pass; a temperature does not change them."""
    request = decode(model, [7, 8, 9], Sampling(max_new_tokens=4, temperature=2.0, seed=1, logprobs=3))
    with torch.no_grad():
        expected = model(torch.tensor([[7, 8, 9, *request.tokens]]), N_LOOPS)[0].log_softmax(-1)
    assert len(request.logprobs) == 4
    for i, entry in enumerate(request.logprobs):
        row = expected[2 + i]
        assert entry.token == request.tokens[i]
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        assert [value for _, value in entry.top] == pytest.approx(
            row.sort(descending=True).values[:3].tolist(), abs=1e-5
        )


def test_exits_save_loops_and_a_threshold_of_zero_saves_none(model):
    """KL and change of the latent fall with loops, so a higher threshold runs fewer."""
    for exit_ in ("latent", "kl"):
        loops = []
        for threshold in (0.0, 0.05, 100.0):
            sampling = Sampling(max_new_tokens=12, temperature=0, exit=exit_, exit_threshold=threshold)
            loops.append(sum(decode(model, [1, 2, 3], sampling).loops[1:]))
        assert loops[0] == 11 * N_LOOPS and loops[2] == 11 * 2 and loops[0] >= loops[1] >= loops[2]


@torch.no_grad()
def test_an_exited_token_has_its_last_entry_in_the_loops_it_did_not_run(model):
    """All tokens but the prompt exit after two loops: the cache by hand, with the entry of loop 1 in loops 2 and 3."""
    sampling = Sampling(max_new_tokens=5, temperature=0, exit="latent", exit_threshold=100.0)
    request = decode(model, [1, 2, 3], sampling)
    cache = KVCache()
    tokens = [int(model(torch.tensor([[1, 2, 3]]), N_LOOPS, cache=cache)[0, -1].argmax())]
    for position in range(3, 7):
        ids = torch.tensor([tokens[-1:]])
        tokens.append(int(model(ids, 2, cache=cache)[0, -1].argmax()))
        cache.repeat_entry("recurrent.1", ["recurrent.2", "recurrent.3"], 0, position)
    assert request.tokens == tokens and request.loops == [4, 2, 2, 2, 2]


def test_one_error_lists_all_problems_of_a_request(model):
    engine = DecodingEngine(model, None, n_loops=N_LOOPS, max_batch=1)
    bad = Sampling(
        max_new_tokens=-1, temperature=-1, top_k=-1, top_p=0, min_p=2, repetition_penalty=0, n_loops=0, seed=-1,
        stop=("",), stop_tokens=(40,), exit="never", logprobs=-1,
    )  # fmt: skip
    with pytest.raises(UserError) as raised:
        engine.submit([40], bad)
    assert len(raised.value.problems) == 14
    with pytest.raises(UserError, match="needs a model with halting"):
        engine.submit([1], Sampling(exit="halting"))
    with pytest.raises(UserError, match="the prompt has no tokens"):
        engine.submit([], GREEDY)
    with pytest.raises(UserError, match="use all, last, or every:K"):
        DecodingEngine(model, None, n_loops=1, max_batch=1, cache="some")
    assert engine.step() == []
