"""Corpora are dealt out by weight in closed form: exact shares in every prefix, and no position twice or left out."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.data.mix import PARTS, deal, integer_weights, positions_before_repeat

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=6)


def walk(weights: list[int], length: int) -> list[tuple[int, int]]:
    """The same by hand: one position after the other, with a counter for each corpus and each rest of corpora."""
    taken, own = [0] * len(weights), [0] * len(weights)
    out = []
    for _ in range(length):
        rest = sum(weights)
        for i, weight in enumerate(weights):
            taken[i] += 1  # positions that came as far as this corpus
            if taken[i] * weight // rest > (taken[i] - 1) * weight // rest:
                out.append((i, own[i]))
                own[i] += 1
                break
            rest -= weight
    return out


@given(weights=WEIGHTS, length=st.integers(0, 400))
def test_the_formula_is_the_walk(weights, length):
    corpus, own = deal(np.arange(length), weights)
    assert list(zip(corpus.tolist(), own.tolist(), strict=True)) == walk(weights, length)


@given(weights=WEIGHTS, length=st.integers(1, 3000))
def test_every_prefix_holds_each_corpus_within_a_few_samples_of_its_share(weights, length):
    """And each corpus's own positions are 0, 1, 2, … without a gap."""
    corpus, own = deal(np.arange(length), weights)
    for i, weight in enumerate(weights):
        mine = corpus == i
        assert own[mine].tolist() == list(range(mine.sum()))
        share = np.arange(1, length + 1) * weight / sum(weights)
        assert np.abs(mine.cumsum() - share).max() < len(weights)


@given(weights=st.lists(st.integers(1, PARTS // 8), min_size=1, max_size=8), position=st.integers(0, 10**15))
def test_positions_far_out_are_exact(weights, position):
    """Against whole numbers of any size: int64 must not overflow, and a float would be off by one here."""
    corpus, own = deal(np.array([position]), weights)
    left, rest = position, sum(weights)
    for i, weight in enumerate(weights):
        before = left * weight // rest
        if (left + 1) * weight // rest > before:
            assert (int(corpus[0]), int(own[0])) == (i, before)
            return
        left, rest = left - before, rest - weight
    pytest.fail("dealt to nobody")


@given(weights=WEIGHTS, data=st.data())
def test_a_position_does_not_depend_on_the_others_that_are_asked_with_it(weights, data):
    asked = np.array(data.draw(st.lists(st.integers(0, 500), max_size=20)), dtype=np.int64)
    corpus, own = deal(np.arange(501), weights)
    some, some_own = deal(asked, weights)
    assert some.tolist() == corpus[asked].tolist() and some_own.tolist() == own[asked].tolist()


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1], [1]),
        ([2.0], [1]),
        ([1, 2], [1, 2]),
        ([0.1, 0.2, 0.3], [1, 2, 3]),
        ([1e-9, 1.0], [1, 10**9]),
        ([1e6, 2.5e6], [2, 5]),
        ([3e300, 1e300], [3, 1]),
    ],
)
def test_weights_become_the_whole_numbers_that_the_user_meant(weights, whole):
    """0.7 is not the float next to it, whose ratio to 0.3 has sixteen digits. (1e-9 to 1 is rounded by a billionth.)"""
    assert integer_weights(weights) == pytest.approx(whole, abs=1)
    if sum(whole) <= PARTS:
        assert integer_weights(weights) == whole


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=6))
def test_weights_of_any_kind_are_met_to_a_billionth(weights):
    whole = integer_weights(weights)
    assert min(whole) > 0 and sum(whole) <= PARTS + len(weights)
    for weight, parts in zip(weights, whole, strict=True):
        assert abs(Fraction(parts, sum(whole)) - Fraction(weight) / sum(map(Fraction, weights))) < 1e-8


@given(weights=WEIGHTS, data=st.data())
def test_the_mix_ends_where_the_first_corpus_would_start_again(weights, data):
    """Against dealing it out: all samples before are different, and the next one is not."""
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=len(weights), max_size=len(weights)))
    end = positions_before_repeat(lengths, weights)
    corpus, own = deal(np.arange(end + 1), weights)
    fits = own < np.array(lengths)[corpus]
    assert fits[:-1].all() and not fits[-1]
    assert len(weights) > 1 or end == lengths[0]
