"""Mixing corpora by weight: position in the mix -> (corpus, position in that corpus), in closed form.

Of the first p positions the first corpus, with share a / b, gets floor(p * a / b): it gets position p if that value
grows from p to p + 1 (a Beatty sequence). The other corpora share the remaining positions in the same way. So in every
prefix each corpus is within `len(weights)` samples of its share, each corpus is read as 0, 1, 2, … without a gap, and
there is no state and no random number. All arithmetic is on integers: p * a / b as a float would be off by one at some
position.

Decisions: DATA-3.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

MAX_TOTAL = 10**9  # of integer weights: finer ratios are rounded to this total


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the ratio of `weights`: 0.7 and 0.3 become 7 and 3. None is 0."""
    exact = [Fraction(str(weight)) for weight in weights]  # str: 0.7 as the user wrote it, not the nearest float
    scale = math.lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * scale) for weight in exact]
    if sum(integers) > MAX_TOTAL * math.gcd(*integers):
        total = sum(exact)
        integers = [max(1, round(weight / total * MAX_TOTAL)) for weight in exact]
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


def positions_before_repeat(lengths: Sequence[int], weights: Sequence[int]) -> int:
    """The number of positions before any corpus, `lengths[i]` samples long, starts its second epoch."""
    fits = 0  # a number of positions without a repeated sample, by bisection
    step = 1 << (sum(lengths) + 1).bit_length()
    while step:
        if all(n <= length for n, length in zip(_counts(fits + step, weights), lengths, strict=True)):
            fits += step
        step //= 2
    return fits


def _counts(length: int, weights: Sequence[int]) -> list[int]:
    """Samples of each corpus among the first `length` positions."""
    counts, total = [], sum(weights)
    for weight in weights:
        counts.append(length * weight // total)
        length, total = length - counts[-1], total - weight
    return counts


def _share(positions: np.ndarray, weight: int, total: int) -> np.ndarray:
    """floor(positions * weight / total), without the product, which may not fit int64."""
    return positions // total * weight + positions % total * weight // total
