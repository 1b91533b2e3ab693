"""Which bytes of a checkpoint's files a rank requests from a store, and where they belong.

A rank needs runs: bytes that are contiguous both in a file and in one of its arrays. Runs that are neighbors become
one request, and so do runs with a small gap between them, as a request costs time as well. The rule: gaps are joined
from the smallest, while all of them are at most 1/20 of the needed bytes, or while there would be more than one request
per 256 KiB. So a rank reads at most 1.05 times what it needs, unless that would take many small requests: at a larger
`parallel.tensor` it may need half of each row of a matrix, in thousands of rows.

Decisions: CHECKPOINT-14.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mythos_dist.checkpoint.pieces import Region

EXTRA = 1 / 20  # of the needed bytes, in joined gaps
MANY_REQUESTS, BYTES_PER_REQUEST = 1000, 256 << 10
PART_BYTES = 8 << 20  # of one request


class Copy(NamedTuple):
    """Elements of a tensor in a file, and where they go in a flat array."""

    tensor: str  # kind/name
    source: Region
    out: np.ndarray
    target: Region


@dataclass
class FilePlan:
    """What is read of one file."""

    name: str
    begins: np.ndarray  # of each run in the file, ascending
    ends: np.ndarray
    outs: np.ndarray  # index of each run's array
    targets: np.ndarray  # first byte of each run in its array
    arrays: list[memoryview]
    blocks: list[tuple[int, int]] = field(default_factory=list)  # ranges of bytes to request

    def __post_init__(self) -> None:
        self._last = np.maximum.accumulate(self.ends) if len(self.ends) else self.ends

    @property
    def needed(self) -> int:
        """Bytes that belong somewhere."""
        return int((self.ends - self.begins).sum())

    def parts(self) -> Iterator[tuple[int, int]]:
        """The blocks in parts of at most PART_BYTES."""
        for begin, end in self.blocks:
            for at in range(begin, end, PART_BYTES):
                yield at, min(end, at + PART_BYTES)

    def targets_in(self, begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
        """For each run of bytes in [begin, end) of the file: its first byte, and the memory it goes to."""
        first, last = np.searchsorted(self._last, begin, "right"), np.searchsorted(self.begins, end, "left")
        for i in range(int(first), int(last)):
            low, high = max(begin, int(self.begins[i])), min(end, int(self.ends[i]))
            if low < high:
                target = int(self.targets[i]) + low - int(self.begins[i])
                yield low, self.arrays[int(self.outs[i])][target : target + high - low]


def plan_file(name: str, copies: Sequence[Copy], tensor_begins: Sequence[int]) -> FilePlan:
    """The runs of all copies from one file. `tensor_begins`: the first byte of each copy's tensor; its elements have
    the size of those of `out`."""
    parts, arrays = [], []
    for i, (copy, tensor_begin) in enumerate(zip(copies, tensor_begins, strict=True)):
        sources, targets, length = runs(copy.source, copy.target)
        size = copy.out.itemsize
        begin = tensor_begin + size * sources
        parts.append((begin, begin + size * length, np.full(len(begin), i), size * targets))
        arrays.append(copy.out.data.cast("B"))
    begins, ends, outs, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(begins, kind="stable")
    return FilePlan(name, begins[order], ends[order], outs[order], targets[order], arrays)


def merge_ranges(files: Sequence[FilePlan]) -> None:
    """Set `blocks` of each file, by the rule at the top."""
    gaps = [np.maximum(0, one.begins[1:] - one._last[:-1]) for one in files]
    all_gaps = np.concatenate(gaps) if gaps else np.empty(0, np.int64)
    needed = sum(one.needed for one in files)
    order = np.argsort(all_gaps, kind="stable")
    within = np.searchsorted(np.cumsum(all_gaps[order]), EXTRA * needed, "right")
    requests = len(all_gaps) + len(files)
    too_many = requests - max(MANY_REQUESTS, needed // BYTES_PER_REQUEST)
    joined = np.zeros(len(all_gaps), bool)
    joined[order[: max(int(within), too_many)]] = True
    at = 0
    for one, of_file in zip(files, gaps, strict=True):
        cuts = np.flatnonzero(~joined[at : at + len(of_file)])
        at += len(of_file)
        firsts, lasts = np.append(0, cuts + 1), np.append(cuts, len(one.begins) - 1)
        one.blocks = list(zip(one.begins[firsts].tolist(), one._last[lasts].tolist(), strict=True))


def runs(source: Region, target: Region) -> tuple[np.ndarray, np.ndarray, int]:
    """The elements of two regions of equal extents, as runs that are contiguous in both: the first element of each run
    in the source and in the target, and their common length."""
    extents = [part.stop - part.start for part in source.slices]
    strides = [_strides(region.shape) for region in (source, target)]
    length, outer = 1, len(extents)
    while outer and (extents[outer - 1] == 1 or strides[0][outer - 1] == strides[1][outer - 1] == length):
        outer -= 1
        length *= extents[outer]
    firsts = []
    for region, of_region in zip((source, target), strides, strict=True):
        starts = [part.start * stride for part, stride in zip(region.slices, of_region, strict=True)]
        first = np.array([region.offset + sum(starts)])
        for extent, stride in zip(extents[:outer], of_region[:outer], strict=True):
            first = np.add.outer(first, stride * np.arange(extent)).reshape(-1)
        firsts.append(first.astype(np.int64))
    return firsts[0], firsts[1], length


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]
