"""Several corpora dealt out by weight: position of the mix -> (corpus, position in that corpus), in closed form.

Of the first p positions the first corpus, with share a / b, takes floor(p * a / b); position p is its if that number
grows there (a Beatty sequence). What is left is dealt out among the others in the same way. So each prefix holds each
corpus within `len(weights)` samples of its share, each corpus is read as 0, 1, 2, … without a gap, and nothing is drawn
or remembered. All numbers are whole: p * a / b as a float would be off by one sooner or later.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

PARTS = 10**9  # weights that need a finer common measure are rounded to parts of this


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of `weights`: 0.7 and 0.3 are 7 and 3. None is 0."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is what the user wrote, not the float next to it
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    if sum(whole) > PARTS * math.gcd(*whole):
        total = sum(exact)
        whole = [max(1, round(weight / total * PARTS)) for weight in exact]
    divisor = math.gcd(*whole)
    return [weight // divisor for weight in whole]


def deal(positions: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The corpus at each of `positions`, and the position in that corpus's own endless sequence; all int64 (n,)."""
    corpus = np.full(len(positions), len(weights) - 1)
    own = positions.copy()
    left, undecided, rest = positions, np.arange(len(positions)), sum(weights)
    for i, weight in enumerate(weights[:-1]):
        before = _share(left, weight, rest)
        mine = _share(left + 1, weight, rest) > before
        corpus[undecided[mine]] = i
        own[undecided[mine]] = before[mine]
        left, undecided, rest = (left - before)[~mine], undecided[~mine], rest - weight
    own[undecided] = left
    return corpus, own


def positions_before_repeat(lengths: Sequence[int], weights: Sequence[int]) -> int:
    """How many positions come before the first corpus, each `lengths[i]` samples long, has to start again."""
    fits = 0  # positions that hold no sample twice
    step = 1 << (sum(lengths) + 1).bit_length()
    while step:
        if all(n <= length for n, length in zip(_counts(fits + step, weights), lengths, strict=True)):
            fits += step
        step //= 2
    return fits


def _counts(length: int, weights: Sequence[int]) -> list[int]:
    """Samples of each corpus among the first `length` positions."""
    counts, rest = [], sum(weights)
    for weight in weights:
        counts.append(length * weight // rest)
        length, rest = length - counts[-1], rest - weight
    return counts


def _share(positions: np.ndarray, weight: int, total: int) -> np.ndarray:
    """floor(positions * weight / total); taken apart, because the product does not fit int64."""
    return positions // total * weight + positions % total * weight // total
