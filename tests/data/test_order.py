"""Each epoch is a permutation of the corpus by (seed, epoch, shard sizes), computed at any position directly."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.data.order import CACHED_BLOCKS, SHUFFLE_BLOCK, SampleOrder

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
SEEDS = st.integers(-(2**70), 2**70) | st.integers(-2, 2)


def epoch_of(order: SampleOrder, epoch: int) -> list[int]:
    n = order.num_samples
    return order.samples(np.arange(epoch * n, (epoch + 1) * n)).tolist()


@given(sizes=SIZES, block=st.integers(1, 100), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_epoch_has_every_sample_once(sizes, block, seed, epoch):
    """Also with empty shards, blocks of one sample, and blocks that end within a shard."""
    assert sorted(epoch_of(SampleOrder(sizes, seed, block=block), epoch)) == list(range(sum(sizes)))


@given(sizes=SIZES, block=st.none() | st.integers(1, 100), seed=SEEDS, data=st.data())
def test_random_access_equals_reading_in_order(sizes, block, seed, data):
    """A new order queried at random positions of several epochs, against one that is read from the start."""
    expected = [sample for epoch in range(3) for sample in epoch_of(SampleOrder(sizes, seed, block=block), epoch)]
    query = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=30))
    order = SampleOrder(sizes, seed, block=block)
    for some in (query[:10], query[10:]):
        assert order.samples(np.array(some, dtype=np.int64)).tolist() == [expected[position] for position in some]


def test_permutations_differ_between_seeds_epochs_and_corpora():
    """Also for large and negative seeds, which must not be truncated to NumPy's 32-bit words."""
    sizes = [30, 20, 50]
    seeds = [0, 1, -1, 2**31, 2**32, -(2**32), 2**32 - 1, 2**63, 2**64, 2**64 + 1, 2**96 - 1]
    orders = [epoch_of(SampleOrder(sizes, seed), 0) for seed in seeds]
    orders += [
        epoch_of(SampleOrder(sizes, 0), 1),
        epoch_of(SampleOrder(sizes, 0), 2**31),
        epoch_of(SampleOrder(sizes, 0, corpus=1), 0),
    ]
    assert len(set(map(tuple, orders))) == len(orders)


FIRST_VERSION = ([0, 6, 5, 2, 3, 4, 1], [3, 5, 4, 1, 0, 6, 2])


def test_the_order_is_that_of_the_first_version():
    """Fixed values: a run that resumes after an update must continue with the samples that it has not seen."""
    assert epoch_of(SampleOrder([3, 4], 7), 0) == FIRST_VERSION[0]
    assert epoch_of(SampleOrder([3, 4], -7, block=3, corpus=2), 5) == FIRST_VERSION[1]


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (0, [0]),
        (2**30, [2**30]),
        (2**31 - 1, [2**31 - 1]),
        (2**31, [2**31, 0]),
        (-1, [2**32 - 1]),
        (-(2**31), [2**31, 2**32 - 1]),
        (2**40 + 5, [5, 2**8]),
        (2**63, [0, 2**31, 0]),
    ],
)
def test_the_generator_is_seeded_with_all_words_of_the_seed(seed, words):
    """Against NumPy's generator: 32-bit words of the signed seed, then corpus, epoch and 1 + the block's index."""
    order = SampleOrder([20], seed, corpus=3, block=10)
    blocks = [np.random.RandomState([*words, 3, 4, 1 + block]).permutation(10) + 10 * block for block in range(2)]
    assert epoch_of(order, 4) == np.concatenate(blocks).tolist()


def test_without_a_seed_the_order_is_the_one_on_disk():
    assert SampleOrder([2, 3], None).samples(np.arange(12)).tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]


def test_neighboring_samples_come_from_different_shards():
    """64 shards of 1,000 in blocks of 16,000: when mixed well, one pair of neighbors in 16 shares a shard."""
    order = SampleOrder([1000] * 64, 3, block=16_000)
    shards = np.array(epoch_of(order, 0)) // 1000
    same = (shards[1:] == shards[:-1]).mean()
    assert same == pytest.approx(1 / 16, rel=0.15)
    block = shards[:16_000]
    assert len(set(block.tolist())) == 16, "a block is read from few shards"
    halves = [np.bincount(half, minlength=64).max() for half in np.split(block, 2)]
    assert max(halves) < 600, "each shard is spread over its block"  # 500 expected, deviation 16


def test_a_block_is_2_to_the_18_samples_or_two_of_the_largest_shards():
    """Both halves of the first block are from the same shards: 263 of 1,000 samples, or two. Blocks of another length
    would change the order of every run that resumes."""
    for sizes, block, shards in (([1000] * 600, 2**18, 263), ([2**18 + 1] * 4, 2 * (2**18 + 1), 2)):
        first, second = SampleOrder(sizes, 0).samples(np.arange(block)).reshape(2, -1) // sizes[0]
        assert set(first.tolist()) == set(second.tolist()) and len(set(first.tolist())) == shards


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The lengths of the permutations that are drawn."""
    lengths = []
    random_state = np.random.RandomState

    def counting(words):
        state = random_state(words)
        permutation = state.permutation

        class Counting:
            @staticmethod
            def permutation(length):
                lengths.append(length)
                return permutation(length)

        return Counting

    monkeypatch.setattr(np.random, "RandomState", counting)
    return lengths


def test_a_large_corpus_takes_a_few_megabytes_and_a_seek_draws_one_block(drawn):
    """300 million samples: lengths of the permutations that are drawn, and peak memory."""
    tracemalloc.start()
    order = SampleOrder([60_000] * 5000, 1)
    order.samples(np.arange(290_000_000, 290_000_512))
    assert sorted(drawn) == [5000, SHUFFLE_BLOCK], "one block, and the order of the shards"
    order.samples(np.arange(290_000_512, 290_001_024))
    assert len(drawn) == 2, "the next step draws nothing"
    for position in range(0, 20 * SHUFFLE_BLOCK, SHUFFLE_BLOCK):
        order.samples(np.array([position]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (CACHED_BLOCKS + 5) * 4 * SHUFFLE_BLOCK + 2_000_000 < 50e6


def test_a_step_and_an_evaluation_across_two_blocks_are_drawn_once(drawn):
    """A step from the end of one epoch to the start of the next, then samples of two other blocks, in turn."""
    order = SampleOrder([10] * 10, 0, block=10)
    for _ in range(3):
        order.samples(np.arange(95, 105))
        order.samples(np.arange(35, 45))
    assert len(drawn) == 4 + 2, "four blocks and the shards of two epochs"


def test_the_least_recently_used_blocks_are_evicted(monkeypatch):
    """A block that is read again and again stays, whatever else is read in between."""
    order = SampleOrder([10] * 10, 0, block=10)
    order.samples(np.array([0]))
    for position in range(10, 100, 10):
        order.samples(np.array([position]))
        order.samples(np.array([0]))
        assert 0 in order._blocks and len(order._blocks) <= CACHED_BLOCKS
