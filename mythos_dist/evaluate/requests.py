"""What an evaluation asks of a model: sequences whose labels are scored, and prompts to continue; and their batches.

Log-likelihoods need no padding mask: attention is causal, so what follows a sequence does not change its scores. A
model alone computes batches of similar length, padded on the right. A run computes windows of one shape, because that
is what its pipeline stages exchange: sequences are packed into them as documents.

Decisions: EVALUATION-1.
"""

# B batch, S sequence.

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mythos_dist.errors import UserError
from mythos_dist.parallel.tensor import IGNORED


class ScoreRequest(NamedTuple):
    """A sequence of which some labels are scored."""

    inputs: Sequence[int]  # token ids
    labels: Sequence[int]  # as many: the token after each input; IGNORED: not scored
    documents: Sequence[int] | None = None  # as many: equal within a document, ascending; None: one document

    @property
    def key(self) -> str:
        """Identifies the request in a cache."""
        return _hash("score", self.inputs, self.labels, self.documents or ())


class TokenScores(NamedTuple):
    """The scores of a request's labels, without the ignored ones."""

    logprobs: list[float]  # natural logarithms of the labels' probabilities
    correct: list[bool]  # whether the label has the highest logit

    @property
    def total(self) -> float:
        """The log-likelihood of all labels together."""
        return float(np.sum(self.logprobs, dtype=np.float64)) if self.logprobs else 0.0


class Prompt(NamedTuple):
    """Tokens to continue greedily."""

    tokens: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()  # texts that end it; the tokens go up to the one that completes such a text

    @property
    def key(self) -> str:
        """Identifies the request in a cache."""
        return _hash("generate", self.tokens, (self.max_new_tokens,), *(list(text.encode()) for text in self.stop))


def _hash(kind: str, *parts: Sequence[int]) -> str:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + np.asarray(part, dtype="<i8").tobytes())
    return digest.hexdigest()[:32]


def continuation_request(context: Sequence[int], continuation: Sequence[int], max_length: int) -> ScoreRequest:
    """Score `continuation` after `context`, which loses its beginning where both are longer than max_length + 1.

    Raises UserError if the continuation alone is too long.
    """
    if len(continuation) > max_length:
        raise UserError(
            f"a continuation of {len(continuation)} tokens is longer than the context of {max_length} tokens; "
            "shorten the texts of the task, or evaluate a model with a longer context"
        )
    tokens = [*context, *continuation][-(max_length + 1) :]
    first = len(tokens) - len(continuation) - 1
    return ScoreRequest(tokens[:-1], [IGNORED] * first + tokens[1 + first :])


class ScoreBatch(NamedTuple):
    """Sequences for one forward pass."""

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64
    document_ids: Tensor  # (B, S) int32
    columns: Tensor  # (B, S) int64: the index of a label among all scored labels of the requests; -1: not scored


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences for each batch, the longest first; a batch has at most `batch_tokens` tokens with padding,
    or one sequence. The same lengths give the same batches."""
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def padded_batch(requests: Sequence[ScoreRequest]) -> ScoreBatch:
    """One sequence a row, padded on the right to the longest."""
    return _fill([[i] for i in range(len(requests))], requests, len(requests), max(len(r.inputs) for r in requests))


def pack_windows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Indices of sequences for each window of `seq_len` tokens: each goes to the first window with room, the longest
    first. The same lengths give the same windows."""
    windows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((w for w, free in enumerate(room) if free >= lengths[i]), len(windows))
        if at == len(windows):
            windows.append([])
            room.append(seq_len)
        windows[at].append(i)
        room[at] -= lengths[i]
    return windows


def packed_batch(
    windows: Sequence[Sequence[int]], requests: Sequence[ScoreRequest], rows: int, seq_len: int
) -> ScoreBatch:
    """A window a row, filled with rows of padding up to `rows`."""
    return _fill(windows, requests, rows, seq_len)


def _fill(windows: Sequence[Sequence[int]], requests: Sequence[ScoreRequest], rows: int, seq_len: int) -> ScoreBatch:
    ids, labels = np.zeros((rows, seq_len), np.int64), np.full((rows, seq_len), IGNORED, np.int64)
    documents, columns = np.zeros((rows, seq_len), np.int32), np.full((rows, seq_len), -1, np.int64)
    first_columns = np.cumsum([0, *(_num_scored(request) for request in requests)])
    for row, window in enumerate(windows):
        at = document = 0
        for i in window:
            request = requests[i]
            here = slice(at, at + len(request.inputs))
            ids[row, here], labels[row, here] = request.inputs, request.labels
            documents[row, here] = document + (0 if request.documents is None else np.asarray(request.documents))
            scored = labels[row, here] != IGNORED
            columns[row, here][scored] = first_columns[i] + np.arange(scored.sum())
            at, document = here.stop, int(documents[row, here.stop - 1]) + 1
        documents[row, at:] = document
    return ScoreBatch(*map(torch.from_numpy, (ids, labels, documents, columns)))


def split_scores(scores: Tensor, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
    """(2, scored labels) of `Engine.score_tokens` -> the scores of each request."""
    logprobs, correct = scores.cpu().numpy()
    ends = np.cumsum([_num_scored(request) for request in requests])[:-1]
    parts = zip(np.split(logprobs, ends), np.split(correct > 0, ends), strict=True)
    return [TokenScores(one.tolist(), flags.tolist()) for one, flags in parts]


def _num_scored(request: ScoreRequest) -> int:
    return sum(label != IGNORED for label in request.labels)


def num_scored(requests: Sequence[ScoreRequest]) -> int:
    """Scored labels of all requests."""
    return sum(map(_num_scored, requests))
