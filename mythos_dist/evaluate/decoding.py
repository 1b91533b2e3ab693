"""What approximations of decoding cost: held-out loss over modes of the KV cache and over exits; what drafts save.

Each held-out sequence is decoded token by token as in generation, but the next token is the sequence's own (teacher
forcing). Attention is not restricted to documents, as in generation. So the loss of `cache=all` without exits is that
of a forward pass without document ids, and the others differ by what the approximation costs.

Self-speculation costs nothing: its tokens are those of greedy decoding. It is measured by continuing the first half of
each sequence greedily, because the acceptance of drafts depends on the text that is generated.
"""

# B sequences, S tokens of each, V vocabulary.

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mythos_dist.generate.depth_batch import DepthBatch, RowLoops
from mythos_dist.generate.sampling import Sampling
from mythos_dist.generate.speculate import speculate
from mythos_dist.model.kv_cache import KVCache, cache_bytes_per_token
from mythos_dist.model.mythos import IGNORED, Mythos
from mythos_dist.units import count


class Variant(NamedTuple):
    """A way to decode."""

    cache: str  # model/kv_cache.py
    exit: str | None = None  # generate/exits.py
    threshold: float | None = None

    @property
    def name(self) -> str:
        """Such as `cache=last, exit=kl at 0.0005`."""
        exits = "" if self.exit is None else f", exit={self.exit}"
        return f"cache={self.cache}{exits}" + ("" if self.threshold is None else f" at {self.threshold:g}")


class Drafts(NamedTuple):
    """A way to draft (generate/speculate.py)."""

    loops: int
    tokens: int

    @property
    def name(self) -> str:
        """Such as `4 tokens with 2 loops`."""
        return f"{count(self.tokens, 'token')} with {count(self.loops, 'loop')}"


class Speculated(NamedTuple):
    """The result of drafts."""

    tokens: int  # generated
    drafted: int
    accepted: int
    loops: float  # passes of the looped block per token after a sequence's first

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that greedy decoding chooses as well."""
        return self.accepted / max(1, self.drafted)


class Quality(NamedTuple):
    """The result of a variant."""

    loss: float  # nats, mean over labels
    accuracy: float  # share of labels that have the highest logit
    loops: float  # mean per token
    cache_bytes: int  # per token, in bf16, on one process


@torch.inference_mode()
def decode_sequences(
    model: Mythos,
    inputs: Tensor,
    labels: Tensor,
    n_loops: int,
    variant: Variant,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Quality:
    """Decode sequences, inputs (B, S) with labels (B, S), as one batch. `progress` is called with the tokens done."""
    decoder = _Sequences(model, inputs, n_loops, variant)
    losses = torch.zeros(inputs.shape)
    correct = torch.zeros(inputs.shape, dtype=torch.bool)
    loops = 0
    while decoder.sequences:
        for sequence, position, logits, used in decoder.step():
            label = labels[sequence, position]
            if label != IGNORED:
                losses[sequence, position] = torch.nn.functional.cross_entropy(logits, label)
                correct[sequence, position] = logits.argmax() == label
            loops += used
            progress(1)
    counted = int((labels != IGNORED).sum())
    bytes_per_token = cache_bytes_per_token(model.config, n_loops, variant.cache)
    return Quality(
        float(losses.sum(dtype=torch.float64)) / counted,
        int(correct.sum()) / counted,
        loops / inputs.numel(),
        bytes_per_token,
    )


def speculate_sequences(
    model: Mythos,
    inputs: Tensor,
    n_loops: int,
    drafts: Drafts,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Speculated:
    """Continue the first half of each sequence of inputs (B, S) greedily, by as many tokens as the other half has.

    Raises UserError for drafts that the loops do not allow.
    """
    half = inputs.shape[1] // 2
    sampling = Sampling(max_new_tokens=inputs.shape[1] - half, temperature=0)
    settings = {"n_loops": n_loops, "draft_loops": drafts.loops, "draft_tokens": drafts.tokens}
    results = []
    for sequence in inputs[:, :half].tolist():
        results.append(speculate(model.eval(), None, sequence, sampling, **settings))
        progress(sampling.max_new_tokens)
    tokens = sum(len(one.request.tokens) for one in results)
    loops = sum(one.loops for one in results) / max(1, tokens - len(results))
    return Speculated(tokens, sum(one.drafted for one in results), sum(one.accepted for one in results), loops)


class _Sequences:
    """Sequences in the loops: a row each, until its last token is done."""

    def __init__(self, model: Mythos, inputs: Tensor, n_loops: int, variant: Variant):
        self._inputs = inputs.tolist()
        self._batch = DepthBatch(model.eval(), KVCache(len(inputs), variant.cache))
        self.sequences = list(range(len(inputs)))  # by row
        self._positions = [0] * len(inputs)  # by sequence
        sampling = Sampling(exit=variant.exit, exit_threshold=variant.threshold)
        self._batch.rows = [RowLoops(n_loops, sampling) for _ in self.sequences]

    def step(self) -> list[tuple[int, int, Tensor, int]]:
        """Run loops until a token is done: for each such token its sequence, position, logits (V,) and loops."""
        entering = [i for i, row in enumerate(self._batch.rows) if row.index is None]
        if entering:
            self._batch.enter(entering, [self._token(i) for i in entering], [self.sequences[i] for i in entering])
        while not (done := self._batch.advance()):
            pass
        logits, loops = self._batch.leave(done)
        results = []
        for (row, _), values, used in zip(done, logits, loops, strict=True):
            sequence = self.sequences[row]
            results.append((sequence, self._positions[sequence], values, used))
            self._positions[sequence] += 1
        for row, _ in sorted(done, key=lambda one: one[0], reverse=True):
            if self._positions[self.sequences[row]] == len(self._inputs[0]):
                self._batch.remove(row)
                self.sequences[row] = self.sequences[-1]  # the last row takes its place
                self.sequences.pop()
        return results

    def _token(self, row: int) -> int:
        sequence: Sequence[int] = self._inputs[self.sequences[row]]
        return sequence[self._positions[self.sequences[row]]]
