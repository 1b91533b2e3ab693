"""Shards of prefix products in a permutation group: data on which more loops help measurably.

A window is BOS and n elements; after the i-th, the model predicts the product of the first i. That takes i - 1 products
in sequence (S5 is not solvable, so no shallow circuit computes it: Barrington 1989; Merrill and Sabharwal 2023); a loop
that computes one product at each position needs i - 1 loops. Chance accuracy is 1 / |group|: 17 % for S3.

Targets are the product of all elements so far (`final`), or one row per loop, each one product further than the row
before: `reached` has the product of the first t elements after loop t, and no labels after them; `per_loop` has the
product of the last t elements after loop t, at every position.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mythos_dist.data.manifest import (
    FORMAT_VERSION,
    DocumentCounts,
    Filters,
    ShardManifest,
    SplitCounts,
    file_sha256,
    index_fingerprint,
)
from mythos_dist.errors import UserError
from mythos_dist.files import new_folder
from mythos_dist.prepare.mds import ShardWriter

BOS, EOS, FIRST = 0, 1, 2  # token ids; FIRST is the first element's. EOS marks labels that are ignored
TOKENS_FILE = "tokens.json"

Targets = Literal["final", "reached", "per_loop"]


def group_table(degree: int) -> np.ndarray:
    """The symmetric group on `degree` points: table[a, b] is the element "first a, then b", (n!, n!) int64."""
    elements = list(itertools.permutations(range(degree)))
    index = {element: i for i, element in enumerate(elements)}
    table = np.empty((len(elements), len(elements)), np.int64)
    for i, a in enumerate(elements):
        for j, b in enumerate(elements):
            table[i, j] = index[tuple(b[point] for point in a)]
    return table


def products(elements: np.ndarray, table: np.ndarray, last: int) -> np.ndarray:
    """elements (N, n) -> (N, n): at each position, the product of the `last` elements up to it (fewer at the start)."""
    result = elements.copy()
    for i in range(elements.shape[1]):
        first = max(0, i - last + 1)
        running = elements[:, first]
        for j in range(first + 1, i + 1):
            running = table[running, elements[:, j]]
        result[:, i] = running
    return result


def make_depth_task(
    out: Path,
    *,
    degree: int = 3,
    hops: int = 8,
    sequences: int = 100_000,
    heldout: int = 1_000,
    targets: Targets = "final",
    seed: int = 0,
) -> ShardManifest:
    """Write shards to the new folder `out`: windows of hops + 1 tokens, and one row of `final` targets or one per loop.

    Held-out sequences have their own random numbers. Raises UserError if `out` exists.
    """
    table = group_table(degree)

    def windows(split: str) -> np.ndarray:
        random = np.random.default_rng(np.random.SeedSequence([seed, degree, hops, split == "heldout"]))
        size = heldout if split == "heldout" else sequences
        return build_windows(random.integers(len(table), size=(size, hops)), table, targets)

    names = ["<bos>", "<eos>"]
    names += ["".join(map(str, element)) for element in itertools.permutations(range(1, degree + 1))]
    return write_task(out, names, windows, targets=1 if targets == "final" else hops)


def write_task(out: Path, names: Sequence[str], windows: Callable[[str], np.ndarray], targets: int) -> ShardManifest:
    """Write shards to the new folder `out`, of windows (N, S + 1 + targets * S) of both splits (train, heldout).

    names: of the tokens; targets: rows of targets. Raises UserError if `out` exists.
    """
    if out.exists():
        raise UserError("exists; name a new folder, or delete it", str(out))
    try:
        with new_folder(out) as folder:
            of_split = {split: windows(split) for split in ("train", "heldout")}
            counts = {split: _write_split(folder / split, one) for split, one in of_split.items()}
            seq_len = (of_split["train"].shape[1] - 1) // (1 + targets)
            (folder / TOKENS_FILE).write_text(json.dumps(names) + "\n")
            manifest = _manifest(folder, counts, vocab_size=len(names), seq_len=seq_len, targets=targets)
            (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror}); name another folder, or free space", str(out)) from None
    return manifest


def ensure_depth_task(out: Path, **settings: Any) -> Path:
    """Write the shards if `out` does not exist; an existing folder is assumed to have the same settings."""
    if not out.exists():
        make_depth_task(out, **settings)
    return out


def build_windows(elements: np.ndarray, table: np.ndarray, targets: Targets) -> np.ndarray:
    """elements (N, n) -> windows (N, n + 2 + T * (n + 1)): BOS, elements, EOS, then T rows of targets (1, or n).

    The last row is the product of all elements so far, whatever `targets` is.
    """
    N, n = elements.shape
    bos, eos = np.full((N, 1), BOS), np.full((N, 1), EOS)
    columns = [bos, elements + FIRST, eos]
    final = products(elements, table, n) + FIRST
    if targets != "final":
        for t in range(1, n):
            if targets == "per_loop":
                columns += [eos, products(elements, table, t) + FIRST]
            else:
                columns += [eos, final[:, :t], np.full((N, n - t), EOS)]
    columns += [eos, final]
    return np.concatenate(columns, axis=1)


def _write_split(folder: Path, windows: np.ndarray) -> SplitCounts:
    """Write windows (N, length) as shards with their index."""
    writer = ShardWriter(folder, windows.shape[1] - 1, "uint16")
    writer.add(windows.astype(np.uint16).ravel())
    writer.finish()
    folder.mkdir(parents=True, exist_ok=True)  # without sequences there is no shard
    index = {"version": 2, "shards": writer.shards}
    (folder / "index.json").write_text(json.dumps(index, sort_keys=True))
    num_eos = int((windows == EOS).sum())
    return SplitCounts(
        documents=num_eos,
        tokens=windows.size - num_eos,
        windows=len(windows),
        tokens_written=windows.size,
        tokens_dropped=0,
        eos_dropped=0,
    )


def _manifest(
    folder: Path, splits: dict[str, SplitCounts], vocab_size: int, seq_len: int, targets: int
) -> ShardManifest:
    documents = sum(split.documents for split in splits.values())
    windows = sum(split.windows for split in splits.values())
    return ShardManifest(
        format_version=FORMAT_VERSION,
        seq_len=seq_len,
        dtype="uint16",
        vocab_size=vocab_size,
        eos="<eos>",
        eos_id=EOS,
        tokenizer=TOKENS_FILE,
        tokenizer_sha256=file_sha256(folder / TOKENS_FILE),
        heldout=splits["heldout"].windows / windows,
        compression=None,
        text_column="",
        sample_by="document",
        filters=Filters(),
        inputs=(),
        documents=DocumentCounts(read=documents, written=documents),
        splits=splits,
        fingerprint=index_fingerprint(folder),
        targets=targets,
    )
