"""Convert text, or token files, to MDS shards, in a folder that training can read without anything else.

    out/train/        index.json, part-*/shard.*.mds: column `tokens`, windows of seq_len + 1 token ids
    out/heldout/      the same; a document is held out by a hash of its text, so order and file names do not matter
                      (with too few documents, the last windows of the text are held out, see heldout.py)
    out/tokenizer.model (or .json), out/manifest.json

The inputs are divided into parts that depend on the inputs alone, any number of workers converts the parts, and the
partial windows at their ends are joined in `part-tails`. An interrupted conversion resumes when it is started again;
out/unfinished has the records of finished parts. The manifest is written last.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

import numpy as np

from mythos_dist.data.manifest import FORMAT_VERSION, Filters, InputFile, ShardManifest, Skipped
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.prepare import pool
from mythos_dist.prepare.chat_converter import ChatPartConverter
from mythos_dist.prepare.conversion_bar import ConversionBar
from mythos_dist.prepare.duplicates import find_duplicates, save_digests
from mythos_dist.prepare.finish import finish_conversion
from mythos_dist.prepare.heldout import is_one_stream, switch_to_one_stream, too_few_documents
from mythos_dist.prepare.inputs import MAX_RATIO, Inputs, Source, Unreadable, content_hash
from mythos_dist.prepare.listing import Listing, list_inputs
from mythos_dist.prepare.output import Output
from mythos_dist.prepare.part import (
    UNFINISHED,
    ConversionJob,
    ConversionPart,
    PartRecord,
    read_record,
    split_into_parts,
)
from mythos_dist.prepare.part_converter import PartConverter, convert_part, document_digests
from mythos_dist.prepare.pool import WorkerPool
from mythos_dist.prepare.resume import lock_output
from mythos_dist.prepare.spans import Chunks, Columns, divide_file
from mythos_dist.prepare.store_output import StoreOutput
from mythos_dist.prepare.token_converter import TokenPartConverter
from mythos_dist.prepare.tokens.copies import TokenCopies
from mythos_dist.prepare.tokens.documents import LONG_TOKENS
from mythos_dist.prepare.tokens.files import inspect_source
from mythos_dist.prepare.tokens.listing import list_token_sources
from mythos_dist.prepare.tokens.preview import preview_lines
from mythos_dist.urls import is_url

ATTEMPTS, RETRY_SECONDS = 4, 2.0  # to read remote input; the pause doubles
NO_ROWS = np.empty(0, np.int64)
Result = TypeVar("Result")


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
    scratch: str | Path | None = None,
) -> ShardManifest:
    """Tokenize and pack the documents of `inputs` into the folder `out`, which may be a URL; returns its manifest.

    `heldout`: share of documents in [0, 1) for the held-out split (of windows if there are too few documents); 0: no
    held-out split. `compression`: zstd or zstd:1 … zstd:22. `skip_bad`: skip and count what cannot be read.
    `max_unpack_ratio`: how many times its size an input may unpack to (64 MB are always allowed). `workers`:
    processes; 0: only this one. `quiet`: no progress on standard error. `scratch`: of a URL `out`, where parts are made
    before they are uploaded, and for copies of token files that are in stores; None: below the system's temporary
    folder.

    If `out` holds this conversion, nothing is done; if it holds an unfinished one, it is resumed. Raises UserError if
    it holds anything else, or if the inputs cannot be read.

    >>> from mythos_dist import Tokenizer, convert
    >>> tokenizer = Tokenizer.load("shards/tokenizer.model")
    >>> manifest = convert("text.jsonl", tokenizer, 32, "converted", heldout=0.1, quiet=True)
    >>> manifest.seq_len, sorted(manifest.splits)
    (32, ['heldout', 'train'])
    """
    filters, columns = filters or Filters(), columns or Columns()
    output = StoreOutput(str(out), scratch) if is_url(out) else Output(Path(out))
    job = ConversionJob(
        out=output.out,
        seq_len=seq_len,
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        heldout=heldout,
        filters=filters,
        columns=replace(columns, score="score" if filters.min_score is not None else None),
        compression=compression,
        skip_bad=skip_bad,
    )
    _check_options(job, workers)
    copies = TokenCopies(scratch)
    if columns.tokens:
        listing = list_token_sources(copies.local(inputs, quiet), columns.tokens)
    else:
        listing = list_inputs(inputs, job.out, max_unpack_ratio)
    try:
        with (
            contextlib.closing(output),
            WorkerPool(workers, tokenizer) as worker_pool,
            ConversionBar(worker_pool, quiet, output) as bar,
        ):
            manifest = _Conversion(job, tokenizer, worker_pool, bar, output).run(listing)
    except OSError as error:
        raise UserError(
            f"{error.strerror or error}: fix that (if the disk is full, free space) and run the same command again; "
            "it resumes where it stopped",
            error.filename or str(out),
        ) from None
    copies.remove()
    return manifest


def _check_options(job: ConversionJob, workers: int) -> None:
    problems = []
    if job.seq_len < 1:
        problems.append(f"seq_len={job.seq_len} must be at least 1 token")
    if not 0 <= job.heldout < 1:
        problems.append(f"heldout={job.heldout} is a share of the documents; set it to 0 or more and below 1")
    if job.compression is not None and not re.fullmatch(r"zstd(:([1-9]|1\d|2[0-2]))?", job.compression):
        problems.append(f"compression={job.compression} is not supported; set it to zstd, or zstd:1 … zstd:22")
    for name in ("min_tokens", "limit_tokens"):
        value = getattr(job.filters, name)
        if value is not None and value < 1:
            problems.append(f"{name}={value} must be at least 1")
    if job.columns.tokens and (job.skip_bad or job.filters.dedup or job.filters.min_score is not None):
        problems.append("token files are imported without skip_bad, dedup and min_score")
    if job.columns.tokens and (job.filters.min_tokens or 0) > LONG_TOKENS:
        problems.append(f"min_tokens={job.filters.min_tokens} must be at most {LONG_TOKENS} for token files")
    if workers < 0:
        problems.append(f"workers={workers} must not be negative")
    if problems:
        raise UserError(problems)


@dataclass(frozen=True)
class _InspectedInput:
    """An input file whose format was checked."""

    source: Source
    hash: str = ""
    chunks: Chunks | None = None
    skipped: Skipped | None = None


class _Conversion:
    """One conversion with its worker processes and progress display."""

    def __init__(
        self,
        job: ConversionJob,
        tokenizer: Tokenizer,
        workers: WorkerPool,
        bar: ConversionBar,
        output: Output,
    ):
        self._job, self._tokenizer, self._workers, self._bar = job, tokenizer, workers, bar
        self._output = output

    def run(self, listing: Listing) -> ShardManifest:
        job = self._job
        inspected = self._inspect(listing)
        settings = _settings(inspected, job, self._tokenizer)
        if manifest := self._output.finished_manifest(settings):
            self._bar.log(f"{self._output.name}: already converted with these settings; nothing to do")
            return manifest
        for line in listing.lines():
            self._bar.log(line)
        if rules := job.columns.tokens:
            for line in preview_lines([one.chunks for one in inspected if one.chunks], rules, self._tokenizer):
                self._bar.log(line)
        with lock_output(job.out):
            self._output.begin(settings)
            parts = list(split_into_parts([one.chunks for one in inspected if one.chunks]))
            duplicates = self._find_duplicates(parts) if job.filters.dedup else [NO_ROWS] * len(parts)
            records = self._convert_all(parts, duplicates)
            skipped = [Skipped(one.name, "folder", f"{one.reason} ({one.detail})") for one in listing.unreadable]
            skipped += [one.skipped for one in inspected if one.skipped]
            for record in records:
                skipped += record.skipped
            settings["left_out"] = tuple(listing.left_out)
            return finish_conversion(job, records, settings, skipped, self._tokenizer, self._output)

    def _inspect(self, listing: Listing) -> list[_InspectedInput]:
        """Hash and chunks of every input. Raises UserError with all unreadable inputs, unless they are skipped."""
        sources, skip_bad = listing.sources, self._job.skip_bad
        self._bar.begin("reading inputs", sum(source.size for source in sources))
        problems = [] if skip_bad else listing.unreadable_problems()
        inspected = []
        tasks = [(source, self._job) for source in sources]
        results = self._workers.map(_inspect_input, tasks, self._bar.update)
        for source, result in zip(sources, results, strict=True):
            if isinstance(result, _InspectedInput):
                inspected.append(result)
            elif skip_bad:
                skipped = Skipped(source.name, "file", "; ".join(result.problems))
                inspected.append(_InspectedInput(source, skipped=skipped))
            else:
                problems += [f"{result.source}: {problem}" if result.source else problem for problem in result.problems]
        if problems:
            raise UserError(problems)
        return inspected

    def _find_duplicates(self, parts: list[ConversionPart]) -> list[np.ndarray]:
        """For each part, the rows of `document_digests` that are duplicates."""
        files = [_digest_file(self._job, part) for part in parts]
        missing = [part for part, file in zip(parts, files, strict=True) if not file.is_file()]
        self._bar.begin("finding duplicates", sum(part.size for part in missing))
        for _ in self._workers.map(_digest_part, [(self._job, part) for part in missing], self._bar.update):
            pass
        return find_duplicates(files)

    def _convert_all(self, parts: list[ConversionPart], duplicates: list[np.ndarray]) -> list[PartRecord]:
        """Convert all parts; a second time, as one stream, if there are too few documents to hold some out."""
        job = self._job
        if not is_one_stream(job):
            records = list(self._convert_parts(job, parts, duplicates, "converting"))
            self._workers.stop()  # they may still be converting parts after the token limit
            if not too_few_documents(job, records):
                return records
            switch_to_one_stream(job)
            self._output.begin_one_stream()
            self._workers.start()
        job = replace(job, heldout=0.0)
        records = list(self._convert_parts(job, parts, duplicates, "converting again, without held-out documents"))
        self._workers.stop()
        return records

    def _convert_parts(
        self, job: ConversionJob, parts: list[ConversionPart], duplicates: list[np.ndarray], title: str
    ) -> Iterator[PartRecord]:
        """The records of all parts in order, up to the part that reaches the token limit.

        Parts are converted in parallel without a limit; the one that reaches it is converted again with what remained.
        """
        limit = job.filters.limit_tokens
        finished: dict[int, PartRecord] = {}
        for part in parts:
            record = read_record(job, part, self._output.size_of)
            if record and (record.limit is None or limit):
                finished[part.index] = record
        done = sum(part.size for part in parts if part.index in finished)
        self._bar.begin(title, sum(part.size for part in parts), done)
        tasks = ((job, part, None, duplicates[part.index]) for part in parts if part.index not in finished)
        new_records = self._workers.map(_convert_part, tasks, self._bar.update)
        remaining = limit
        for part in parts:
            record = finished.get(part.index) or next(new_records)
            is_limited = remaining is not None and (record.tokens_with_eos >= remaining or record.limit is not None)
            if is_limited and record.limit != remaining:
                task = (job, part, remaining, duplicates[part.index])
                (record,) = self._workers.map(_convert_part, [task], self._bar.update)
            self._bar.add_written(record.disk_bytes)
            self._output.add(part, record, self._bar.update)
            yield record
            if remaining is not None:
                remaining -= record.tokens_with_eos
                if remaining <= 0:
                    return


def _settings(inspected: list[_InspectedInput], job: ConversionJob, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that determines the result, under the manifest's names."""
    chat = job.columns.chat
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
        "text_column": "messages" if chat else "tokens" if job.columns.tokens else job.columns.text,
        "sample_by": job.columns.sample_by,
        "filters": job.filters,
        **({"loss_mask": True, "chat": chat.template} if chat else {}),
        **({"token_rules": job.columns.tokens} if job.columns.tokens else {}),
        "inputs": tuple(InputFile(one.source.name, one.source.size, one.hash) for one in inspected),
    }


def _digest_file(job: ConversionJob, part: ConversionPart) -> Path:
    return job.out / UNFINISHED / f"{part.name}.digests.npy"


# --- tasks, in a worker


def _inspect_input(item: tuple[Source, ConversionJob]) -> _InspectedInput | UserError:
    source, job = item
    pool.add_progress(source.size, 0)

    def inspect(is_last: bool) -> _InspectedInput:
        if job.columns.tokens:
            chunks, hashed = inspect_source(source, job.columns.tokens, job.eos_id, job.vocab_size)
            return _InspectedInput(source, hashed, chunks)
        chunks = divide_file(source, job.columns)
        return _InspectedInput(source, content_hash(source), chunks)

    try:
        return _with_retries(source.remote, Unreadable, inspect)
    except UserError as error:
        return error


def _digest_part(item: tuple[ConversionJob, ConversionPart]) -> None:
    job, part = item
    digests = _read_with_retries(job, part, lambda job: document_digests(job, part, pool.add_progress))
    save_digests(_digest_file(job, part), digests)


def _convert_part(item: tuple[ConversionJob, ConversionPart, int | None, np.ndarray]) -> PartRecord:
    job, part, limit, duplicates = item
    converter = ChatPartConverter if job.is_chat else TokenPartConverter if job.columns.tokens else PartConverter
    return _read_with_retries(
        job, part, lambda job: convert_part(converter, job, part, pool.shared(), limit, duplicates, pool.add_progress)
    )


def _read_with_retries(job: ConversionJob, part: ConversionPart, run: Callable[[ConversionJob], Result]) -> Result:
    """`run(job)`, several times if input is remote; only the last attempt may skip input."""
    remote = any(span.source.remote for span in part.spans)
    return _with_retries(remote, UserError, lambda is_last: run(job if is_last else replace(job, skip_bad=False)))


def _with_retries(remote: bool, retried: type[UserError], run: Callable[[bool], Result]) -> Result:
    """`run(is_last)`; of remote input up to ATTEMPTS times while it raises `retried`."""
    for attempt in range(ATTEMPTS - 1 if remote else 0):
        try:
            return run(False)
        except retried:
            sleep(RETRY_SECONDS * 2**attempt)
    return run(True)
