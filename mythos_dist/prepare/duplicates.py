"""Exact duplicates over a whole corpus: the first document with a text stays, wherever the others are.

Every part lists the digests of its documents (128 bits each); here they are brought together, a share of all possible
digests at a time, so that memory stays bounded: 1.4 thousand million documents are 34 GB of digests on disk and some
150 MB at a time here. The answer does not depend on who computed the digests, or when.
"""

import os
from pathlib import Path

import numpy as np

SHARE_DOCUMENTS = 1 << 21  # compared at a time


def save_digests(file: Path, digests: np.ndarray) -> None:
    """Write digests, uint64 (n, 2), with their row numbers, sorted by digest: a share of them is then one slice."""
    order = np.lexsort((digests[:, 1], digests[:, 0])).astype(np.uint64)
    unfinished = file.with_name(file.name + ".tmp")
    with open(unfinished, "wb") as stream:
        np.save(stream, np.column_stack([digests[order], order]))
    os.replace(unfinished, file)


def find_duplicates(saved: list[Path]) -> list[np.ndarray]:
    """For each file of `save_digests`, which of its rows came before, in it or in an earlier file: int64, ascending."""
    files = [np.load(file, mmap_mode="r") for file in saved]
    shares = sum(len(file) for file in files) // SHARE_DOCUMENTS + 1
    edges = np.array([(i << 64) // shares for i in range(1, shares)], np.uint64)
    slices = [np.concatenate([[0], np.searchsorted(file[:, 0], edges), [len(file)]]) for file in files]
    found: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in files]
    for share in range(shares):
        rows = [file[edge[share] : edge[share + 1]] for file, edge in zip(files, slices, strict=True)]
        owner = np.repeat(np.arange(len(files)), [len(some) for some in rows])
        digests = np.concatenate([np.empty((0, 3), np.uint64), *rows])
        # Equal digests side by side, and among them in the order of the corpus.
        order = np.lexsort((digests[:, 2], owner, digests[:, 1], digests[:, 0]))
        ordered = digests[order]
        again = np.zeros(len(ordered), bool)
        again[1:] = (ordered[1:, :2] == ordered[:-1, :2]).all(axis=1)
        for number in np.unique(owner[order[again]]):
            here = ordered[again & (owner[order] == number), 2]
            found[number].append(here.astype(np.int64))
    return [np.sort(np.concatenate(some)) for some in found]
