"""The end of a conversion: join the partial windows of the parts, write the indexes and, last, the manifest."""

import base64
import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from mythos_dist.data.manifest import (
    SPLITS,
    DocumentCounts,
    ShardManifest,
    Skipped,
    SplitCounts,
    TokenCounts,
    index_fingerprint,
)
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.prepare.heldout import CUT, KEPT, add_counts, cut_windows, is_one_stream
from mythos_dist.prepare.output import Output
from mythos_dist.prepare.packing import WindowPacker, split_conversations
from mythos_dist.prepare.part import OUTCOMES, ConversionJob, PartRecord, stored_file, write_atomically
from mythos_dist.units import count

TAILS = "part-tails"  # the folder of windows that are joined from the partial windows of all parts
ADDED = {"train": (TAILS, KEPT), "heldout": (TAILS, CUT)}  # folders that this module writes


def finish_conversion(
    job: ConversionJob,
    records: list[PartRecord],
    settings: dict[str, Any],
    skipped: list[Skipped],
    tokenizer: Tokenizer,
    output: Output,
) -> ShardManifest:
    """Write the joined windows, indexes and manifest, and remove every file that is not part of the result."""
    shards: dict[str, list[dict[str, Any]]] = {}
    splits: dict[str, SplitCounts] = {}
    for split in SPLITS:
        shards[split], splits[split] = _join_tails(job, split, records)
    one_stream = is_one_stream(job)
    if one_stream:
        shards["train"], shards["heldout"], splits["heldout"] = cut_windows(job, shards["train"], output)
        splits["train"] = add_counts(splits["train"], splits["heldout"], sign=-1)  # it keeps the partial window
    if not splits["train"].windows:
        output.discard()
        raise UserError(_no_window(job, splits["train"].tokens), output.name)
    for split in SPLITS:
        _write_index(job, split, shards[split])
    outcomes = {outcome: sum(record.documents[outcome] for record in records) for outcome in OUTCOMES}
    documents = DocumentCounts(
        read=sum(outcomes.values()),
        **outcomes,
        repaired=sum(record.repaired for record in records),
        truncated=sum(record.truncated for record in records),
    )
    assert documents.written == sum(split.documents for split in splits.values()), "documents were lost"
    tokens = _count_tokens(records) if job.columns.tokens else None
    if tokens:
        written = sum(split.tokens for split in splits.values())
        assert tokens.read == tokens.eos + tokens.left_out + written, f"tokens were lost: {tokens}"
    write_atomically(job.out / tokenizer.file_name, tokenizer.path.read_bytes())
    manifest = ShardManifest(
        **settings,
        unknown_tokens=sum(record.unknown for record in records),
        documents=documents,
        splits=splits,
        skipped=tuple(skipped),
        fingerprint=index_fingerprint(job.out),
        heldout_by="window" if one_stream else "document",
        token_counts=tokens,
    )
    output.publish(manifest, shards)
    return manifest


def _count_tokens(records: list[PartRecord]) -> TokenCounts:
    return TokenCounts(
        read=sum(record.tokens_read for record in records),
        eos=sum(record.eos_read for record in records),
        left_out=sum(record.tokens_left_out for record in records),
    )


def _join_tails(job: ConversionJob, split: str, records: list[PartRecord]) -> tuple[list[dict[str, Any]], SplitCounts]:
    """A split's entries for index.json, with those of the joined partial windows last, and its counts."""
    folder = job.out / split
    for name in ADDED[split]:  # left by an interrupted attempt to finish
        shutil.rmtree(folder / name, ignore_errors=True)
    tails = job.writer(split, TAILS, TAILS)
    packer = WindowPacker(tails, job.seq_len, job.eos_id)
    shards: list[dict[str, Any]] = []
    for record in records:
        shards += record.shards[split]
        tail = np.frombuffer(base64.b64decode(record.tails[split]), job.dtype)
        if job.is_chat:
            for conversation in split_conversations(tail.reshape(2, -1)):
                packer.add(conversation)
        else:
            tails.add(tail)
    packer.finish()
    tails.finish()
    shards += tails.shards
    windows = sum(shard["samples"] for shard in shards)
    counts = SplitCounts(
        documents=sum(record.documents_in[split] for record in records),
        tokens=sum(record.tokens[split] for record in records),
        windows=windows,
        tokens_written=windows * (job.seq_len + 1),
        tokens_dropped=len(tails.tail),
        eos_dropped=int((tails.tail == job.eos_id).sum()),
        learnt=sum(record.learnt[split] for record in records),
    )
    if job.is_chat:
        return shards, replace(counts, padding=counts.tokens_written - counts.tokens)
    assert counts.tokens + counts.documents == counts.tokens_written + counts.tokens_dropped, "tokens were lost"
    return shards, counts


def _write_index(job: ConversionJob, split: str, shards: list[dict[str, Any]]) -> None:
    """Write a split's index.json, and remove shards that are not in it: incomplete, after the token limit, or moved."""
    folder = job.out / split
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    listed_files = {stored_file(shard)["basename"] for shard in shards}
    listed_folders = {name.split("/")[0] for name in listed_files}
    for part in folder.glob("part-*/"):
        if part.name in listed_folders:
            with suppress(FileNotFoundError):  # of an output in a store: it was uploaded and removed meanwhile
                for file in part.glob("shard.*"):
                    is_listed = f"{part.name}/{file.name}" in listed_files
                    if not is_listed and re.fullmatch(r"shard\.\d+\.mds(\.zstd)?", file.name):
                        file.unlink()
        elif part.name in (TAILS, KEPT, CUT) or re.fullmatch(r"part-\d+(\.tmp)?", part.name):
            shutil.rmtree(part)


def _no_window(job: ConversionJob, tokens: int) -> str:
    if job.is_chat:
        return (
            f"no conversation has a completion token among its first {job.seq_len + 1} tokens; give others, or a "
            "larger seq_len"
        )
    return (
        f"{count(tokens, 'token')} of text {'does' if tokens == 1 else 'do'} not fill one window of "
        f"seq_len={job.seq_len}; give more text or a smaller seq_len"
    )
