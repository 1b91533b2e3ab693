"""Built-in tasks: perplexity on held-out sequences by the position of a token, and by the length of its document.

perplexity = exp(sum of losses / tokens). Its standard error is that of a ratio of sums over sequences (or documents),
by the delta method: the tokens of a sequence are not independent.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mythos_dist.data.stream import MicroBatch
from mythos_dist.evaluate.report import Score
from mythos_dist.evaluate.requests import ScoreRequest
from mythos_dist.evaluate.scorer import Scorer
from mythos_dist.parallel.tensor import IGNORED


class HeldOutSequences(NamedTuple):
    """Held-out sequences, and how they are read."""

    batches: Sequence[MicroBatch]
    eos_id: int
    document_mask: bool  # whether attention is restricted to documents, as in training


class Group(NamedTuple):
    """Tokens of a sequence."""

    first: float  # position or length: groups are in this order
    label: str
    members: np.ndarray  # bool (S,)


def _range(first: int) -> str:
    return f"{first}-{2 * first - 1}" if first > 1 else str(first)


def requests_of(sequences: HeldOutSequences) -> list[ScoreRequest]:
    """A request per sequence."""
    requests = []
    for batch in sequences.batches:
        fields = batch.input_ids.tolist(), batch.final_labels.tolist(), batch.document_ids.tolist()
        for ids, labels, documents in zip(*fields, strict=True):
            requests.append(ScoreRequest(ids, labels, documents if sequences.document_mask else None))
    return requests


def evaluate_perplexity(name: str, sequences: HeldOutSequences, scorer: Scorer, n_loops: int) -> list[Score]:
    """Perplexity of a built-in task's groups of tokens at one number of loops."""
    requests = requests_of(sequences)
    # Of each sequence or document of a group: (sum of losses, tokens).
    groups: dict[tuple[float, str], list[tuple[float, int]]] = {}
    documents = np.concatenate([batch.document_ids.numpy() for batch in sequences.batches])
    for request, result, ids in zip(requests, scorer.score(requests, n_loops), documents, strict=True):
        scored = np.asarray(request.labels) != IGNORED
        losses = np.zeros(len(scored))
        losses[scored] = np.negative(result.logprobs)
        for first, label, members in TASKS[name](np.asarray(request.inputs), ids, sequences.eos_id):
            counted = members & scored
            if counted.any():
                groups.setdefault((first, label), []).append((float(losses[counted].sum()), int(counted.sum())))
    return [_score(name, label, groups[first, label]) for first, label in sorted(groups)]


def by_position(inputs: np.ndarray, documents: np.ndarray, eos_id: int) -> Iterator[Group]:
    """Tokens by their position in the sequence, from 0, in ranges that double."""
    positions = np.arange(len(inputs))
    yield Group(0, "position 0", positions == 0)
    first = 1
    while first < len(inputs):
        yield Group(first, f"position {_range(first)}", (positions >= first) & (positions < 2 * first))
        first *= 2


def by_document_length(inputs: np.ndarray, documents: np.ndarray, eos_id: int) -> Iterator[Group]:
    """Documents by their number of tokens with EOS, in ranges that double; those that do not begin and end in the
    sequence have a group of their own. The label of EOS, the first token of the next document, is not counted."""
    for document in np.unique(documents):
        members = documents == document
        counted = members & (inputs != eos_id)
        if document == 0 or inputs[members][-1] != eos_id:
            yield Group(math.inf, "cut documents", counted)
            continue
        first = 1 << (int(members.sum()).bit_length() - 1)
        yield Group(first, f"{_range(first)} {'token' if first == 1 else 'tokens'}", counted)


TASKS: dict[str, Callable[[np.ndarray, np.ndarray, int], Iterator[Group]]] = {
    "perplexity_by_position": by_position,
    "perplexity_by_document_length": by_document_length,
}


def _score(task: str, label: str, parts: list[tuple[float, int]]) -> Score:
    losses, tokens = np.array(parts).T
    mean, perplexity = losses.sum() / tokens.sum(), math.inf
    if mean < 700:  # exp(710) overflows
        perplexity = math.exp(mean)
    stderr = None
    if len(parts) > 1:
        residuals = losses - mean * tokens
        spread = math.sqrt(len(parts) / (len(parts) - 1) * np.square(residuals).sum()) / tokens.sum()
        stderr = perplexity * spread
    return Score(task, f"perplexity, {label}", perplexity, stderr, int(tokens.sum()), task.replace("_", " "), label)
