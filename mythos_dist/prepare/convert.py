"""Text to MDS shards, in a folder that needs nothing else.

    out/train/        index.json, part-*/shard.*.mds: column `tokens`, windows of seq_len + 1 token ids
    out/heldout/      the same; a document is held out by a hash of its text, so order and file names do not matter
                      (of too few documents the last windows of the text are held out, see heldout.py)
    out/tokenizer.model (or .json), out/manifest.json

Inputs are divided into parts by their own row groups alone, parts are converted by any number of workers, and what
fills no window at the end of a part is joined with what the other parts left: `part-tails`. A conversion that was
stopped goes on where it was when it is started again; out/unfinished holds what is known so far. The manifest is
written last.
"""

import base64
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import sleep
from typing import Any, TextIO

import numpy as np

from mythos_dist.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    DocumentCounts,
    Filters,
    InputFile,
    ShardManifest,
    Skipped,
    SplitCounts,
    index_fingerprint,
)
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.prepare import pool
from mythos_dist.prepare.documents import Columns, Units, units_of
from mythos_dist.prepare.duplicates import find_duplicates, save_digests
from mythos_dist.prepare.heldout import (
    CUT,
    KEPT,
    begin_one_stream,
    cut_windows,
    one_stream,
    split_counts,
    too_few_documents,
)
from mythos_dist.prepare.inputs import MAX_RATIO, Inputs, Listing, Source, Unreadable, content_hash, list_inputs
from mythos_dist.prepare.mds import ShardWriter
from mythos_dist.prepare.part import (
    UNFINISHED,
    Job,
    Part,
    Record,
    convert_part,
    document_digests,
    read_record,
    stored,
    write_atomically,
)
from mythos_dist.prepare.pool import Workers
from mythos_dist.prepare.progress import Progress
from mythos_dist.prepare.resume import earlier_conversion
from mythos_dist.units import count

# A part is about 1 / PARTS of the text, within these bounds: enough parts for many workers, few enough files.
PARTS = 256
MIN_PART_BYTES, MAX_PART_BYTES = 1 << 21, 128 << 20
TRIES, RETRY_SECONDS = 4, 2.0  # of a part with remote input; the pause doubles
TAILS = "part-tails"
ADDED = {"train": (KEPT,), "heldout": (CUT,)}  # by an earlier attempt to finish


def convert(
    inputs: Inputs,
    tokenizer: Tokenizer,
    seq_len: int,
    out: str | Path,
    *,
    heldout: float = 0.02,
    compression: str | None = None,
    filters: Filters | None = None,
    columns: Columns | None = None,
    skip_bad: bool = False,
    max_unpack_ratio: float = MAX_RATIO,
    workers: int = 0,
    quiet: bool = False,
) -> ShardManifest:
    """Tokenize and pack the documents of `inputs` into the folder `out`; returns its manifest.

    `heldout`: share of documents, in [0, 1), for the held-out split; of windows where there are too few documents, see
    heldout.py; 0: training has no held-out split. `compression`: zstd or zstd:1 … zstd:22.
    `skip_bad`: what cannot be read is left out and counted. `max_unpack_ratio`: how many times its size an input may
    unpack to (64 MB are always allowed). `workers`: processes; 0: none but this one. `quiet`: no
    progress on standard error. If `out` already holds this very conversion, nothing is done; if it holds the beginning
    of it, it is finished. Raises UserError if it holds anything else, or if the inputs cannot be read.
    """
    filters, columns = filters or Filters(), columns or Columns()
    columns = replace(columns, score="score" if filters.min_score is not None else None)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    job = Job(
        *(Path(out), seq_len, dtype, tokenizer.vocab_size, tokenizer.eos_id),
        *(heldout, filters, columns, compression, skip_bad),
    )
    _check(job, workers)
    listing = list_inputs(inputs, job.out, max_unpack_ratio)
    try:
        return _convert(listing, tokenizer, job, workers, quiet)
    except OSError as error:
        raise UserError(
            f"{error.strerror or error}: mend that (a full disk: make room) and give the same command again; "
            "it goes on where it stopped",
            error.filename or str(out),
        ) from None


def _convert(listing: Listing, tokenizer: Tokenizer, job: Job, workers: int, quiet: bool) -> ShardManifest:
    with Workers(workers, tokenizer) as crew, Progress(crew, quiet) as progress:
        found = _inspect(listing, job, crew, progress)
        settings = _settings(found, job, tokenizer)
        if done := earlier_conversion(job.out, settings):
            progress.say(f"{job.out}: already converted with these settings; nothing to do")
            return done
        for line in listing.lines():
            progress.say(line)
        with _claim(job.out, settings):
            parts = list(_parts([one.units for one in found if one.units]))
            duplicates = _duplicates(job, parts, crew, progress) if job.filters.dedup else None
            records: list[Record] = []
            if not one_stream(job):
                records = list(_records(job, parts, duplicates, crew, progress))
                crew.stop()  # behind the limit they may still be writing
                if too_few_documents(job, records):
                    begin_one_stream(job)
                    crew.start()
            if one_stream(job):
                records = list(_records(replace(job, heldout=0.0), parts, duplicates, crew, progress))
                crew.stop()
            skipped = [Skipped(one.name, "folder", f"{one.reason} ({one.detail})") for one in listing.unreadable]
            skipped += [one.skipped for one in found if one.skipped]
            skipped += [one for record in records for one in record.skipped]
            settings["left_out"] = tuple(listing.left_out)
            return _finish(job, records, settings, skipped, tokenizer)


def _check(job: Job, workers: int) -> None:
    problems = []
    if job.seq_len < 1:
        problems.append(f"seq_len={job.seq_len} must be at least 1 token")
    if not 0 <= job.heldout < 1:
        problems.append(f"heldout={job.heldout} is a share of the documents; set it to 0 or more and below 1")
    if job.compression is not None and not re.fullmatch(r"zstd(:([1-9]|1\d|2[0-2]))?", job.compression):
        problems.append(f"compression={job.compression} is not known; set it to zstd, or zstd:1 … zstd:22")
    for name in ("min_tokens", "limit_tokens"):
        value = getattr(job.filters, name)
        if value is not None and value < 1:
            problems.append(f"{name}={value} must be at least 1")
    if workers < 0:
        problems.append(f"workers={workers} must not be negative")
    if problems:
        raise UserError(problems)


@dataclass(frozen=True)
class _Found:
    """An input file that was looked into."""

    source: Source
    hash: str = ""
    units: Units | None = None
    skipped: Skipped | None = None


def _look_into(item: tuple[Source, Columns]) -> "_Found | UserError":
    source, columns = item
    pool.count(source.size, 0)
    for number in itertools.count(1):
        try:
            units = units_of(source, columns)
            return _Found(source, content_hash(source), units)
        except UserError as error:
            if number == TRIES or not source.remote or not isinstance(error, Unreadable):
                return error
            sleep(RETRY_SECONDS * 2 ** (number - 1))
    raise AssertionError("never")


def _inspect(listing: Listing, job: Job, workers: Workers, progress: Progress) -> list[_Found]:
    """Hash and spans of every input. Raises UserError with all files that cannot be read, unless they are skipped."""
    sources = listing.sources
    progress.begin("reading inputs", sum(source.size for source in sources))
    found = []
    problems = [] if job.skip_bad else [f"{one.name}: {one.reason} ({one.detail})" for one in listing.unreadable]
    looked = workers.map(_look_into, [(source, job.columns) for source in sources], progress.tick)
    for source, result in zip(sources, looked, strict=True):
        if isinstance(result, _Found):
            found.append(result)
        elif job.skip_bad:
            found.append(_Found(source, skipped=Skipped(source.name, "file", "; ".join(result.problems))))
        else:
            problems += [f"{result.source}: {problem}" if result.source else problem for problem in result.problems]
    if problems:
        raise UserError(problems)
    return found


def _settings(found: list[_Found], job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the result, under the manifest's names."""
    return {
        "format_version": FORMAT_VERSION,
        "seq_len": job.seq_len,
        "dtype": job.dtype,
        "vocab_size": job.vocab_size,
        "eos": tokenizer.eos,
        "eos_id": job.eos_id,
        "tokenizer": tokenizer.file_name,
        "tokenizer_sha256": tokenizer.sha256,
        "heldout": job.heldout,
        "compression": job.compression,
        "text_column": job.columns.text,
        "sample_by": job.columns.sample_by,
        "filters": job.filters,
        "inputs": tuple(InputFile(one.source.name, one.source.size, one.hash) for one in found),
    }


def _parts(units: list[Units]) -> Iterator[Part]:
    """Neighbouring units, joined into parts of about equal size; by the inputs alone."""
    target = min(max(sum(int(one.sizes.sum()) for one in units) // PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
    number, size, spans = 0, 0, []
    for one in units:
        first = 0
        for unit, unit_size in enumerate(one.sizes.tolist()):
            if size and size + unit_size / 2 > target:
                spans += [one.span(first, unit)] if unit > first else []
                yield Part(number, tuple(spans))
                number, size, spans, first = number + 1, 0, [], unit
            size += unit_size
        if len(one.sizes) > first:
            spans.append(one.span(first, len(one.sizes)))
    if spans:
        yield Part(number, tuple(spans))


def _claim(out: Path, settings: dict[str, Any]) -> TextIO:
    """Make `out` this process's as long as the returned file is open, and write down what is being made."""
    folder = out / UNFINISHED
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError("another conversion is writing here; wait for it, or stop it", str(out)) from None
    write_atomically(folder / "settings.json", json.dumps(settings, default=asdict))
    return lock


def _digest_part(item: tuple[Job, Part]) -> None:
    job, part = item
    digests = _with_retries(job, part, lambda job: document_digests(job, part, pool.count))
    save_digests(job.out / UNFINISHED / f"{part.name}.digests.npy", digests)


def _duplicates(job: Job, parts: list[Part], workers: Workers, progress: Progress) -> list[np.ndarray]:
    """Which documents of each part are duplicates."""
    files = [job.out / UNFINISHED / f"{part.name}.digests.npy" for part in parts]
    missing = [part for part, file in zip(parts, files, strict=True) if not file.is_file()]
    progress.begin("looking for duplicates", sum(part.size for part in missing))
    for _ in workers.map(_digest_part, [(job, part) for part in missing], progress.tick):
        pass
    return find_duplicates(files)


def _convert_part(item: tuple[Job, Part, int | None, np.ndarray]) -> Record:
    job, part, limit, duplicates = item
    return _with_retries(job, part, lambda job: convert_part(job, part, pool.shared(), limit, duplicates, pool.count))


def _with_retries(job: Job, part: Part, attempt: Any) -> Any:
    """`attempt(job)`; where input comes over a network, several times, and only the last time may skip anything."""
    tries = TRIES if any(span.source.remote for span in part.spans) else 1
    for number in range(tries - 1):
        try:
            return attempt(replace(job, skip_bad=False))
        except UserError:
            sleep(RETRY_SECONDS * 2**number)
    return attempt(job)


def _records(
    job: Job, parts: list[Part], duplicates: list[np.ndarray] | None, workers: Workers, progress: Progress
) -> Iterator[Record]:
    """The records of all parts in order, up to the one in which the limit of tokens is reached."""
    none = np.empty(0, np.int64)
    limit = job.filters.limit_tokens
    finished = [read_record(job, part) for part in parts]
    finished = [record if record and (record.limit is None or limit) else None for record in finished]
    what = "converting again, without held-out documents" if one_stream(job) else "converting"
    progress.begin(what, sum(part.size for part in parts))
    progress.skip(sum(part.size for part, record in zip(parts, finished, strict=True) if record))

    def item(part: Part, room: int | None) -> tuple[Job, Part, int | None, np.ndarray]:
        return job, part, room, none if duplicates is None else duplicates[part.number]

    todo = (part for part, record in zip(parts, finished, strict=True) if not record)
    fresh = workers.map(_convert_part, (item(part, None) for part in todo), progress.tick)
    room = limit
    for part, record in zip(parts, finished, strict=True):
        record = record or next(fresh)
        if room is not None and (record.tokens_with_eos >= room or record.limit is not None) and record.limit != room:
            (record,) = workers.map(_convert_part, [item(part, room)], progress.tick)
        progress.wrote(record.disk_bytes)
        yield record
        if room is not None:
            room -= record.tokens_with_eos
            if room <= 0:
                return


def _finish(
    job: Job, records: list[Record], settings: dict[str, Any], skipped: list[Skipped], tokenizer: Tokenizer
) -> ShardManifest:
    """Join the tails, write the indexes and the manifest, and remove everything that is not part of the result."""
    shards, splits = {}, {}
    for split in SPLITS:
        shards[split], splits[split] = _join(job, split, records)
    if cut := one_stream(job):
        shards["train"], shards["heldout"], eos = cut_windows(job, shards["train"])
        windows = sum(shard["samples"] for shard in shards["heldout"])
        splits = split_counts(job, splits["train"], windows, eos)
    if not splits["train"].windows:
        tokens = splits["train"].tokens
        for name in (*SPLITS, UNFINISHED):
            shutil.rmtree(job.out / name, ignore_errors=True)
        with suppress(OSError):  # somebody's files in it
            job.out.rmdir()
        raise UserError(
            f"{count(tokens, 'token')} of text {'does' if tokens == 1 else 'do'} not fill one window of "
            f"seq_len={job.seq_len}; "
            "give more text or a smaller seq_len",
            str(job.out),
        )
    for split in SPLITS:
        _write_index(job, split, shards[split])
    documents = {fate: sum(record.documents[fate] for record in records) for fate in records[0].documents}
    counts = DocumentCounts(
        read=sum(documents.values()), **documents, repaired=sum(record.repaired for record in records)
    )
    shutil.copyfile(tokenizer.path, job.out / f"{tokenizer.file_name}.tmp")
    os.replace(job.out / f"{tokenizer.file_name}.tmp", job.out / tokenizer.file_name)
    unknown = sum(record.unknown for record in records)
    manifest = ShardManifest(
        **settings,
        unknown_tokens=unknown,
        documents=counts,
        splits=splits,
        skipped=tuple(skipped),
        fingerprint=index_fingerprint(job.out),
        heldout_by="window" if cut else "document",
    )
    assert counts.written == sum(split.documents for split in splits.values()), "documents were lost"
    write_atomically(job.out / "manifest.json", json.dumps(manifest.to_json(), indent=2) + "\n")
    shutil.rmtree(job.out / UNFINISHED)
    return manifest


def _join(job: Job, split: str, records: list[Record]) -> tuple[list[dict[str, Any]], SplitCounts]:
    """A split's entries for index.json, those of the joined tails last, and what they hold."""
    folder = job.out / split
    for name in (TAILS, *ADDED[split]):
        shutil.rmtree(folder / name, ignore_errors=True)
    tails = ShardWriter(folder / TAILS, job.seq_len, job.dtype, job.compression, f"{TAILS}/")
    for record in records:
        tails.add(np.frombuffer(base64.b64decode(record.tails[split]), job.dtype))
    tails.finish()
    shards = [shard for record in records for shard in record.shards[split]] + tails.shards
    documents = sum(record.documents_in[split] for record in records)
    tokens = sum(record.tokens[split] for record in records)
    windows = sum(shard["samples"] for shard in shards)
    written, dropped = windows * (job.seq_len + 1), len(tails.tail)
    assert tokens + documents == written + dropped, "tokens were lost"
    eos_dropped = int((tails.tail == job.eos_id).sum())
    return shards, SplitCounts(documents, tokens, windows, written, dropped, eos_dropped)


def _write_index(job: Job, split: str, shards: list[dict[str, Any]]) -> None:
    """Write a split's index.json, and remove shards that are not in it: unfinished, behind the limit or cut off."""
    folder = job.out / split
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    named = {stored(shard)["basename"] for shard in shards}
    used = {name.split("/")[0] for name in named}
    for part in folder.glob("part-*/"):
        if part.name not in used and re.fullmatch(r"part-(\d+(\.tmp)?|tails|kept|cut)", part.name):
            shutil.rmtree(part)
        elif part.name in used:
            for file in part.glob("shard.*"):
                if f"{part.name}/{file.name}" not in named and re.fullmatch(r"shard\.\d+\.mds(\.zstd)?", file.name):
                    file.unlink()
