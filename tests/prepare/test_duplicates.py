"""The first of equal documents is kept, into however many ranges the comparison is divided."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.prepare import duplicates
from mythos_dist.prepare.duplicates import find_duplicates, save_digests


def duplicates_by_set(parts):
    seen, duplicate_rows = set(), []
    for part in parts:
        duplicate_rows.append([])
        for row, digest in enumerate(part):
            if digest in seen:
                duplicate_rows[-1].append(row)
            seen.add(digest)
    return duplicate_rows


def saved(folder, parts):
    files = []
    for number, part in enumerate(parts):
        files.append(folder / f"{number}.npy")
        save_digests(files[-1], np.array(part, dtype=np.uint64).reshape(-1, 2))
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("digests")


EDGES = [0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
DIGESTS = st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES[:3]))


@given(parts=st.lists(st.lists(DIGESTS, max_size=12), min_size=1, max_size=5), range_documents=st.integers(1, 20))
def test_duplicates_are_those_of_a_set(folder, parts, range_documents):
    """Digests at the boundaries of ranges, or equal in one half; in one file or several, some of them empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "RANGE_DOCUMENTS", range_documents)
        duplicate_rows = find_duplicates(saved(folder, parts))
    assert [rows.tolist() for rows in duplicate_rows] == duplicates_by_set(parts)
    assert all(rows.dtype == np.int64 for rows in duplicate_rows)


def test_memory_does_not_grow_with_the_corpus(folder, monkeypatch):
    """Half a million digests, of which 1 in 5 is a duplicate: 12 MB on disk."""
    draw = np.random.default_rng(0)
    parts = [np.stack([draw.integers(0, (1 << 64) - 1, 50_000, np.uint64)] * 2, axis=1) for _ in range(10)]
    for number in range(2, 10, 2):
        parts[number][::2] = parts[number - 1][::2]
    files = saved(folder, parts)
    monkeypatch.setattr(duplicates, "RANGE_DOCUMENTS", 10_000)
    tracemalloc.start()
    duplicate_rows = find_duplicates(files)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(rows) for rows in duplicate_rows] == [25_000 * (number in (2, 4, 6, 8)) for number in range(10)]
    assert peak < 6 << 20
