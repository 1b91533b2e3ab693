"""Convert one part: read its documents, filter, tokenize and pack them into shards."""

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import numpy as np
import xxhash

from mythos_dist.data.manifest import SPLITS, Skipped
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError, redact
from mythos_dist.prepare.batches import Batch, LongDocument, starts_of, valid_utf8
from mythos_dist.prepare.documents import read_span, unreadable
from mythos_dist.prepare.heldout import is_heldout, text_digest
from mythos_dist.prepare.inputs import Source, reading
from mythos_dist.prepare.part import OUTCOMES, UNFINISHED, ConversionJob, ConversionPart, PartRecord, write_atomically

FRAGMENT_BYTES = 1 << 20  # of a long document, encoded at a time
WRITTEN, EMPTY, LOW_SCORE, DUPLICATE, SHORT, NOT_IN_LOSS = range(len(OUTCOMES))
AddProgress = Callable[[int, int], None]  # (bytes of text, tokens) since the last call


def convert_part(
    converter: "type[PartConverter]",
    job: ConversionJob,
    part: ConversionPart,
    tokenizer: Tokenizer,
    limit: int | None,
    duplicates: np.ndarray,
    add_progress: AddProgress,
) -> PartRecord:
    """Convert a part; write its shards and its record to `job.out`.

    `converter`: of text or of conversations. `limit`: the document that reaches this many tokens (EOS included) is the
    last. `duplicates`: rows of `document_digests` that are left out. Raises UserError for input that cannot be read.
    """
    (job.out / UNFINISHED / f"{part.name}.json").unlink(missing_ok=True)  # of another limit
    for split in SPLITS:
        for folder in (part.name, f"{part.name}.tmp"):
            shutil.rmtree(job.out / split / folder, ignore_errors=True)
    record = converter(job, part, tokenizer, limit, duplicates, add_progress).run()
    for split in SPLITS:
        if record.shards[split]:
            os.rename(job.out / split / f"{part.name}.tmp", job.out / split / part.name)
    write_atomically(job.out / UNFINISHED / f"{part.name}.json", json.dumps(asdict(record)))
    return record


def document_digests(job: ConversionJob, part: ConversionPart, add_progress: AddProgress) -> np.ndarray:
    """uint64 (n, 2): digests of the documents that are neither empty nor below the minimum score, in order."""
    digests: list[bytes] = []
    for item in _read_part(job, part, []):
        if isinstance(item, LongDocument):
            if not _is_low(job, item.score):
                digests.append(_long_digest(item))
        else:
            starts, text = starts_of(item.ends), item.data.data
            for i in np.flatnonzero(_outcomes(job, item) == WRITTEN):
                digests.append(text_digest(text[starts[i] : item.ends[i]]))
            add_progress(len(text), 0)
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def to_dtype(tokens: np.ndarray, vocab_size: int, dtype: str) -> np.ndarray:
    """`tokens` as `dtype`. Raises ValueError if an id is outside the vocabulary: `astype` alone would wrap it."""
    low, high = tokens.min(initial=0), tokens.max(initial=0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids from {low} to {high} do not fit a vocabulary of {vocab_size}")
    assert vocab_size - 1 <= np.iinfo(dtype).max, f"vocab_size={vocab_size} does not fit {dtype}"
    return tokens.astype(dtype)


class PartConverter:
    """Converts the documents of one part and counts the outcomes."""

    def __init__(
        self,
        job: ConversionJob,
        part: ConversionPart,
        tokenizer: Tokenizer,
        limit: int | None,
        duplicates: np.ndarray,
        add_progress: AddProgress,
    ):
        self._job, self._part, self._tokenizer, self._add_progress = job, part, tokenizer, add_progress
        self._unk_id = getattr(tokenizer, "unk_id", None)
        self._record = PartRecord(limit=limit)
        self._duplicates = duplicates
        self._num_candidates = 0  # documents so far that `document_digests` lists
        self._writers = {split: job.writer(split, f"{part.name}.tmp", part.name) for split in SPLITS}

    def run(self) -> PartRecord:
        record = self._record
        self._add_all()
        for split, writer in self._writers.items():
            record.tails[split] = base64.b64encode(self._tail(split).tobytes()).decode()
            record.shards[split] = writer.shards
        return record

    def _add_all(self) -> None:
        """Add the documents of the part, up to the token limit."""
        for item in _read_part(self._job, self._part, self._record.skipped):
            if self._tokens_left() <= 0:
                return
            if isinstance(item, LongDocument):
                self._add_long(item)
            else:
                self._add_batch(item)

    def _tail(self, split: str) -> np.ndarray:
        """Write the last windows of a split; what does not fill one, in the shards' dtype."""
        self._writers[split].finish()
        return self._writers[split].tail

    def _tokens_left(self) -> float:
        limit = self._record.limit
        return float("inf") if limit is None else limit - self._record.tokens_with_eos

    def _add_batch(self, batch: Batch) -> None:
        """Filter and tokenize a batch of documents, and append them to their splits."""
        job, outcomes = self._job, self._filter(batch)
        chosen = np.flatnonzero(outcomes == WRITTEN)
        lengths = np.diff(batch.ends, prepend=0)
        data = batch.data
        if len(chosen) < len(outcomes):
            data = data[np.repeat(outcomes == WRITTEN, lengths)]
        tokens, counts = self._tokenizer.encode_documents(data, np.cumsum(lengths[chosen]))
        if job.filters.min_tokens:
            short = counts < job.filters.min_tokens
            outcomes[chosen[short]] = SHORT
            tokens, chosen, counts = tokens[np.repeat(~short, counts)], chosen[~short], counts[~short]
        last = self._last_until_limit(counts)
        if last < len(chosen):
            outcomes, chosen, counts = outcomes[: chosen[last] + 1], chosen[: last + 1], counts[: last + 1]
            tokens = tokens[: counts.sum()]
        self._count(outcomes)
        self._record.repaired += int(batch.repaired[: len(outcomes)].sum())
        self._write_documents(tokens, counts, self._are_heldout(batch, chosen))
        self._add_progress(len(batch.data), len(tokens))

    def _last_until_limit(self, counts: np.ndarray) -> int:
        """Which of the next documents, of `counts` (n,) tokens, reaches the token limit; n: none does."""
        return int(np.searchsorted(np.cumsum(counts + 1), self._tokens_left()))

    def _count(self, outcomes: np.ndarray) -> None:
        for outcome, number in zip(OUTCOMES, np.bincount(outcomes, minlength=len(OUTCOMES)), strict=True):
            self._record.documents[outcome] += int(number)

    def _filter(self, batch: Batch) -> np.ndarray:
        """int64 (n,): EMPTY, LOW_SCORE, DUPLICATE or, for all others, WRITTEN."""
        outcomes = _outcomes(self._job, batch)
        candidates = np.flatnonzero(outcomes == WRITTEN)
        outcomes[candidates[self._next_are_duplicates(len(candidates))]] = DUPLICATE
        return outcomes

    def _filter_long(self, document: LongDocument) -> int:
        """LOW_SCORE, DUPLICATE or WRITTEN."""
        if _is_low(self._job, document.score):
            return LOW_SCORE
        return DUPLICATE if self._next_are_duplicates(1)[0] else WRITTEN

    def _are_heldout(self, batch: Batch, chosen: np.ndarray) -> np.ndarray:
        """bool (len(chosen),): which of the chosen documents belong to the held-out split."""
        heldout = np.zeros(len(chosen), bool)
        if self._job.heldout:
            starts, text = starts_of(batch.ends), batch.data.data
            for i, document in enumerate(chosen):
                digest = text_digest(text[starts[document] : batch.ends[document]])
                heldout[i] = is_heldout(digest, self._job.heldout)
        return heldout

    def _write_documents(self, tokens: np.ndarray, counts: np.ndarray, heldout: np.ndarray) -> None:
        """Append documents to their splits; `counts` (n,) are their tokens, `heldout` bool (n,)."""
        for split, mask in (("train", ~heldout), ("heldout", heldout)):
            split_tokens = tokens if mask.all() else tokens[np.repeat(mask, counts)]
            self._write(split, split_tokens, np.cumsum(counts[mask]))
            self._record.documents_in[split] += int(mask.sum())

    def _add_long(self, document: LongDocument) -> None:
        outcome = self._filter_long(document)
        if outcome == WRITTEN:
            outcome = self._write_long(document)
        self._record.documents[OUTCOMES[outcome]] += 1

    def _write_long(self, document: LongDocument) -> int:
        """Append a long document to its split; its outcome: WRITTEN or SHORT."""
        heldout = self._job.heldout
        split = "heldout" if heldout and is_heldout(_long_digest(document), heldout) else "train"
        min_tokens = self._job.filters.min_tokens or 0
        pending: list[np.ndarray] = []  # kept until there are `min_tokens`: the document may still be left out
        total = 0
        for tokens in self._encode_long(document):
            pending.append(tokens)
            total += len(tokens)
            if total >= min_tokens:
                self._write(split, np.concatenate(pending), None)
                pending = []
        if total < min_tokens:
            return SHORT
        self._write(split, np.empty(0, np.int32), np.zeros(1, np.int64))  # EOS
        self._record.documents_in[split] += 1
        return WRITTEN

    def _encode_long(self, document: LongDocument) -> Iterator[np.ndarray]:
        """The tokens of a document, a fragment at a time: memory does not grow with the document."""
        rest, continues, repaired = np.empty(0, np.uint8), False, False
        for data, piece_repaired in valid_utf8(document.pieces()):
            repaired |= piece_repaired
            rest = np.concatenate([rest, data])
            while len(rest) > FRAGMENT_BYTES:
                end = self._tokenizer.split_point(rest, FRAGMENT_BYTES)
                tokens, _ = self._tokenizer.encode_documents(rest[:end], np.array([end]), continues)
                self._add_progress(end, len(tokens))
                yield tokens
                rest, continues = rest[end:], True
        if len(rest):
            yield self._tokenizer.encode_documents(rest, np.array([len(rest)]), continues)[0]
        self._record.repaired += repaired

    def _write(self, split: str, tokens: np.ndarray, ends: np.ndarray | None) -> None:
        """Append tokens, with an EOS at each of `ends`; None: the document continues in the next call."""
        eos_id = self._job.eos_id
        if (tokens == eos_id).any():
            raise UserError(
                f"text was encoded as the EOS token {eos_id}; use a tokenizer whose EOS cannot result from text",
                self._part.spans[0].source.path,
            )
        self._record.tokens[split] += len(tokens)
        if self._unk_id is not None:
            self._record.unknown += int(np.count_nonzero(tokens == self._unk_id))
        if ends is not None:
            self._record.added_eos += len(ends)
            tokens = np.insert(tokens, ends, eos_id)
        self._writers[split].add(to_dtype(tokens, self._job.vocab_size, self._job.dtype))

    def _next_are_duplicates(self, number: int) -> np.ndarray:
        """bool (number,): which of the next candidates, as `document_digests` lists them, are duplicates."""
        rows = np.arange(self._num_candidates, self._num_candidates + number)
        self._num_candidates += number
        return np.isin(rows, self._duplicates)


def _read_part(job: ConversionJob, part: ConversionPart, skipped: list[Skipped]) -> Iterator[Batch | LongDocument]:
    """The documents of a part; with `skip_bad`, what cannot be read is appended to `skipped`."""
    for span in part.spans:
        # Without skip_bad damage ends the conversion, whatever was read before.
        span = replace(span, source=replace(span.source, only_intact=job.skip_bad))

        def on_bad(where: str, reason: str, source: Source = span.source) -> None:
            if not job.skip_bad:
                raise unreadable(
                    source, where, reason, "fetch the file again, or skip unreadable input with --skip-bad"
                )
            skipped.append(Skipped(source.name, where, redact(reason)))

        with reading(span.source):
            yield from read_span(span, job.columns, on_bad)


def _outcomes(job: ConversionJob, batch: Batch) -> np.ndarray:
    """int64 (n,): EMPTY, LOW_SCORE or, for all others, WRITTEN."""
    outcomes = np.where(np.diff(batch.ends, prepend=0) > 0, WRITTEN, EMPTY)
    if job.filters.min_score is not None:
        assert batch.scores is not None
        outcomes[(outcomes == WRITTEN) & ~(batch.scores >= job.filters.min_score)] = LOW_SCORE  # also NaN
    return outcomes


def _is_low(job: ConversionJob, score: float) -> bool:
    return job.filters.min_score is not None and not score >= job.filters.min_score


def _long_digest(document: LongDocument) -> bytes:
    state = xxhash.xxh3_128()
    for piece, _ in valid_utf8(document.pieces()):
        state.update(piece.data)
    return state.digest()
