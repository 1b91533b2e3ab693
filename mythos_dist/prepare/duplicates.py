"""Exact duplicates in a corpus: of all documents with the same text, the first one is kept.

Every part saves the digests of its documents (128 bits each). Here they are compared, one range of digests at a time,
so that memory is bounded: 1.4 billion documents are 34 GB of digests on disk and some 150 MB at a time in memory. The
result does not depend on which process computed the digests, or when.
"""

from pathlib import Path

import numpy as np

from mythos_dist.files import replacing

RANGE_DOCUMENTS = 1 << 21  # compared at a time


def save_digests(file: Path, digests: np.ndarray) -> None:
    """Write digests, uint64 (n, 2), with their rows, sorted by digest: a range of digests is then one slice."""
    order = np.lexsort((digests[:, 1], digests[:, 0])).astype(np.uint64)
    with replacing(file, ".tmp") as stream:
        np.save(stream, np.column_stack([digests[order], order]))


def find_duplicates(files: list[Path]) -> list[np.ndarray]:
    """For each file of `save_digests`, the rows that occur before, in it or in an earlier file: int64, ascending."""
    tables = [np.load(file, mmap_mode="r") for file in files]  # (n, 3): digest high, digest low, row
    num_ranges = sum(len(table) for table in tables) // RANGE_DOCUMENTS + 1
    edges = np.array([(i << 64) // num_ranges for i in range(1, num_ranges)], np.uint64)
    slices = [np.concatenate([[0], np.searchsorted(table[:, 0], edges), [len(table)]]) for table in tables]
    duplicates: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in tables]
    for i in range(num_ranges):
        pieces = [table[edge[i] : edge[i + 1]] for table, edge in zip(tables, slices, strict=True)]
        file_index = np.repeat(np.arange(len(tables)), [len(piece) for piece in pieces])
        rows = np.concatenate([np.empty((0, 3), np.uint64), *pieces])
        # Equal digests next to each other, and those in the order of the corpus.
        order = np.lexsort((rows[:, 2], file_index, rows[:, 1], rows[:, 0]))
        rows, file_index = rows[order], file_index[order]
        is_duplicate = np.zeros(len(rows), bool)
        is_duplicate[1:] = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
        for file in np.unique(file_index[is_duplicate]):
            duplicates[file].append(rows[is_duplicate & (file_index == file), 2].astype(np.int64))
    return [np.sort(np.concatenate(some)) for some in duplicates]
