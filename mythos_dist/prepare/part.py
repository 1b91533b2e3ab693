"""One part of a conversion: a run of spans -> shards, and a record that is written last.

A part is the unit of work and of resuming. Which spans it has depends on the inputs alone, so the shards are the same
bytes at any number of workers. Its files appear under their own names only when they are whole:

    out/train/part-00007/shard.00000.mds    (built in part-00007.tmp)
    out/heldout/part-00007/shard.00000.mds
    out/unfinished/part-00007.json          the record: counts, index entries, and the tokens that filled no window
"""

import base64
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mythos_dist.data.manifest import SPLITS, Filters, Skipped, read_json
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError, redact
from mythos_dist.files import write_atomically as write_file
from mythos_dist.prepare.documents import Batch, Columns, LongDocument, Span, read_span, unreadable, valid_utf8
from mythos_dist.prepare.inputs import Source, reading
from mythos_dist.prepare.mds import ShardWriter

# Only one conversion at a time writes into a folder, so the next one replaces what a killed one has left.
write_atomically = functools.partial(write_file, ending=".tmp")
UNFINISHED = "unfinished"  # the folder of records; it goes when the manifest is there
FRAGMENT_BYTES = 1 << 20  # of a long document, encoded at a time
FATES = ("written", "empty", "low_score", "duplicate", "short")  # of a document; names of DocumentCounts
WRITTEN, EMPTY, LOW_SCORE, DUPLICATE, SHORT = range(len(FATES))
Progress = Callable[[int, int], None]  # (bytes of text, tokens) since the last call


@dataclass(frozen=True)
class Job:
    """What is the same for all parts."""

    out: Path
    seq_len: int
    dtype: str
    vocab_size: int
    eos_id: int
    heldout: float
    filters: Filters
    columns: Columns
    compression: str | None
    skip_bad: bool


@dataclass(frozen=True)
class Part:
    number: int
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        return f"part-{self.number:05}"

    @property
    def size(self) -> int:
        """Bytes of text, about."""
        return sum(span.size for span in self.spans)


@dataclass
class Record:
    """What came out of a part."""

    limit: int | None = None  # tokens that were left of --limit-tokens when it began
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    repaired: int = 0
    unknown: int = 0  # tokens that stand for characters that the tokenizer does not know
    documents_in: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # without EOS
    shards: dict[str, list[dict]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    tails: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SPLITS, ""))  # base64 of the tokens
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def tokens_with_eos(self) -> int:
        return sum(self.tokens.values()) + sum(self.documents_in.values())

    @property
    def disk_bytes(self) -> int:
        return sum(stored(shard)["bytes"] for shards in self.shards.values() for shard in shards)


def stored(shard: dict) -> dict:
    """Of an index entry, the file that lies on disk."""
    return shard["zip_data"] or shard["raw_data"]


def digest(text: Any) -> bytes:
    """xxh3_128 of a document's bytes."""
    return xxhash.xxh3_128_digest(text)


def is_heldout(text_digest: bytes, heldout: float) -> bool:
    """Whether a document belongs to the held-out split: a share `heldout` of all texts, by hash."""
    return int.from_bytes(text_digest[:8], "big") < heldout * 2**64


def to_dtype(tokens: np.ndarray, vocab_size: int, dtype: str) -> np.ndarray:
    """`tokens` as `dtype`. Raises ValueError if an id is outside the vocabulary: `astype` alone would wrap it."""
    low, high = tokens.min(initial=0), tokens.max(initial=0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids from {low} to {high} do not fit a vocabulary of {vocab_size}")
    assert vocab_size - 1 <= np.iinfo(dtype).max, f"vocab_size={vocab_size} does not fit {dtype}"
    return tokens.astype(dtype)


def document_digests(job: Job, part: Part, progress: Progress) -> np.ndarray:
    """uint64 (n, 2): digests of the documents that are neither empty nor below the least score, in order."""
    found: list[bytes] = []
    for documents in _documents(job, part, []):
        if isinstance(documents, LongDocument):
            if not _is_low(job, documents.score):
                found.append(_long_digest(documents))
        else:
            starts = _starts(documents.ends)
            text = documents.data.data
            found += [
                digest(text[starts[i] : documents.ends[i]]) for i in np.flatnonzero(_fates(job, documents) == WRITTEN)
            ]
            progress(len(text), 0)
    return np.frombuffer(b"".join(found), "<u8").reshape(-1, 2)


def convert_part(
    job: Job, part: Part, tokenizer: Tokenizer, limit: int | None, duplicates: np.ndarray, progress: Progress
) -> Record:
    """Convert a part and leave its shards and its record in `job.out`.

    `limit`: the document with which so many tokens (EOS counted) are reached is the last. `duplicates`: which of the
    documents that `document_digests` lists are left out. Raises UserError for input that cannot be read.
    """
    for split in SPLITS:
        for folder in (part.name, f"{part.name}.tmp"):
            shutil.rmtree(job.out / split / folder, ignore_errors=True)
    record = _Conversion(job, part, tokenizer, limit, duplicates, progress).run()
    for split in SPLITS:
        if record.shards[split]:
            os.rename(job.out / split / f"{part.name}.tmp", job.out / split / part.name)
    write_atomically(job.out / UNFINISHED / f"{part.name}.json", json.dumps(asdict(record)))
    return record


def read_record(job: Job, part: Part) -> Record | None:
    """The record of a part that is whole: every file is there in its size. Otherwise None.

    With a held-out share of 0 it must have no held-out document: see heldout.py.
    """
    try:
        raw = read_json((job.out / UNFINISHED / f"{part.name}.json").read_bytes())
        if raw.keys() != asdict(Record()).keys():  # of another version
            return None
        record = Record(**raw)
        record.skipped = [Skipped(**one) for one in record.skipped]  # type: ignore[arg-type]
        files = [(split, stored(shard)) for split in SPLITS for shard in record.shards[split]]
        whole = all((job.out / split / file["basename"]).stat().st_size == file["bytes"] for split, file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole and (job.heldout or not record.documents_in["heldout"]) else None


class _Conversion:
    """A part being converted."""

    def __init__(
        self, job: Job, part: Part, tokenizer: Tokenizer, limit: int | None, duplicates: np.ndarray, progress: Progress
    ):
        self._job, self._part, self._tokenizer, self._progress = job, part, tokenizer, progress
        self._unk_id = getattr(tokenizer, "unk_id", None)
        self._record = Record(limit=limit)
        self._duplicates, self._candidates = duplicates, 0  # candidates: as `document_digests` lists them
        self._writers = {
            split: ShardWriter(
                job.out / split / f"{part.name}.tmp", job.seq_len, job.dtype, job.compression, f"{part.name}/"
            )
            for split in SPLITS
        }

    def run(self) -> Record:
        record = self._record
        for documents in _documents(self._job, self._part, record.skipped):
            if self._room() <= 0:
                break
            if isinstance(documents, LongDocument):
                self._add_long(documents)
            else:
                self._add(documents)
        for split, writer in self._writers.items():
            writer.finish()
            record.shards[split] = writer.shards
            record.tails[split] = base64.b64encode(writer.tail.tobytes()).decode()
        return record

    def _room(self) -> float:
        """Tokens left of the limit."""
        limit = self._record.limit
        return float("inf") if limit is None else limit - self._record.tokens_with_eos

    def _add(self, batch: Batch) -> None:
        job, starts = self._job, _starts(batch.ends)
        fates = _fates(job, batch)
        candidates = np.flatnonzero(fates == WRITTEN)
        fates[candidates[self._are_duplicates(len(candidates))]] = DUPLICATE
        chosen = np.flatnonzero(fates == WRITTEN)
        lengths = batch.ends - starts
        data = batch.data if len(chosen) == len(fates) else batch.data[np.repeat(fates == WRITTEN, lengths)]
        tokens, counts = self._tokenizer.encode_documents(data, np.cumsum(lengths[chosen]))
        if job.filters.min_tokens:
            short = counts < job.filters.min_tokens
            fates[chosen[short]] = SHORT
            tokens, chosen, counts = tokens[np.repeat(~short, counts)], chosen[~short], counts[~short]
        last = int(np.searchsorted(np.cumsum(counts + 1), self._room()))  # the document that reaches the limit
        if last < len(chosen):
            fates, chosen, counts = fates[: chosen[last] + 1], chosen[: last + 1], counts[: last + 1]
            tokens = tokens[: counts.sum()]
        for i, count in enumerate(np.bincount(fates, minlength=len(FATES))):
            self._record.documents[FATES[i]] += int(count)
        self._record.repaired += int(batch.repaired[: len(fates)].sum())
        heldout = np.zeros(len(chosen), bool)
        if job.heldout:
            text = batch.data.data
            heldout[:] = [is_heldout(digest(text[starts[i] : batch.ends[i]]), job.heldout) for i in chosen]
        for split, mask in (("train", ~heldout), ("heldout", heldout)):
            these = counts[mask]
            self._write(split, tokens if mask.all() else tokens[np.repeat(mask, counts)], np.cumsum(these))
            self._record.documents_in[split] += len(these)
        self._progress(len(batch.data), len(tokens))

    def _add_long(self, document: LongDocument) -> None:
        record, least = self._record, self._job.filters.min_tokens or 0
        fate = LOW_SCORE if _is_low(self._job, document.score) else WRITTEN
        if fate == WRITTEN and self._are_duplicates(1)[0]:
            fate = DUPLICATE
        if fate == WRITTEN:
            split = (
                "heldout" if self._job.heldout and is_heldout(_long_digest(document), self._job.heldout) else "train"
            )
            held: list[np.ndarray] = []  # until there are `min_tokens`, the document may still be left out
            count = 0
            for tokens in self._encode_long(document):
                held.append(tokens)
                count += len(tokens)
                if count >= least:
                    self._write(split, np.concatenate(held), None)
                    held = []
            if count < least:
                fate = SHORT
            else:
                self._write(split, np.empty(0, np.int32), np.zeros(1, np.int64))  # EOS
                record.documents_in[split] += 1
        record.documents[FATES[fate]] += 1

    def _encode_long(self, document: LongDocument) -> Iterator[np.ndarray]:
        """The tokens of a document, a fragment at a time: memory does not grow with the document."""
        rest, continues, repaired = np.empty(0, np.uint8), False, False
        for data, mended in valid_utf8(document.pieces()):
            repaired |= mended
            rest = np.concatenate([rest, data])
            while len(rest) > FRAGMENT_BYTES:
                end = self._tokenizer.cut(rest, FRAGMENT_BYTES)
                tokens, _ = self._tokenizer.encode_documents(rest[:end], np.array([end]), continues)
                self._progress(end, len(tokens))
                yield tokens
                rest, continues = rest[end:], True
        if len(rest):
            yield self._tokenizer.encode_documents(rest, np.array([len(rest)]), continues)[0]
        self._record.repaired += repaired

    def _write(self, split: str, tokens: np.ndarray, ends: np.ndarray | None) -> None:
        """Append tokens with an EOS at each of `ends`; without `ends`, the document goes on."""
        eos_id = self._job.eos_id
        if (tokens == eos_id).any():
            raise UserError(
                f"text became the token {eos_id} that ends documents; use a tokenizer whose EOS text cannot spell",
                self._part.spans[0].source.path,
            )
        self._record.tokens[split] += len(tokens)
        if self._unk_id is not None:
            self._record.unknown += int(np.count_nonzero(tokens == self._unk_id))
        if ends is not None:
            tokens = np.insert(tokens, ends, eos_id)
        self._writers[split].add(to_dtype(tokens, self._job.vocab_size, self._job.dtype))

    def _are_duplicates(self, count: int) -> np.ndarray:
        """Which of the next `count` candidates are duplicates."""
        numbers = np.arange(self._candidates, self._candidates + count)
        self._candidates += count
        return np.isin(numbers, self._duplicates)


def _documents(job: Job, part: Part, skipped: list[Skipped]) -> Iterator[Batch | LongDocument]:
    for span in part.spans:

        def bad(where: str, reason: str, source: Source = span.source) -> None:
            if not job.skip_bad:
                advice = "fetch the file again, or leave out what cannot be read with --skip-bad"
                raise unreadable(source, where, reason, advice)
            skipped.append(Skipped(source.name, where, redact(reason)))

        with reading(span.source):
            yield from read_span(span, job.columns, bad)


def _fates(job: Job, batch: Batch) -> np.ndarray:
    """int64 (n,): EMPTY, LOW_SCORE or, for all others, WRITTEN."""
    fates = np.where(np.diff(batch.ends, prepend=0) > 0, WRITTEN, EMPTY)
    if job.filters.min_score is not None:
        assert batch.scores is not None
        fates[(fates == WRITTEN) & ~(batch.scores >= job.filters.min_score)] = LOW_SCORE  # NaN is low as well
    return fates


def _is_low(job: Job, score: float) -> bool:
    return job.filters.min_score is not None and not score >= job.filters.min_score


def _starts(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], ends[:-1]]).astype(np.int64)


def _long_digest(document: LongDocument) -> bytes:
    state = xxhash.xxh3_128()
    for piece, _ in valid_utf8(document.pieces()):
        state.update(piece.data)
    return state.digest()
