"""Requests become batches that hold each of them once, and results survive on disk."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.errors import UserError
from mythos_dist.evaluate.cache import Cache, lock
from mythos_dist.evaluate.requests import (
    Prompt,
    ScoreRequest,
    TokenScores,
    continuation_request,
    pack_windows,
    packed_batch,
    padded_batch,
    plan_batches,
    split_scores,
)

IGNORED = -100
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 100))
def test_batches_hold_each_sequence_once_within_the_token_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@given(LENGTHS)
def test_windows_hold_each_sequence_once_and_are_at_most_twice_the_optimum(lengths):
    """First fit leaves at most one window half empty, so the windows are fewer than twice the tokens need."""
    windows = pack_windows(lengths, 30)
    assert sorted(i for window in windows for i in window) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in window) <= 30 for window in windows)
    assert len(windows) <= 2 * sum(lengths) / 30 + 1


@given(st.data(), LENGTHS)
def test_labels_find_their_way_back_to_their_requests(data, lengths):
    """Padded and packed: a score that encodes (request, position) comes back at that request and position."""
    requests = []
    for i, length in enumerate(lengths):
        scored = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        labels = [100 * i + at if flag else IGNORED for at, flag in enumerate(scored)]
        requests.append(ScoreRequest([i] * length, labels))
    windows = pack_windows(lengths, 30)
    for batch in (padded_batch(requests), packed_batch(windows, requests, len(windows) + 2, 30)):
        scores = torch.zeros(2, sum(label != IGNORED for one in requests for label in one.labels)).double()
        scored = batch.columns >= 0
        assert torch.equal(scored, batch.labels != IGNORED)
        scores[:, batch.columns[scored]] = batch.labels[scored].double().expand(2, -1)
        for one, request in zip(split_scores(scores, requests), requests, strict=True):
            assert one.logprobs == [label for label in request.labels if label != IGNORED]


def test_packed_sequences_are_documents_of_their_own():
    """Two requests, the second of two documents, then padding: four documents in the window."""
    requests = [ScoreRequest([5, 6, 7], [6, 7, 8]), ScoreRequest([1, 2], [2, 3], [0, 1])]
    batch = packed_batch([[0, 1]], requests, 1, 7)
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 2, 3, 3]]
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2, 0, 0]]


def test_a_context_that_is_too_long_loses_its_beginning():
    assert continuation_request([1, 2, 3, 4], [5, 6], 4) == ScoreRequest([2, 3, 4, 5], [IGNORED, IGNORED, 5, 6])
    assert continuation_request([1], [5], 4) == ScoreRequest([1], [5])
    with pytest.raises(UserError, match="continuation of 5 tokens is longer than the context of 4"):
        continuation_request([1], [5] * 5, 4)


def test_the_cache_keeps_results_and_skips_a_line_that_a_kill_has_truncated(tmp_path):
    scored, prompt = ScoreRequest([1, 2], [IGNORED, 3]), Prompt([1, 2], 4)
    cache = Cache(tmp_path)
    results = [(scored.key, TokenScores([-0.1234567890123], [True])), (prompt.key, [7, 8])]
    cache.add(4, results)
    in_memory = cache.get(4, scored.key)
    cache.close()
    file = tmp_path / "loops-4.jsonl"
    file.write_bytes(file.read_bytes() + b'{"key": "x", "logpr')
    again = Cache(tmp_path)
    assert again.get(4, prompt.key) == [7, 8] and again.get(1, prompt.key) is None and again.get(4, "x") is None
    assert again.get(4, scored.key) == in_memory, "an evaluation that was stopped has other scores"
    logprobs, correct = again.get(4, scored.key)
    assert torch.tensor(logprobs).equal(torch.tensor([-0.1234567890123])) and correct == [True]
    again.add(4, [("x", [9])])
    again.close()
    assert Cache(tmp_path).get(4, "x") == [9]
    assert json.loads(file.read_bytes().splitlines()[-1]) == {"key": "x", "tokens": [9]}


def test_keys_differ_for_different_requests():
    """Also where the flattened numbers are the same."""
    requests = [ScoreRequest([1, 2], [2, 3]), ScoreRequest([1, 2], [IGNORED, 3]), ScoreRequest([1, 2], [2, 3], [0, 1])]
    requests += [ScoreRequest([1, 2, 2], [3, 4, 5]), Prompt([1, 2], 3), Prompt([1], 2)]
    assert len({request.key for request in requests}) == len(requests)


def test_two_evaluations_do_not_write_to_one_folder(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(UserError, match="another evaluation writes to"):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()
