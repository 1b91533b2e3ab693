"""The order of a corpus: position in its endless sequence of samples -> sample, without a table of the whole epoch.

Epoch e = position // num_samples permutes the shards, and then the samples within blocks of consecutive places of that
shard order. A block's permutation is drawn when it is first needed, so memory follows the block and seeking reads
nothing. Which sample comes when depends on (seed, epoch, the shards' sizes) alone.
The trap: a resumed run draws again, so NumPy must draw the same numbers for ever. `RandomState` promises that
(NEP 19: its streams are frozen); `default_rng` does not.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

SHUFFLE_BLOCK = 1 << 18  # samples: some 16 shards of 64 MB at 2048 tokens of uint16
BLOCKS_KEPT = 4  # a step that crosses into the next block, and a seek back to evaluate or compare
EPOCHS_KEPT = 2  # the end of one and the start of the next
T = TypeVar("T")


class SampleOrder:
    """The samples of one corpus, in order, epoch after epoch."""

    def __init__(self, shard_sizes: Sequence[int], seed: int | None, *, corpus: int = 0, block: int | None = None):
        """`shard_sizes` in samples, at least one sample in all; `seed` None is the order on disk.

        `corpus`: its number in a mix, where two of one size must not be permuted alike (they may be translations).
        `block` in samples; None: SHUFFLE_BLOCK, or twice the largest shard, for a smaller one would not mix shards.
        """
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(sizes.sum())
        assert self.num_samples, "an order over nothing"
        self._sizes, self._first = sizes, np.cumsum(sizes) - sizes  # samples, first sample of each shard
        self._seed, self._corpus = seed, corpus
        self._block = min(block or max(SHUFFLE_BLOCK, 2 * int(sizes.max())), self.num_samples)
        self._blocks_per_epoch = -(-self.num_samples // self._block)
        self._blocks: dict[int, np.ndarray] = {}  # of the endless sequence -> its permutation
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # -> shards in order, first place of each

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples (indices in the split) at `positions` of the endless sequence, both int64 (n,)."""
        epochs, places = np.divmod(positions, self.num_samples)
        if self._seed is None:
            return places
        out = np.empty_like(places)
        blocks = epochs * self._blocks_per_epoch + places // self._block
        for block in np.unique(blocks).tolist():
            here = blocks == block
            out[here] = self._samples_in(block, places[here])
        return out

    def _samples_in(self, block: int, places: np.ndarray) -> np.ndarray:
        """The samples at `places` of an epoch, all in one block of the endless sequence."""
        epoch, block_in_epoch = divmod(block, self._blocks_per_epoch)
        begin = block_in_epoch * self._block
        length = min(self._block, self.num_samples - begin)
        mixed = _keep(self._blocks, block, BLOCKS_KEPT, lambda: self._permutation(length, epoch, 1 + block_in_epoch))
        places = begin + mixed[places - begin].astype(np.int64)
        shards, starts = _keep(self._epochs, epoch, EPOCHS_KEPT, lambda: self._shard_order(epoch))
        at = np.searchsorted(starts, places, side="right") - 1
        return self._first[shards[at]] + places - starts[at]

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


def _keep(kept: dict[int, T], key: int, most: int, make: Callable[[], T]) -> T:
    """`kept[key]`, made if it is not there; of the others the ones used longest ago go."""
    value = kept.pop(key) if key in kept else make()
    while len(kept) >= most:
        kept.pop(next(iter(kept)))
    kept[key] = value
    return value
