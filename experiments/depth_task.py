"""Prefix products in a permutation group: data on which thinking longer can be measured, as shards like any others.

A window is BOS and n elements; after the i-th the model is to say the product of the first i. That takes i - 1 products
one after the other (S5 is not solvable, so no shallow circuit does it: Barrington 1989; Merrill and Sabharwal 2023),
and a loop that does one product at each position needs i - 1 loops. Chance is 1 / |group|: 17 % for S3.

Targets are the product of all elements so far (`final`), or there are some for each loop, so that a loop is asked for
one product more than the loop before it: `reached` has the product of all, of the first t elements after loop t, and
none behind them; `per_loop` has the product of the last t elements after loop t, at every position.
"""

import itertools
import json
import os
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Literal

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
from mythos_dist.prepare.mds import ShardWriter

BOS, EOS, FIRST = 0, 1, 2  # tokens; elements come from FIRST on. EOS stands for labels that do not count
TOKENS_FILE = "tokens.json"

Targets = Literal["final", "reached", "per_loop"]


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
    targets: Targets = "final",
    seed: int = 0,
) -> ShardManifest:
    """Write shards into the new folder `out`: windows of hops + 1 tokens and their targets, one row of `final` ones, or
    a row for each of `hops` loops. Held-out sequences are drawn by themselves. Raises UserError if `out` is there.
    """
    if out.exists():
        raise UserError("exists; name a new folder, or delete it", str(out))
    table = group_table(degree)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")  # nobody else's
    try:
        manifest = _write_task(temporary, table, degree, hops, {"train": sequences, "heldout": heldout}, targets, seed)
        os.rename(temporary, out)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror}); name another folder, or make room", str(out)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed, it has another name
    return manifest


def _write_task(
    temporary: Path, table: np.ndarray, degree: int, hops: int, sizes: dict[str, int], targets: Targets, seed: int
) -> ShardManifest:
    """Write shards, tokens and manifest into the new folder `temporary`."""
    vocab_size, S, T = FIRST + len(table), hops + 1, 1 if targets == "final" else hops
    counts = {}
    for split, size in sizes.items():
        random = np.random.default_rng(np.random.SeedSequence([seed, degree, hops, split == "heldout"]))
        windows = windows_of(random.integers(len(table), size=(size, hops)), table, targets)
        writer = ShardWriter(temporary / split, windows.shape[1] - 1, "uint16", prefix="")
        writer.add(windows.astype(np.uint16).ravel())
        writer.finish()
        (temporary / split).mkdir(parents=True, exist_ok=True)  # without sequences there is no shard
        index = {"version": 2, "shards": writer.shards}
        (temporary / split / "index.json").write_text(json.dumps(index, sort_keys=True))
        ends, numbers = int((windows == EOS).sum()), windows.size
        counts[split] = SplitCounts(ends, numbers - ends, size, numbers, 0, 0)
    names = ["<bos>", "<eos>", *("".join(map(str, p)) for p in itertools.permutations(range(1, degree + 1)))]
    (temporary / TOKENS_FILE).write_text(json.dumps(names) + "\n")
    documents = sum(split.documents for split in counts.values())
    manifest = ShardManifest(
        format_version=FORMAT_VERSION,
        seq_len=S,
        dtype="uint16",
        vocab_size=vocab_size,
        eos="<eos>",
        eos_id=EOS,
        tokenizer=TOKENS_FILE,
        tokenizer_sha256=file_sha256(temporary / TOKENS_FILE),
        heldout=sizes["heldout"] / sum(sizes.values()),
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
    return manifest


def have_depth_task(out: Path, **settings) -> Path:
    """`out`, with the shards that `make_depth_task` makes of the settings; what is there is taken for them."""
    if not out.exists():
        make_depth_task(out, **settings)
    return out


def windows_of(elements: np.ndarray, table: np.ndarray, targets: Targets) -> np.ndarray:
    """elements (N, n) -> windows (N, n + 2 + T * (n + 1)): BOS, the elements, EOS, then T rows of targets, 1 or n. The
    last row is the product of all, whatever `targets` is."""
    N, n = elements.shape
    start, end = np.full((N, 1), BOS), np.full((N, 1), EOS)
    columns = [start, elements + FIRST, end]
    whole = products(elements, table, n) + FIRST
    for t in range(1, n) if targets != "final" else ():
        if targets == "per_loop":
            columns += [end, products(elements, table, t) + FIRST]
        else:
            columns += [end, whole[:, :t], np.full((N, n - t), EOS)]
    columns += [end, whole]
    return np.concatenate(columns, axis=1)
