"""Is a folder of shards whole, and does it hold what its manifest says? Each file is read once, nothing is written.

    manifest.json -> fingerprint -> {train,heldout}/index.json -> sizes and hashes -> shards -> headers and tokens

Hashes find what a disk or a copy damaged. Hashes that were made of wrong bytes agree with them, so the counts are held
against one another as well: no document and no token may be lost between the input and the windows.
The trap is to stop at the first fault: whoever copies 10 TB again wants the whole list.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from mythos_dist.data.corpora import read_index
from mythos_dist.data.manifest import (
    SPLITS,
    ShardManifest,
    SplitCounts,
    file_sha256,
    index_fingerprint,
    read_shard_manifest,
)
from mythos_dist.data.windows import Shard
from mythos_dist.errors import UserError
from mythos_dist.prepare import pool
from mythos_dist.prepare.part import UNFINISHED
from mythos_dist.prepare.pool import Workers
from mythos_dist.prepare.progress import Progress
from mythos_dist.units import count

PIECE_BYTES = 1 << 20  # read at a time; a multiple of a token's size
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # what JSON of another shape leads to
OWN = ("samples", "raw_data", "zip_data")  # of a shard; the rest of its entry in index.json is repeated in its header
HELDOUT_BY = ("document", "window")
FREE = (*OWN, "hashes", "size_limit")  # the rest of these follows from the manifest


@dataclass
class Report:
    """How much the index files list, and what is wrong with it."""

    shards: int = 0
    windows: int = 0
    tokens: int = 0
    bytes: int = 0  # on disk
    bad: list[dict[str, Any]] = field(default_factory=list)  # "shard": its name, "problems": all that is wrong with it
    problems: list[str] = field(default_factory=list)  # of the folder
    remarks: list[str] = field(default_factory=list)  # these are no fault
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.bad and not self.problems


def verify(folder: str | Path, *, workers: int = 0, quiet: bool = True) -> Report:
    """Check everything about a folder of shards.

    `workers`: processes; 0: none but this one. `quiet`: no progress on standard error. Raises UserError if the folder
    is missing or was never finished; what is wrong with a finished one is in the report.
    """
    if workers < 0:
        raise UserError(f"workers={workers} must not be negative")
    begin, folder, report = time.monotonic(), Path(folder), Report()
    if manifest := _read_manifest(folder, report):
        report.problems += _file_problems(folder, manifest)
        shards = {split: _read_index(folder, split, manifest, report) for split in SPLITS}
        report.shards, report.tokens = sum(map(len, shards.values())), report.windows * manifest.window
        with Workers(workers, manifest) as crew, Progress(crew, quiet) as progress:
            progress.begin("verifying", report.bytes)
            for split in SPLITS:
                _check_split(shards[split], manifest.splits[split], report, crew, progress)
    report.seconds = time.monotonic() - begin
    return report


def _read_manifest(folder: Path, report: Report) -> ShardManifest | None:
    """The manifest, or None if nothing can be checked by it; what is wrong with it goes into the report."""
    try:
        finished, unfinished = ((folder / name).exists() for name in ("manifest.json", UNFINISHED))
        if unfinished and not finished:
            what = "not finished; give the same command of tools/make_shards.py again: it goes on where it stopped"
            raise UserError(what, str(folder))
        if unfinished:
            report.remarks.append(f"{UNFINISHED}/ is left of the conversion, which is finished; it can be deleted")
        manifest = read_shard_manifest(folder)
        report.problems += _broken_rules(manifest)
        return manifest
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", str(folder)) from None
    except UserError as error:
        if not (folder / "manifest.json").exists():
            raise
        report.problems += [f"manifest.json: {problem}" for problem in error.problems]
    except MALFORMED as error:
        report.problems.append(f"manifest.json: a value that cannot be ({error}); the shards were not checked")
    return None


def _broken_rules(manifest: ShardManifest) -> list[str]:
    """Where it contradicts itself, see manifest.py. Raises one of MALFORMED for what is no count or no dtype."""
    of, splits, window = manifest.documents, manifest.splits.values(), manifest.window
    size = "(seq_len + 1 + targets * seq_len)" if manifest.targets else "(seq_len + 1)"
    fates = of.written + of.empty + of.low_score + of.duplicate + of.short
    room = np.iinfo(manifest.dtype).max + 1
    ids = f"eos_id={manifest.eos_id} < vocab_size={manifest.vocab_size} <= {room}"
    rules = [
        (ids, manifest.dtype, manifest.eos_id < manifest.vocab_size <= room),
        ("read == written + empty + low_score + duplicate + short", of, of.read == fates),
        ("written == documents of the splits", of, of.written == sum(one.documents for one in splits)),
        ("repaired <= read", of, of.repaired <= of.read),
    ]
    for one in splits:
        kept, total = one.tokens_written, one.tokens + one.documents
        rules += [
            ("tokens + documents == tokens_written + tokens_dropped", one, total == kept + one.tokens_dropped),
            (f"tokens_written == windows * {size}", one, kept == one.windows * window),
            (f"eos_dropped <= tokens_dropped < {size}", one, one.eos_dropped <= one.tokens_dropped < window),
        ]
    rules.append(("heldout_by is document or window", repr(manifest.heldout_by), manifest.heldout_by in HELDOUT_BY))
    if manifest.heldout_by == "window":
        last = manifest.splits["heldout"]
        rules.append(("tokens_dropped == 0 of windows that were held out", last, last.tokens_dropped == 0))
    rules += [("no count is negative", one, min(vars(one).values()) >= 0) for one in (of, *splits)]
    return [f"manifest.json: {rule} does not hold of {counts}" for rule, counts, holds in rules if not holds]


def _file_problems(folder: Path, manifest: ShardManifest) -> list[str]:
    """Of the tokenizer, and of the index files taken together."""
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


def _read_index(folder: Path, split: str, manifest: ShardManifest, report: Report) -> list[Shard]:
    """The shards of a split; how much these are and what is wrong with the list goes into the report."""
    try:
        shards = read_index(folder, split, manifest.fingerprint)
    except (OSError, UserError) as error:
        report.problems.append(f"{split}/index.json cannot be read ({error}); the shards in {split}/ were not checked")
        return []
    windows, expected = sum(shard.entry["samples"] for shard in shards), manifest.splits[split].windows
    report.windows += windows
    report.bytes += sum(shard.stored["bytes"] for shard in shards)
    if windows != expected:
        report.problems.append(f"{split}/index.json lists {count(windows, 'window')}, manifest.json {expected:,}")
    named = Counter(shard.stored["basename"] for shard in shards)
    report.problems += [f"{split}/index.json lists {name} twice" for name, count in named.items() if count > 1]
    there = [
        Path(path, name).relative_to(folder / split) for path, _, names in os.walk(folder / split) for name in names
    ]
    if left := sorted({*map(str, there)} - {"index.json", *named}):
        some = ", ".join(left[:3]) + " …" * (len(left) > 3)
        report.remarks.append(f"{split}/ holds {count(len(left), 'file')} that index.json does not name: {some}")
    return shards


def _check_split(shards: list[Shard], counts: SplitCounts, report: Report, crew: Workers, progress: Progress) -> None:
    eos, sure = 0, bool(shards)
    for shard, (problems, here) in zip(shards, crew.map(_check, shards, progress.tick), strict=True):
        eos += here
        if problems:
            sure = False
            report.bad.append({"shard": shard.name, "problems": problems})
    if sure and eos != counts.documents - counts.eos_dropped:
        rule = f"the shards hold {count(eos, 'EOS token')}, not documents - eos_dropped"
        report.problems.append(f"{shards[0].folder.name}: {rule} of {counts}")


def _check(shard: Shard) -> tuple[list[str], int]:
    """In a worker: all that is wrong with a shard, and how many EOS tokens it holds."""
    manifest, entry = pool.shared(), shard.entry
    try:
        problems = _entry_problems(entry, manifest)
        # A wrong entry does not say what to look for in the file.
        problems, eos = (problems, 0) if problems else _check_file(shard, manifest)
        pool.count(shard.stored["bytes"], 0)
        return problems, eos
    except MALFORMED as error:
        return [f"its entry in index.json cannot be read ({type(error).__name__}: {error})"], 0


def _entry_problems(entry: dict[str, Any], manifest: ShardManifest) -> list[str]:
    """What in an entry of index.json does not follow from the manifest or from the format."""
    window_bytes = manifest.window * np.dtype(manifest.dtype).itemsize
    expected = {
        "version": 2,
        "format": "mds",
        "compression": manifest.compression,
        "column_names": ["tokens"],
        "column_encodings": [f"ndarray:{manifest.dtype}:{manifest.window}"],
        "column_sizes": [window_bytes],
    }
    found = {name: value for name, value in entry.items() if name not in FREE}
    wrong = {name for name in expected | found if expected.get(name) != found.get(name)}
    problems = [f"{name}={found.get(name)!r} instead of {expected.get(name)!r}" for name in sorted(wrong)]
    size = 8 + len(_columns(entry)) + entry["samples"] * (4 + window_bytes)
    if entry["samples"] < 1 or not size == entry["raw_data"]["bytes"] < 1 << 32:  # offsets are uint32
        problems.append(
            f"bytes={entry['raw_data']['bytes']}, where {count(entry['samples'], 'window')} would be {size}"
        )
    if bool(entry["zip_data"]) != bool(manifest.compression):
        problems.append(f"zip_data={entry['zip_data']} with compression={manifest.compression}")
    for file in filter(None, (entry["raw_data"], entry["zip_data"])):
        if not file["hashes"] or sorted(file["hashes"]) != sorted(entry["hashes"]):
            problems.append(f"hashes={file['hashes']}, where {entry['hashes']} should be")
    return [f"index.json says {problem}" for problem in problems]


def _check_file(shard: Shard, manifest: ShardManifest) -> tuple[list[str], int]:
    """All that is wrong with a shard's file, and the number of EOS tokens."""
    raw, stored = shard.entry["raw_data"], shard.stored
    try:
        with open(shard.folder / stored["basename"], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != stored["bytes"]:
                return [f"is {count(size, 'byte')} long, not {stored['bytes']:,}"], 0
            if stored is raw:
                return _check_content(file, shard.entry, manifest)
            packed = file.read()
    except FileNotFoundError:
        return ["is missing"], 0
    except OSError as error:
        return [f"cannot be read ({error.strerror})"], 0
    hashes = _Hashes(stored)
    hashes.update(packed)
    try:
        content = pa.Codec("zstd").decompress(packed, raw["bytes"])
    except OSError as error:  # also where it is of another size
        return [*hashes.problems(), f"cannot be unpacked ({error})"], 0
    problems, eos = _check_content(pa.BufferReader(content), shard.entry, manifest)
    return hashes.problems() + [f"unpacked, it {one}" for one in problems], eos


def _check_content(stream: Any, entry: dict[str, Any], manifest: ShardManifest) -> tuple[list[str], int]:
    """Of a shard, unpacked: header as the format says, windows in pieces. See mds.py."""
    samples, columns, dtype = entry["samples"], _columns(entry), np.dtype(manifest.dtype)
    begin = 8 + 4 * samples + len(columns)
    offsets = begin + np.arange(samples + 1) * manifest.window * dtype.itemsize
    header = {
        "number of windows": np.uint32(samples).tobytes(),
        "offsets": offsets.astype("<u4").tobytes(),
        "columns": columns,
    }
    hashes, problems, buffer = _Hashes(entry["raw_data"]), [], np.empty(PIECE_BYTES, np.uint8)
    size = highest = eos = 0
    for what, expected in header.items():
        found = stream.read(len(expected))
        hashes.update(found)
        size += len(found)
        if found != expected:
            problems.append(f"has other {what} in its header than index.json")
    while length := stream.readinto(buffer.data):
        hashes.update(buffer[:length].data)
        size += length
        tokens = buffer[: length - length % dtype.itemsize].view(dtype)
        highest = max(highest, int(tokens.max(initial=0)))
        eos += int(np.count_nonzero(tokens == manifest.eos_id))
    if size != entry["raw_data"]["bytes"]:
        problems.append(f"holds {count(size, 'byte')}, not {entry['raw_data']['bytes']:,}")
    if highest >= manifest.vocab_size:
        problems.append(f"holds the token {highest}, outside vocab_size={manifest.vocab_size}")
    return hashes.problems() + problems, eos


def _columns(entry: dict[str, Any]) -> bytes:
    """The JSON in a shard's header."""
    return json.dumps({name: value for name, value in entry.items() if name not in OWN}, sort_keys=True).encode()


class _Hashes:
    """Every hash that index.json lists of a file."""

    def __init__(self, file: dict[str, Any]):
        self._listed = file["hashes"]
        known = xxhash.algorithms_available
        self._states = {name: getattr(xxhash, name)() if name in known else hashlib.new(name) for name in self._listed}

    def update(self, piece: Any) -> None:
        for state in self._states.values():
            state.update(piece)

    def problems(self) -> list[str]:
        wrong = [name for name, state in self._states.items() if state.hexdigest() != self._listed[name]]
        return [f"has another {' and '.join(wrong)} than index.json lists"] if wrong else []
