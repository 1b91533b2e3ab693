"""Mixing corpora by weight: position in the mix -> (corpus, position in that corpus), in closed form.

Of the first p positions the first corpus, with share a / b, gets floor(p * a / b): it gets position p if that value
grows from p to p + 1 (a Beatty sequence). The other corpora share the remaining positions in the same way. So in every
prefix each corpus is within `len(weights)` samples of its share, each corpus is read as 0, 1, 2, … without a gap, and
there is no state and no random number. All arithmetic is on integers: p * a / b as a float would be off by one at some
position.

Weights that change are constant within each of a number of parts of the positions. A part is mixed like a mix of its
own, and reads every corpus on from where the part before it ended.

Decisions: DATA-3, DATA-22.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

MAX_TOTAL = 10**9  # of integer weights: finer ratios are rounded to this total
PARTS = 100  # of a change


class MixChange(NamedTuple):
    """Weights change linearly in the position, in `PARTS` steps of equal length."""

    begin: int  # position from which they change
    end: int  # position from which they are `weights`
    weights: Sequence[int]


class Mix:
    """Which corpus each position belongs to."""

    def __init__(self, weights: Sequence[int], change: MixChange | None = None):
        """Integer weights of each corpus, some of which may be 0, but not all."""
        parts = [(0, list(weights))] if change is None else _parts(weights, change)
        self._begins = np.array([begin for begin, _ in parts])  # of each part
        self._weights = [weights for _, weights in parts]
        self._taken = [[0] * len(weights)]  # samples of each corpus before each part
        for begin, end, weights in zip(self._begins, self._begins[1:], self._weights, strict=False):
            counts = _counts(int(end - begin), weights)
            self._taken.append([a + b for a, b in zip(self._taken[-1], counts, strict=True)])

    def corpus_positions(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus at each of `positions`, and the position in that corpus's own endless sequence; all int64 (n,)."""
        corpus, own = np.empty_like(positions), np.empty_like(positions)
        parts = np.searchsorted(self._begins, positions, side="right") - 1
        for part in np.unique(parts).tolist():
            here = parts == part
            used = np.flatnonzero(self._weights[part])  # corpora
            index, within = corpus_positions(
                positions[here] - self._begins[part], [self._weights[part][i] for i in used.tolist()]
            )
            corpus[here] = used[index]
            own[here] = within + np.array(self._taken[part])[corpus[here]]
        return corpus, own

    def positions_before_repeat(self, lengths: Sequence[int]) -> int:
        """The number of positions before any corpus, `lengths[i]` samples long, starts its second epoch."""
        fits = 0  # a number of positions without a repeated sample, by bisection
        step = 1 << (sum(lengths) + 1).bit_length()
        while step:
            if all(n <= length for n, length in zip(self.counts(fits + step), lengths, strict=True)):
                fits += step
            step //= 2
        return fits

    def counts(self, length: int) -> list[int]:
        """Samples of each corpus among the first `length` positions."""
        part = int(np.searchsorted(self._begins, length, side="right")) - 1
        counts = _counts(length - int(self._begins[part]), self._weights[part])
        return [a + b for a, b in zip(self._taken[part], counts, strict=True)]


def _parts(weights: Sequence[int], change: MixChange) -> list[tuple[int, list[int]]]:
    """(first position, weights) of each part of a mix that changes."""
    before, after = ([Fraction(weight, sum(each)) for weight in each] for each in (weights, change.weights))
    parts = [(0, list(weights))]
    for part in range(PARTS):
        begin = change.begin + (change.end - change.begin) * part // PARTS
        done = Fraction(2 * part + 1, 2 * PARTS)  # of the change, in the middle of the part
        parts.append((begin, integer_weights([(1 - done) * a + done * b for a, b in zip(before, after, strict=True)])))
    parts.append((change.end, list(change.weights)))
    nexts = [begin for begin, _ in parts[1:]] + [math.inf]
    return [part for part, after in zip(parts, nexts, strict=True) if part[0] < after]  # the others are empty


def integer_weights(weights: Sequence[float | Fraction]) -> list[int]:
    """The smallest integers in the ratio of `weights`: 0.7 and 0.3 become 7 and 3. Only 0 becomes 0."""
    exact = [Fraction(str(weight)) for weight in weights]  # str: 0.7 as the user wrote it, not the nearest float
    scale = math.lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * scale) for weight in exact]
    if sum(integers) > MAX_TOTAL * math.gcd(*integers):
        total = sum(exact)
        integers = [max(1, round(weight / total * MAX_TOTAL)) if weight else 0 for weight in exact]
    divisor = math.gcd(*integers)
    return [weight // divisor for weight in integers]


def corpus_positions(positions: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The corpus at each of `positions`, and the position in that corpus's own endless sequence; all int64 (n,)."""
    corpus = np.full(len(positions), len(weights) - 1)
    own = positions.copy()
    undecided = np.arange(len(positions))  # those that belong to a later corpus
    left = positions  # of the undecided: the position among the later corpora
    total = sum(weights)  # of the later corpora
    for i, weight in enumerate(weights[:-1]):
        before = _share(left, weight, total)
        mine = _share(left + 1, weight, total) > before
        corpus[undecided[mine]] = i
        own[undecided[mine]] = before[mine]
        left, undecided, total = (left - before)[~mine], undecided[~mine], total - weight
    own[undecided] = left
    return corpus, own


def _counts(length: int, weights: Sequence[int]) -> list[int]:
    """Samples of each corpus among the first `length` positions."""
    counts, total = [], sum(weights)
    for weight in weights:
        counts.append(length * weight // total if weight else 0)
        length, total = length - counts[-1], total - weight
    return counts


def _share(positions: np.ndarray, weight: int, total: int) -> np.ndarray:
    """floor(positions * weight / total), without the product, which may not fit int64."""
    return positions // total * weight + positions % total * weight // total
