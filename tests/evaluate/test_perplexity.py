"""The built-in tasks: perplexities of groups of tokens, and their standard errors."""

import math
import statistics

import numpy as np
import pytest
import torch

from mythos_dist.data.stream import MicroBatch
from mythos_dist.evaluate.perplexity import HeldOutSequences, by_document_length, by_position, evaluate_perplexity
from mythos_dist.evaluate.requests import TokenScores


class Known:
    """A scorer with the log-probability -(position + 1) / 10 for each label, plus 1 for the second sequence."""

    max_length = 8

    def score(self, requests, n_loops):
        rows = [[-(at + 1) / 10 - row for at in range(len(one.labels))] for row, one in enumerate(requests)]
        return [TokenScores(row, [True] * len(row)) for row in rows]


def sequences(documents):
    ids = torch.arange(16).view(2, 8)
    rows = torch.tensor(documents, dtype=torch.int32)
    return HeldOutSequences([MicroBatch(ids, ids + 1, rows, torch.arange(2))], eos_id=99, document_mask=True)


def test_perplexity_by_position_is_exp_of_the_mean_loss_of_a_range():
    """Positions 4 to 7 of two sequences: losses 0.5 to 0.8, and 1.5 to 1.8. The delta method for equal sizes is the
    standard error of the sequences' means."""
    scores = {
        one.line: one for one in evaluate_perplexity("perplexity_by_position", sequences([[0] * 8] * 2), Known(), 1)
    }
    assert list(scores) == ["position 0", "position 1", "position 2-3", "position 4-7"]
    last = scores["position 4-7"]
    assert last.value == pytest.approx(math.exp(1.15)) and last.samples == 8
    expected = statistics.stdev([0.65, 1.65]) / math.sqrt(2) * math.exp(1.15)
    assert last.stderr == pytest.approx(expected)


def test_documents_are_grouped_by_length_and_cut_ones_apart():
    eos = 9
    inputs = np.array([1, 9, 1, 1, 9, 9, 1, 1])
    documents = np.array([0, 0, 1, 1, 1, 2, 3, 3])
    groups = [(one.label, one.members.tolist()) for one in by_document_length(inputs, documents, eos)]
    not_eos = (inputs != eos).tolist()
    expected = ["cut documents", "2-3 tokens", "1 token", "cut documents"]
    assert [label for label, _ in groups] == expected
    for document, (_, members) in enumerate(groups):
        assert members == [flag and of == document for flag, of in zip(not_eos, documents, strict=True)]


def test_positions_are_covered_once():
    for size in (1, 2, 3, 8, 31):
        members = [one.members for one in by_position(np.zeros(size), np.zeros(size), 0)]
        assert np.array_equal(np.sum(members, axis=0), np.ones(size))
