"""A folder of shards as training reads it, written with streaming's MDSWriter and without our converter.

The tokens of a window follow from corpus and sample, so a test can identify a sample by its tokens.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mythos_dist.data.manifest import (
    FORMAT_VERSION,
    DocumentCounts,
    Filters,
    ShardManifest,
    SplitCounts,
    index_fingerprint,
)

SEQ_LEN = 16
VOCAB_SIZE = 1000
EOS = 1


def window(corpus: int, sample: int, seq_len: int = SEQ_LEN) -> np.ndarray:
    """A sample's tokens: drawn with a fixed seed, a tenth of them EOS."""
    draw = np.random.RandomState([corpus, sample])
    tokens = draw.randint(2, VOCAB_SIZE, seq_len + 1)
    tokens[draw.rand(seq_len + 1) < 0.1] = EOS
    return tokens


def write_folder(
    out: Path,
    train: list[int],
    heldout: list[int] | None = None,
    *,
    corpus: int = 0,
    dtype: str = "uint16",
    compression: str | None = None,
    seq_len: int = SEQ_LEN,
    eos: int = EOS,
    tokenizer: bytes = b"a tokenizer",
) -> Path:
    """Write `out` with shards in each split, each in its own subfolder; returns `out`.

    train, heldout: the number of windows of each shard.
    """
    splits = {"train": train, "heldout": [3] if heldout is None else heldout}
    for split, sizes in splits.items():
        (out / split).mkdir(parents=True)
        entries = []
        for part in range(len(sizes)):
            samples = range(sum(sizes[:part]), sum(sizes[: part + 1]))
            windows = [window(corpus + 1000 * (split == "heldout"), sample, seq_len) for sample in samples]
            entries += write_part(out / split / f"part-{part:05}", np.array(windows, dtype), compression)
        (out / split / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    (out / "tokenizer.model").write_bytes(tokenizer)
    counts = {split: sum(sizes) for split, sizes in splits.items()}
    manifest = ShardManifest(
        format_version=FORMAT_VERSION,
        seq_len=seq_len,
        dtype=dtype,
        vocab_size=VOCAB_SIZE,
        eos="</s>",
        eos_id=eos,
        tokenizer="tokenizer.model",
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        heldout=0.1,
        compression=compression,
        text_column="text",
        sample_by="document",
        filters=Filters(),
        inputs=(),
        documents=DocumentCounts(),
        splits={split: SplitCounts(0, 0, count, count * (seq_len + 1), 0, 0) for split, count in counts.items()},
        fingerprint=index_fingerprint(out),
    )
    write_manifest(out, **manifest.to_json())
    return out


def write_part(folder: Path, windows: np.ndarray, compression: str | None) -> list[dict[str, Any]]:
    """Write a shard of windows (n, seq_len + 1); returns its entries for index.json of the split."""
    from streaming import MDSWriter  # its import takes seconds, and tests that only copy a folder do not need it

    writer = MDSWriter(
        out=str(folder),
        columns={"tokens": f"ndarray:{windows.dtype}:{windows.shape[1]}"},
        hashes=["sha1", "xxh64"],
        compression=compression,
        size_limit=None,
    )
    for tokens in windows:
        writer.write({"tokens": tokens})
    writer.finish()
    entries = json.loads((folder / "index.json").read_text())["shards"]
    for entry in entries:
        for data in filter(None, (entry["raw_data"], entry["zip_data"])):
            data["basename"] = f"{folder.name}/{data['basename']}"
    (folder / "index.json").unlink()
    return entries


def write_manifest(folder: Path, **changes: Any) -> None:
    """Change entries of the manifest, or write it."""
    file = folder / "manifest.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **changes}))


def rewrite_index(folder: Path, split: str, change: Any) -> None:
    """Apply `change` to the entries of index.json, and update the fingerprint in the manifest."""
    file = folder / split / "index.json"
    index = json.loads(file.read_text())
    change(index["shards"])
    file.write_text(json.dumps(index))
    write_manifest(folder, fingerprint=index_fingerprint(folder))


def shard_files(folder: Path, split: str = "train") -> list[Path]:
    """Paths of a split's shard files, in order."""
    index = json.loads((folder / split / "index.json").read_text())
    return [folder / split / (entry["zip_data"] or entry["raw_data"])["basename"] for entry in index["shards"]]


def copy(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)
