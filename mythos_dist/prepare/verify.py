"""Verify that a folder of shards is complete, undamaged and consistent. Each file is read once, nothing is written.

    manifest.json -> fingerprint -> {train,heldout}/index.json -> sizes and hashes -> shards -> headers and tokens

Hashes detect damage by a disk or a copy, but not bytes that were wrong when they were hashed. So the counts are
compared with each other as well: no document and no token may be lost between the input and the windows. All problems
are reported, not only the first: users who copy 10 TB again need the complete list.
"""

import contextlib
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mythos_dist.data.corpora import read_index
from mythos_dist.data.manifest import (
    SPLITS,
    ShardManifest,
    SplitCounts,
    file_sha256,
    index_fingerprint,
    read_json,
    read_shard_manifest,
)
from mythos_dist.data.remote import INDEXES, MAX_INDEX
from mythos_dist.data.shard import Shard
from mythos_dist.errors import UserError
from mythos_dist.prepare.conversion_bar import ConversionBar
from mythos_dist.prepare.part import UNFINISHED
from mythos_dist.prepare.pool import WorkerPool
from mythos_dist.prepare.verify_shard import MALFORMED, Counted, check_shard
from mythos_dist.store.fetch import Unavailable, read_object
from mythos_dist.store.write import WRITABLE, list_files
from mythos_dist.units import count
from mythos_dist.urls import is_url, join_url, scheme_of

HELDOUT_BY = ("document", "window")


@dataclass
class VerifyReport:
    """What the index files list, and the problems."""

    shards: int = 0
    windows: int = 0
    tokens: int = 0
    bytes: int = 0  # on disk
    bad: list[dict[str, Any]] = field(default_factory=list)  # "shard": its name, "problems": list of str
    problems: list[str] = field(default_factory=list)  # of the folder
    remarks: list[str] = field(default_factory=list)  # not problems
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.bad and not self.problems


def verify(folder: str | Path, *, workers: int = 0, quiet: bool = True) -> VerifyReport:
    """Check a folder of shards, or the URL of one.

    `workers`: processes; 0: only this one. `quiet`: no progress on standard error. Raises UserError if the folder is
    missing, its conversion was never finished, or its store cannot be reached; problems of a finished one are in the
    report.

    >>> from mythos_dist import verify
    >>> report = verify("shards")
    >>> report.ok, report.problems, report.bad
    (True, [], [])
    """
    if workers < 0:
        raise UserError(f"workers={workers} must not be negative")
    if not is_url(folder):
        return _verify(Path(folder), "", workers, quiet)
    with tempfile.TemporaryDirectory(prefix="mythos-verify-") as copy:
        copy_descriptions(str(folder), Path(copy))
        return _verify(Path(copy), str(folder).rstrip("/"), workers, quiet)


def copy_descriptions(url: str, folder: Path) -> None:
    """Copy what describes the shards of a store to `folder`, unchecked; what is missing stays missing. Raises UserError
    if there is no manifest."""
    names = ["manifest.json", *INDEXES]
    for name in names:  # the tokenizer is the last: the manifest names it
        try:
            content = read_object(join_url(url, name), MAX_INDEX)
        except Unavailable as error:
            if not error.missing:
                raise
            if name == "manifest.json":
                raise UserError(
                    f"no manifest.json there: not a finished conversion ({error.problems[0]})", url
                ) from None
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        if name == "manifest.json":
            with contextlib.suppress(*MALFORMED):
                tokenizer = read_json(content)["tokenizer"]
                if tokenizer == Path(tokenizer).name:
                    names.append(tokenizer)


def _verify(folder: Path, url: str, workers: int, quiet: bool) -> VerifyReport:
    begin, report = time.monotonic(), VerifyReport()
    if manifest := _read_manifest(folder, report):
        report.problems += _file_problems(folder, manifest)
        shards = {split: _read_index(folder, url, split, manifest, report) for split in SPLITS}
        report.shards = sum(len(some) for some in shards.values())
        report.tokens = report.windows * manifest.tokens_per_window
        with WorkerPool(workers, manifest) as pool, ConversionBar(pool, quiet) as bar:
            bar.begin("verifying", report.bytes)
            for split in SPLITS:
                _check_split(shards[split], manifest.splits[split], report, pool, bar)
    report.seconds = time.monotonic() - begin
    return report


def _read_manifest(folder: Path, report: VerifyReport) -> ShardManifest | None:
    """The manifest; None if it cannot be used. Its problems are added to the report."""
    try:
        finished, unfinished = (folder / "manifest.json").exists(), (folder / UNFINISHED).exists()
        if unfinished and not finished:
            raise UserError(
                "not finished; run the same command again (`mythos shards` or `mythos import tokens`): it "
                "resumes where it stopped",
                str(folder),
            )
        if unfinished:
            report.remarks.append(f"{UNFINISHED}/ is left over from the finished conversion; it can be deleted")
        manifest = read_shard_manifest(folder)
        report.problems += _contradictions(manifest)
        return manifest
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", str(folder)) from None
    except UserError as error:
        if not (folder / "manifest.json").exists():
            raise
        report.problems += [f"manifest.json: {problem}" for problem in error.problems]
    except MALFORMED as error:
        report.problems.append(f"manifest.json: an invalid value ({error}); the shards were not checked")
    return None


def _contradictions(manifest: ShardManifest) -> list[str]:
    """The rules of manifest.py that its values break. Raises one of MALFORMED for an invalid count or dtype."""
    documents, splits, window = manifest.documents, manifest.splits.values(), manifest.tokens_per_window
    num_dtype_values = np.iinfo(manifest.dtype).max + 1
    size = "(seq_len + 1 + targets * seq_len)" if manifest.targets else "(seq_len + 1)"
    problems = []

    def check(holds: bool, rule: str, values: object) -> None:
        if not holds:
            problems.append(f"manifest.json: {rule} does not hold for {values}")

    check(
        manifest.eos_id < manifest.vocab_size <= num_dtype_values,
        f"eos_id={manifest.eos_id} < vocab_size={manifest.vocab_size} <= {num_dtype_values}",
        manifest.dtype,
    )
    left_out = documents.empty + documents.low_score + documents.duplicate + documents.short + documents.not_learnt
    check(
        documents.read == documents.written + left_out,
        "read == written + empty + low_score + duplicate + short + not_learnt",
        documents,
    )
    check(
        documents.written == sum(split.documents for split in splits),
        "written == documents of the splits",
        documents,
    )
    if (tokens := manifest.token_counts) is not None:
        check(
            tokens.read == tokens.eos + manifest.tokens + tokens.left_out,
            "read == eos + tokens of the splits + left_out",
            tokens,
        )
        check(tokens.eos <= documents.read, "eos <= documents read", tokens)
    check(documents.repaired <= documents.read, "repaired <= read", documents)
    check(documents.truncated <= documents.written, "truncated <= written", documents)
    for split in splits:
        if manifest.loss_mask:
            check(split.tokens + split.padding == split.tokens_written, "tokens + padding == tokens_written", split)
            check(split.learnt <= split.tokens, "learnt <= tokens", split)
        else:
            check(
                split.tokens + split.documents == split.tokens_written + split.tokens_dropped,
                "tokens + documents == tokens_written + tokens_dropped",
                split,
            )
        check(split.tokens_written == split.windows * window, f"tokens_written == windows * {size}", split)
        check(
            split.eos_dropped <= split.tokens_dropped < window,
            f"eos_dropped <= tokens_dropped < {size}",
            split,
        )
    check(manifest.heldout_by in HELDOUT_BY, "heldout_by is document or window", repr(manifest.heldout_by))
    if manifest.heldout_by == "window":
        heldout = manifest.splits["heldout"]
        check(heldout.tokens_dropped == 0, "tokens_dropped == 0 of held-out windows", heldout)
    for counts in (documents, *splits, *([tokens] if tokens else [])):
        check(min(vars(counts).values()) >= 0, "no count is negative", counts)
    return problems


def _file_problems(folder: Path, manifest: ShardManifest) -> list[str]:
    """The problems of the tokenizer's file and of the index files' fingerprint."""
    problems, tokenizer = [], manifest.tokenizer
    try:
        if file_sha256(folder / tokenizer) != manifest.tokenizer_sha256:
            problems.append(f"{tokenizer} is not the tokenizer that the shards were made with")
    except (OSError, *MALFORMED) as error:
        problems.append(f"the tokenizer {tokenizer!r} cannot be read ({error})")
    with contextlib.suppress(OSError):  # _read_index reports it
        if index_fingerprint(folder) != manifest.fingerprint:
            problems.append("train/index.json or heldout/index.json is not the one that manifest.json was written for")
    return problems


def _read_index(folder: Path, url: str, split: str, manifest: ShardManifest, report: VerifyReport) -> list[Shard]:
    """The shards of a split. Their totals and the problems of the list are added to the report."""
    try:
        shards = read_index(folder, split, manifest.fingerprint, url)
    except (OSError, UserError) as error:
        report.problems.append(f"{split}/index.json cannot be read ({error}); the shards in {split}/ were not checked")
        return []
    windows, expected = sum(shard.entry["samples"] for shard in shards), manifest.splits[split].windows
    report.windows += windows
    report.bytes += sum(shard.stored["bytes"] for shard in shards)
    if windows != expected:
        report.problems.append(f"{split}/index.json lists {count(windows, 'window')}, manifest.json {expected:,}")
    listed = Counter(shard.stored["basename"] for shard in shards)
    report.problems += [f"{split}/index.json lists {name} twice" for name, times in listed.items() if times > 1]
    if extra := sorted(_existing(folder / split, join_url(url, split) if url else "") - {"index.json", *listed}):
        names = ", ".join(extra[:3]) + (" …" if len(extra) > 3 else "")
        report.remarks.append(f"{split}/ has {count(len(extra), 'file')} not listed in index.json: {names}")
    return shards


def _existing(folder: Path, url: str) -> set[str]:
    """The names of all files below a folder or its URL; empty for a URL of a scheme that is not listed."""
    if url:
        return set(list_files(url)) if scheme_of(url) in WRITABLE else set()
    return {str(Path(path, name).relative_to(folder)) for path, _, names in os.walk(folder) for name in names}


def _check_split(
    shards: list[Shard],
    counts: SplitCounts,
    report: VerifyReport,
    workers: WorkerPool,
    bar: ConversionBar,
) -> None:
    """Check the shards of a split, and, if all are good, their documents."""
    total, all_good = Counted(), bool(shards)
    results = workers.map(check_shard, shards, bar.update)
    for shard, (problems, counted) in zip(shards, results, strict=True):
        total = Counted(*map(sum, zip(total, counted, strict=True)))
        if problems:
            all_good = False
            report.bad.append({"shard": shard.name, "problems": problems})
    if all_good and total != (counts.documents - counts.eos_dropped, counts.learnt, counts.padding):
        problem = f"the shards contain {count(total.documents, 'EOS token')}, not documents - eos_dropped"
        if total.loss_tokens or counts.learnt:
            problem = (
                f"the shards contain {count(total.documents, 'document')}, {count(total.loss_tokens, 'loss token')} "
                f"and {count(total.padding, 'token')} of padding, not those"
            )
        report.problems.append(f"{shards[0].folder.name}: {problem} of {counts}")
