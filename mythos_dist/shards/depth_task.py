"""Prefix products in a permutation group: data on which thinking longer can be measured, as shards like any others.

A window is BOS and n elements; after the i-th the model is to say the product of the first i. That takes i - 1 products
one after the other (S5 is not solvable, so no shallow circuit does it: Barrington 1989; Merrill and Sabharwal 2023),
and a loop that does one product at each position needs i - 1 loops. Chance is 1 / |group|: 17 % for S3.

With targets for each loop the model is to hold, after loop t, the product of the last t + 1 elements, so that a loop
is asked for one product more than the loop before it.
"""

import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mythos_dist.data.manifest import (
    FORMAT_VERSION,
    DocumentCounts,
    Filters,
    Manifest,
    SplitCounts,
    file_sha256,
    index_fingerprint,
)
from mythos_dist.errors import UserError
from mythos_dist.shards.mds import ShardWriter

BOS, EOS, FIRST = 0, 1, 2  # tokens; elements come from FIRST on. EOS stands for labels that do not count
TOKENS_FILE = "tokens.json"


def group_table(degree: int) -> np.ndarray:
    """The symmetric group of so many points: table[a, b] is the element "first a, then b", (n!, n!) int64."""
    elements = list(itertools.permutations(range(degree)))
    number = {element: i for i, element in enumerate(elements)}
    return np.array([[number[tuple(b[point] for point in a)] for b in elements] for a in elements])


def products(elements: np.ndarray, table: np.ndarray, last: int) -> np.ndarray:
    """elements (N, n) -> (N, n): at position i the product of the `last` elements up to it, or of all there are."""
    found = elements.copy()
    for i in range(elements.shape[1]):
        running = elements[:, max(0, i - last + 1)]
        for j in range(max(0, i - last + 1) + 1, i + 1):
            running = table[running, elements[:, j]]
        found[:, i] = running
    return found


def make_depth_task(
    out: Path,
    *,
    degree: int = 3,
    hops: int = 8,
    sequences: int = 100_000,
    heldout: int = 1_000,
    per_loop: bool = False,
    seed: int = 0,
) -> Manifest:
    """Write shards into the new folder `out`: windows of hops + 1 tokens, and one row of targets, or with `per_loop` a
    row for each of `hops` loops. Held-out sequences are drawn by themselves. Raises UserError if `out` is there.
    """
    if out.exists():
        raise UserError("exists; name a new folder, or delete it", str(out))
    table = group_table(degree)
    vocab_size, S, T = FIRST + len(table), hops + 1, hops if per_loop else 1
    temporary = out.with_name(out.name + ".tmp")
    counts = {}
    for split, size in (("train", sequences), ("heldout", heldout)):
        random = np.random.default_rng(np.random.SeedSequence([seed, degree, hops, split == "heldout"]))
        windows = windows_of(random.integers(len(table), size=(size, hops)), table, T)
        writer = ShardWriter(temporary / split, windows.shape[1] - 1, "uint16", prefix="")
        writer.add(windows.astype(np.uint16).ravel())
        writer.finish()
        index = {"version": 2, "shards": writer.shards}
        (temporary / split / "index.json").write_text(json.dumps(index, sort_keys=True))
        ends, numbers = int((windows == EOS).sum()), windows.size
        counts[split] = SplitCounts(ends, numbers - ends, size, numbers, 0, 0)
    names = ["<bos>", "<eos>", *("".join(map(str, p)) for p in itertools.permutations(range(1, degree + 1)))]
    (temporary / TOKENS_FILE).write_text(json.dumps(names) + "\n")
    documents = sum(split.documents for split in counts.values())
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_len=S,
        dtype="uint16",
        vocab_size=vocab_size,
        eos="<eos>",
        eos_id=EOS,
        tokenizer=TOKENS_FILE,
        tokenizer_sha256=file_sha256(temporary / TOKENS_FILE),
        heldout=heldout / (sequences + heldout),
        compression=None,
        text_column="",
        sample_by="document",
        filters=Filters(),
        inputs=(),
        documents=DocumentCounts(read=documents, written=documents),
        splits=counts,
        fingerprint=index_fingerprint(temporary),
        targets=T,
    )
    (temporary / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    os.replace(temporary, out)
    return manifest


def windows_of(elements: np.ndarray, table: np.ndarray, targets: int) -> np.ndarray:
    """elements (N, n) -> windows (N, n + 2 + targets * (n + 1)): BOS, the elements, EOS, then rows of targets. The
    last row is the product of all, whatever `targets` is."""
    N, n = elements.shape
    start, end = np.full((N, 1), BOS), np.full((N, 1), EOS)
    columns = [start, elements + FIRST, end]
    for t in range(targets):
        last = n if t == targets - 1 else t + 1
        columns += [end, products(elements, table, last) + FIRST]
    return np.concatenate(columns, axis=1)
