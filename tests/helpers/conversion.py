"""The expected result of a conversion, computed by plain loops, and a tokenizer that encodes bytes."""

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import psutil
import xxhash

SPLITS = ("train", "heldout")
Document = tuple[str, float | None]  # text, score


class ByteTokenizer:
    """Token = byte + `first`; 2 is EOS. `seconds`: delay of each call of `encode_documents`."""

    eos, eos_id = "</s>", 2
    file_name = "tokenizer.model"

    def __init__(self, path: str | Path, first: int = 3, vocab_size: int = 260, seconds: float = 0.0):
        self.path, self._first, self.vocab_size, self._seconds = Path(path), first, vocab_size, seconds
        self.path.touch()
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array([byte + self._first for byte in text.encode()], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) - self._first for i in ids if i != self.eos_id).decode()

    def encode_documents(self, data: np.ndarray, ends: np.ndarray, continues: bool = False):
        bytes(data).decode()  # raises if the converter passes invalid UTF-8
        sleep(self._seconds)
        return data.astype(np.int32) + self._first, np.diff(ends, prepend=0)

    def split_point(self, data: np.ndarray, limit: int) -> int:
        """The last position up to `limit` that is not inside a character."""
        while data[limit] & 0xC0 == 0x80:
            limit -= 1
        return limit


@dataclass
class Expected:
    """The expected content of the folder."""

    windows: dict[str, list[list[int]]]
    dropped: dict[str, list[int]]
    counts: dict[str, int]  # of documents, by outcome
    documents: dict[str, int]
    tokens: dict[str, int]


def expect(
    parts: Sequence[Sequence[Document]],
    tokenizer,
    seq_len: int,
    heldout: float = 0.0,
    min_score: float | None = None,
    min_tokens: int | None = None,
    limit_tokens: int | None = None,
    dedup: bool = False,
) -> Expected:
    """The documents of each part, one after the other; each part's windows, then those of the joined tails.

    If holding out entire documents does not give the share `heldout`, the last windows are held out.
    """
    expected = expect_documents(parts, tokenizer, seq_len, heldout, min_score, min_tokens, limit_tokens, dedup)
    size = {split: expected.tokens[split] + expected.documents[split] for split in SPLITS}
    documents = sum(expected.documents.values())
    too_few = min(documents * heldout, documents * (1 - heldout)) < 1 or not all(expected.windows.values())
    if not heldout or not (too_few or size["train"] < (1 - heldout) * sum(size.values()) / 2):
        return expected
    expected = expect_documents(parts, tokenizer, seq_len, 0.0, min_score, min_tokens, limit_tokens, dedup)
    windows = expected.windows["train"]
    if len(windows) > 1:
        last = min(max(round(len(windows) * heldout), 1), len(windows) - 1)
        expected.windows = {"train": windows[:-last], "heldout": windows[-last:]}
        ids = [i for window in windows[-last:] for i in window]
        for counts, moved in (
            (expected.documents, ids.count(tokenizer.eos_id)),
            (expected.tokens, len(ids) - ids.count(tokenizer.eos_id)),
        ):
            counts["train"] -= moved
            counts["heldout"] += moved
    return expected


def expect_documents(
    parts: Sequence[Sequence[Document]],
    tokenizer,
    seq_len: int,
    heldout: float,
    min_score: float | None,
    min_tokens: int | None,
    limit_tokens: int | None,
    dedup: bool,
) -> Expected:
    """The same, with entire documents held out by a hash of their text, however few there are."""
    counts: Counter[str] = Counter()
    streams: dict[str, list[list[int]]] = {split: [[] for _ in parts] for split in SPLITS}
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    seen: set[str] = set()
    for number, part in enumerate(parts):
        for text, score in part:
            if limit_tokens is not None and sum(tokens.values()) + sum(documents.values()) >= limit_tokens:
                break
            counts["read"] += 1
            if text == "":
                counts["empty"] += 1
                continue
            if min_score is not None and (score is None or not score >= min_score):
                counts["low_score"] += 1
                continue
            if dedup and text in seen:
                counts["duplicate"] += 1
                continue
            seen.add(text)
            ids = [int(i) for i in tokenizer.encode(text)]
            if len(ids) < (min_tokens or 0):
                counts["short"] += 1
                continue
            counts["written"] += 1
            text_hash = int.from_bytes(xxhash.xxh3_128(text.encode()).digest()[:8], "big")
            split = "heldout" if text_hash / 2**64 < heldout else "train"
            streams[split][number] += [*ids, tokenizer.eos_id]
            documents[split] += 1
            tokens[split] += len(ids)
    windows, dropped = {}, {}
    for split in SPLITS:
        full, tails = [], []
        for stream in [*streams[split], tails]:
            while len(stream) >= seq_len + 1:
                full.append(stream[: seq_len + 1])
                del stream[: seq_len + 1]
            if stream is not tails:
                tails += stream
        windows[split], dropped[split] = full, tails
    return Expected(windows, dropped, dict(counts), documents, tokens)


def read_windows(folder: Path, split: str) -> list[list[int]]:
    """All windows of a split in the order of its index, read with struct from the MDS files."""
    windows = []
    for shard in json.loads((folder / split / "index.json").read_text())["shards"]:
        content = (folder / split / shard["raw_data"]["basename"]).read_bytes()
        (encoding,) = shard["column_encodings"]
        (samples,) = struct.unpack_from("<I", content)
        offsets = struct.unpack_from(f"<{samples + 1}I", content, 4)
        assert samples == shard["samples"] and offsets[-1] == len(content) == shard["raw_data"]["bytes"]
        letter = {"uint16": "H", "uint32": "I"}[encoding.split(":")[1]]
        for a, b in pairwise(offsets):
            windows.append([number for (number,) in struct.iter_unpack(f"<{letter}", content[a:b])])
    return windows


def assert_holds(folder: Path, manifest, expected: Expected) -> None:
    """Check windows, numbers of dropped tokens and all counts."""
    assert {split: read_windows(folder, split) for split in SPLITS} == expected.windows
    counts = manifest.documents
    assert counts.read == counts.written + counts.empty + counts.low_score + counts.duplicate + counts.short
    for name in ("read", "written", "empty", "low_score", "duplicate", "short"):
        assert getattr(counts, name) == expected.counts.get(name, 0), name
    for split, actual in manifest.splits.items():
        assert (actual.documents, actual.tokens) == (expected.documents[split], expected.tokens[split])
        assert actual.windows == len(expected.windows[split])
        assert actual.tokens_written == sum(map(len, expected.windows[split]))
        assert actual.tokens_dropped == len(expected.dropped[split])
        assert actual.eos_dropped == expected.dropped[split].count(2)
        assert actual.tokens + actual.documents == actual.tokens_written + actual.tokens_dropped


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def ended(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Whether all processes end within `seconds`. Zombies count as ended: a container may have no process that reaps
    them."""
    deadline = monotonic() + seconds
    left = list(processes)
    while left and monotonic() < deadline:
        sleep(0.01)
        left = [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return not left
