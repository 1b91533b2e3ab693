"""The shuffled order of a corpus: position in its endless sequence -> sample, without a permutation of a full epoch.

Epoch e = position // num_samples permutes the shards, and then shuffles within blocks of consecutive samples of that
shard order. A block's permutation is drawn when it is first needed, so memory is proportional to the block and seeking
reads nothing. The order depends only on (seed, epoch, shard sizes).
The trap: a resumed run draws the permutations again, so NumPy's generator must never change. `RandomState` guarantees
that (NEP 19: its streams are frozen); `default_rng` does not.

Decisions: DATA-1, DATA-2.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

SHUFFLE_BLOCK = 1 << 18  # samples: some 16 shards of 64 MB at 2048 tokens of uint16
CACHED_BLOCKS = 4  # for a step across two blocks, and a seek back to evaluate or compare
CACHED_EPOCHS = 2  # for a step across two epochs
T = TypeVar("T")


class SampleOrder:
    """The order of one corpus's samples, epoch after epoch."""

    def __init__(self, shard_sizes: Sequence[int], seed: int | None, *, corpus: int = 0, block: int | None = None):
        """`shard_sizes` in samples, at least one sample in all; `seed` None is the order on disk.

        `corpus`: its index in the mix, so that corpora of equal size (such as translations) get different orders.
        `block` in samples; None: SHUFFLE_BLOCK, or twice the largest shard, so that a block mixes shards.
        """
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(sizes.sum())
        assert self.num_samples, "no samples"
        self._sizes, self._first = sizes, np.cumsum(sizes) - sizes  # samples, first sample of each shard
        self._seed, self._corpus = seed, corpus
        self._block = min(block or max(SHUFFLE_BLOCK, 2 * int(sizes.max())), self.num_samples)
        self._blocks_per_epoch = -(-self.num_samples // self._block)
        self._blocks: dict[int, np.ndarray] = {}  # by index in the endless sequence: its permutation
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # shards in order, first position of each

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples (indices in the split) at `positions` of the endless sequence, both int64 (n,)."""
        epochs, in_epoch = np.divmod(positions, self.num_samples)
        if self._seed is None:
            return in_epoch
        out = np.empty_like(in_epoch)
        blocks = epochs * self._blocks_per_epoch + in_epoch // self._block
        for block in np.unique(blocks).tolist():
            here = blocks == block
            out[here] = self._samples_in(block, in_epoch[here])
        return out

    def _samples_in(self, block: int, in_epoch: np.ndarray) -> np.ndarray:
        """The samples at positions `in_epoch` of an epoch, all in one `block` of the endless sequence."""
        epoch, block_in_epoch = divmod(block, self._blocks_per_epoch)
        begin = block_in_epoch * self._block
        length = min(self._block, self.num_samples - begin)
        permutation = _cached(
            self._blocks, block, CACHED_BLOCKS, lambda: self._permutation(length, epoch, 1 + block_in_epoch)
        )
        shuffled = begin + permutation[in_epoch - begin].astype(np.int64)
        shards, starts = _cached(self._epochs, epoch, CACHED_EPOCHS, lambda: self._shard_order(epoch))
        at = np.searchsorted(starts, shuffled, side="right") - 1
        return self._first[shards[at]] + shuffled - starts[at]

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = self._permutation(len(self._sizes), epoch, 0)
        sizes = self._sizes[shards]
        return shards, np.cumsum(sizes) - sizes

    def _permutation(self, length: int, epoch: int, stream: int) -> np.ndarray:
        """A permutation of range(length), int32. Stream 0 is for the epoch's shards, 1 + b for its block b."""
        assert self._seed is not None
        seed = self._seed.to_bytes(self._seed.bit_length() // 32 * 4 + 4, "little", signed=True)
        words = [*np.frombuffer(seed, "<u4").tolist(), self._corpus, epoch, stream]
        return np.random.RandomState(words).permutation(length).astype(np.int32)


def _cached(cache: dict[int, T], key: int, max_size: int, compute: Callable[[], T]) -> T:
    """`cache[key]`, computed if missing; the least recently used entries are evicted."""
    value = cache.pop(key) if key in cache else compute()
    while len(cache) >= max_size:
        cache.pop(next(iter(cache)))
    cache[key] = value
    return value
