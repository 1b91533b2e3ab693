"""Mixing by weight in closed form: exact shares in every prefix, and each position of a corpus exactly once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mythos_dist.data.mix import MAX_TOTAL, PARTS, Mix, MixChange, corpus_positions, integer_weights

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=6)


def step_by_step(weights: list[int], length: int) -> list[tuple[int, int]]:
    """The reference: one position after the other, with two counters per corpus."""
    seen, own = [0] * len(weights), [0] * len(weights)
    out = []
    for _ in range(length):
        rest = sum(weights)
        for i, weight in enumerate(weights):
            seen[i] += 1  # positions that no earlier corpus took
            if seen[i] * weight // rest > (seen[i] - 1) * weight // rest:
                out.append((i, own[i]))
                own[i] += 1
                break
            rest -= weight
    return out


@given(weights=WEIGHTS, length=st.integers(0, 400))
def test_the_closed_form_equals_a_step_by_step_mix(weights, length):
    corpus, own = corpus_positions(np.arange(length), weights)
    assert list(zip(corpus.tolist(), own.tolist(), strict=True)) == step_by_step(weights, length)


@given(weights=WEIGHTS, length=st.integers(1, 3000))
def test_in_every_prefix_each_corpus_is_within_a_few_samples_of_its_share(weights, length):
    """And a corpus's own positions are 0, 1, 2, … without a gap."""
    corpus, own = corpus_positions(np.arange(length), weights)
    for i, weight in enumerate(weights):
        mine = corpus == i
        assert own[mine].tolist() == list(range(mine.sum()))
        share = np.arange(1, length + 1) * weight / sum(weights)
        assert np.abs(mine.cumsum() - share).max() < len(weights)


@given(weights=st.lists(st.integers(1, MAX_TOTAL // 8), min_size=1, max_size=8), position=st.integers(0, 10**15))
def test_large_positions_are_exact(weights, position):
    """Against Python's integers: int64 must not overflow, and a float would be off by one here."""
    corpus, own = corpus_positions(np.array([position]), weights)
    left, rest = position, sum(weights)
    for i, weight in enumerate(weights):
        before = left * weight // rest
        if (left + 1) * weight // rest > before:
            assert (int(corpus[0]), int(own[0])) == (i, before)
            return
        left, rest = left - before, rest - weight
    pytest.fail("the position belongs to no corpus")


@given(weights=WEIGHTS, data=st.data())
def test_a_position_does_not_depend_on_the_others_of_the_query(weights, data):
    query = np.array(data.draw(st.lists(st.integers(0, 500), max_size=20)), dtype=np.int64)
    corpus, own = corpus_positions(np.arange(501), weights)
    some, some_own = corpus_positions(query, weights)
    assert some.tolist() == corpus[query].tolist() and some_own.tolist() == own[query].tolist()


@pytest.mark.parametrize(
    ("weights", "expected"),
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
def test_weights_become_the_integers_that_the_user_meant(weights, expected):
    """0.7 means 7/10, not the nearest float, whose ratio to 0.3 has sixteen digits. (1e-9 to 1 is rounded by 1e-9.)"""
    assert integer_weights(weights) == pytest.approx(expected, abs=1)
    if sum(expected) <= MAX_TOTAL:
        assert integer_weights(weights) == expected


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=6))
def test_integer_weights_are_exact_to_a_billionth(weights):
    integers = integer_weights(weights)
    assert min(integers) > 0 and sum(integers) <= MAX_TOTAL + len(weights)
    for weight, integer in zip(weights, integers, strict=True):
        assert abs(Fraction(integer, sum(integers)) - Fraction(weight) / sum(map(Fraction, weights))) < 1e-8


@given(weights=WEIGHTS, data=st.data())
def test_positions_before_repeat_ends_where_the_first_corpus_would_repeat(weights, data):
    """Against the mix itself: all samples before are different, and the next one is a repeat."""
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=len(weights), max_size=len(weights)))
    end = Mix(weights).positions_before_repeat(lengths)
    corpus, own = corpus_positions(np.arange(end + 1), weights)
    fits = own < np.array(lengths)[corpus]
    assert fits[:-1].all() and not fits[-1]
    assert len(weights) > 1 or end == lengths[0]


@st.composite
def changing(draw: st.DrawFn) -> tuple[list[int], MixChange]:
    """Two ratios of the same corpora, of which some may be in one of them only, and the positions between them."""
    both = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any), min_size=1, max_size=4))
    before, after = ([one[i] for one in both] for i in (0, 1))
    assume(any(before) and any(after))
    begin = draw(st.integers(0, 60))
    return before, MixChange(begin, begin + draw(st.integers(0, 500)), after)


def linear(before: list[int], change: MixChange, position: int) -> tuple[int, list[Fraction]]:
    """The part of a position, and each corpus's share in it: that of the middle of the part."""
    begin, end, after = change
    if position < begin:
        part, done = -1, Fraction(0)
    elif position >= end:
        part, done = PARTS, Fraction(1)
    else:
        part = next(j for j in range(PARTS) if position < begin + (end - begin) * (j + 1) // PARTS)
        done = Fraction(2 * part + 1, 2 * PARTS)
    return part, [
        (1 - done) * Fraction(a, sum(before)) + done * Fraction(b, sum(after))
        for a, b in zip(before, after, strict=True)
    ]


@given(changing(), st.integers(1, 700))
def test_a_mix_that_changes_equals_a_step_by_step_mix_of_each_part(both, length):
    """Part after part with the reference for a constant mix, each reading the corpora on; corpora of weight 0 are
    never read."""
    before, change = both
    parts, shares = zip(*(linear(before, change, position) for position in range(length)), strict=True)
    expected, taken, begin = [], [0] * len(before), 0
    while begin < length:
        end = next((i for i in range(begin, length) if parts[i] != parts[begin]), length)
        used = [i for i, share in enumerate(shares[begin]) if share]
        scale = math.lcm(*(share.denominator for share in shares[begin]))
        weights = [int(shares[begin][i] * scale) for i in used]
        part = [(used[i], taken[used[i]] + own) for i, own in step_by_step(weights, end - begin)]
        for i, _ in part:
            taken[i] += 1
        expected, begin = expected + part, end
    corpus, own = Mix(before, change).corpus_positions(np.arange(length))
    assert list(zip(corpus.tolist(), own.tolist(), strict=True)) == expected


@given(changing(), st.lists(st.integers(0, 700), max_size=20))
def test_a_position_of_a_changing_mix_does_not_depend_on_the_others(both, query):
    mix = Mix(*both)
    corpus, own = mix.corpus_positions(np.arange(701))
    some, some_own = mix.corpus_positions(np.array(query, dtype=np.int64))
    assert some.tolist() == corpus[query].tolist() and some_own.tolist() == own[query].tolist()


def test_over_a_long_change_each_corpus_gets_the_integral_of_its_share():
    """7 : 3 : 0 to 2 : 3 : 5 over 10^12 positions: the mean share, to a sample per part and corpus."""
    mix = Mix([7, 3, 0], MixChange(10**11, 10**11 + 10**12, [2, 3, 5]))
    last = np.arange(10**11 + 10**12 - 1000, 10**11 + 10**12)
    corpus, own = mix.corpus_positions(last)
    for i, (a, b) in enumerate([(7, 2), (3, 3), (0, 5)]):
        expected = 10**11 * a // 10 + 10**12 * (a + b) // 20
        assert abs(int(own[corpus == i].max()) - expected) < 3 * PARTS


@given(changing(), st.data())
def test_a_changing_mix_repeats_no_sample_before_its_number_of_samples(both, data):
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=len(both[0]), max_size=len(both[0])))
    mix = Mix(*both)
    end = mix.positions_before_repeat(lengths)
    corpus, own = mix.corpus_positions(np.arange(end + 1))
    fits = own < np.array(lengths)[corpus]
    assert fits[:-1].all() and not fits[-1]
