"""Parquet to MDS shards, in a folder that needs nothing else.

    out/train/        index.json, shard.*.mds: column `tokens`, windows of seq_len + 1 token ids
    out/heldout/      the same; a document is held out by a hash of its text, so order and file names do not matter
    out/tokenizer.model, out/manifest.json

Everything is written into out.partial and renamed at the end: a folder with a manifest is a whole conversion.
The trap: MDSWriter as a context manager writes a valid-looking index.json when an exception cuts it short,
so `finish()` is called here, and only after the last window.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mythos_dist.data.corpus import count_rows, parquet_files, read_documents
from mythos_dist.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    InputFile,
    Manifest,
    SplitCounts,
    file_sha256,
    index_fingerprint,
    read_manifest,
)
from mythos_dist.data.pack import Packer
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError

HASHES = ["sha1", "xxh64"]
UNFINISHED = "UNFINISHED"  # a file that marks a folder as ours to delete


def convert(
    inputs: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    seq_len: int,
    out: Path,
    *,
    heldout: float = 0.02,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenize and pack the documents of `inputs` into the folder `out`; returns its manifest as a dict.

    `heldout` is the share of documents, in [0, 1), that go to the held-out split. If `out` already holds this very
    conversion, nothing is done. Raises UserError if it holds anything else, or if the inputs cannot be read.
    """
    if seq_len < 1:
        raise UserError(f"seq_len={seq_len} must be at least 1 token")
    if not 0 <= heldout < 1:
        raise UserError(f"heldout={heldout} is a share of the documents; set it to 0 or more and below 1")
    files = parquet_files(inputs)
    num_rows = count_rows(files)  # opens every file, so a bad one is refused before the work
    settings = _settings(files, tokenizer, seq_len, heldout)
    out = Path(out)
    if done := _earlier_conversion(out, settings):
        print(f"{out}: already converted with these settings; nothing to do", file=sys.stderr)
        return _to_json(done)
    partial = _start_partial(out)
    try:
        with tqdm(total=num_rows, unit=" documents", disable=not (progress and sys.stderr.isatty())) as bar:
            splits = _write_splits(files, tokenizer, settings, partial, bar)
        if not splits["train"].windows:
            raise UserError(
                f"{splits['train'].tokens} tokens of text do not fill one window of seq_len={seq_len}; "
                "give more text or a smaller seq_len"
            )
        shutil.copyfile(tokenizer.path, partial / "tokenizer.model")
        manifest = Manifest(**settings, splits=splits, fingerprint=index_fingerprint(partial))
        (partial / "manifest.json").write_text(json.dumps(_to_json(manifest), indent=2) + "\n", encoding="utf-8")
        partial.rename(out)  # replaces an empty folder, fails on any other
        (out / UNFINISHED).unlink()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return _to_json(manifest)


def is_heldout(text: str, heldout: float) -> bool:
    """Whether a document belongs to the held-out split: a share `heldout` of all texts, by hash."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < heldout * 2**64


def to_dtype(tokens: np.ndarray, vocab_size: int, dtype: str) -> np.ndarray:
    """`tokens` as `dtype`. Raises ValueError if an id is outside the vocabulary: `astype` alone would wrap it."""
    low, high = tokens.min(initial=0), tokens.max(initial=0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids from {low} to {high} do not fit a vocabulary of {vocab_size}")
    assert vocab_size - 1 <= np.iinfo(dtype).max, f"vocab_size={vocab_size} does not fit {dtype}"
    return tokens.astype(dtype)


class _SplitWriter:
    """One split being written: documents in, MDS windows out, and the counts of both."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        from streaming import MDSWriter  # seconds of import, and only a conversion needs it

        self._vocab_size, self._dtype = settings["vocab_size"], settings["dtype"]
        self._packer = Packer(settings["seq_len"], settings["eos_id"])
        self._writer = MDSWriter(out=str(folder), columns={"tokens": f"ndarray:{self._dtype}"}, hashes=HASHES)
        self._documents = self._tokens = self._windows = 0

    def add(self, document: np.ndarray) -> None:
        self._documents += 1
        self._tokens += len(document)
        for window in to_dtype(self._packer.add(document), self._vocab_size, self._dtype):
            self._writer.write({"tokens": window})
            self._windows += 1

    def finish(self) -> SplitCounts:
        self._writer.finish()
        written, dropped = self._windows * self._packer.window, self._packer.pending
        assert self._tokens + self._documents == written + dropped, "tokens were lost"
        return SplitCounts(self._documents, self._tokens, self._windows, written, dropped)


def _settings(files: list[Path], tokenizer: Tokenizer, seq_len: int, heldout: float) -> dict[str, Any]:
    """All that decides the result, under the manifest's names."""
    return {
        "format_version": FORMAT_VERSION,
        "seq_len": seq_len,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        "heldout": heldout,
        "inputs": tuple(InputFile(file.name, file.stat().st_size, file_sha256(file)) for file in files),
    }


def _write_splits(
    files: list[Path], tokenizer: Tokenizer, settings: dict[str, Any], folder: Path, bar: tqdm
) -> dict[str, SplitCounts]:
    writers = {split: _SplitWriter(folder / split, settings) for split in SPLITS}
    for text in read_documents(files):
        split = "heldout" if is_heldout(text, settings["heldout"]) else "train"
        writers[split].add(tokenizer.encode(text))
        bar.update()
    return {split: writer.finish() for split, writer in writers.items()}


def _earlier_conversion(out: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of `out` if it is this conversion, None if there is nothing; UserError if it is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "manifest.json").is_file():
        raise UserError("exists and is not an earlier conversion; choose another folder", str(out))
    manifest = read_manifest(out)
    differing = [
        f"{name}={_shown(value)}, but these shards were made with {_shown(getattr(manifest, name))}"
        for name, value in settings.items()
        if getattr(manifest, name) != value
    ]
    if differing:
        differing[-1] += "; choose another folder, or delete this one to convert again"
        raise UserError(differing, str(out))
    try:
        changed = index_fingerprint(out) != manifest.fingerprint
    except OSError:
        changed = True
    if changed:
        raise UserError(
            "the shards' index.json changed after the conversion; delete the folder and convert again", str(out)
        )
    return manifest


def _start_partial(out: Path) -> Path:
    """A fresh folder beside `out`; what a killed conversion left there is removed."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        if not (partial / UNFINISHED).is_file():
            raise UserError("in the way, and not left by a conversion; move it", str(partial))
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / UNFINISHED).touch()
    return partial


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(manifest)))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{file.name} ({file.size} bytes, sha256 {file.sha256[:8]})" for file in value)
    return str(value)
