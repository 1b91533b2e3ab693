"""Which text is held out: documents chosen by a hash of their text, or, with too few documents, the last windows.

Each worker can apply the hash to its documents without knowing the others. With few documents this misses the requested
share, because a document is held out entirely or not at all. The counts of the converted parts, and so the inputs
alone, decide whether there are too few. In that case all documents become one stream of tokens, as with a share of 0,
and the last windows of that stream are the held-out split. Windows do not overlap, so no token is in both splits; the
two halves of a divided document share its subject, but no window.

The trap is a kill in between: parts converted by one rule must not be combined with parts of the other. A marker file
in out/unfinished is written before the first part of the one-stream rule.

Decisions: DATA-11, DATA-12.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from mythos_dist.data.manifest import SPLITS, SplitCounts
from mythos_dist.prepare.mds import ShardWriter
from mythos_dist.prepare.part import UNFINISHED, ConversionJob, PartRecord, stored_file, write_atomically

ONE_STREAM = "one-stream"  # the marker file in out/unfinished
# Folders: the windows of the divided shard that stay in train/; the windows that are moved to heldout/.
KEPT, CUT = "part-kept", "part-cut"


def text_digest(text: Any) -> bytes:
    """xxh3_128 of a document's bytes."""
    return xxhash.xxh3_128_digest(text)


def is_heldout(digest: bytes, heldout: float) -> bool:
    """Whether a document belongs to the held-out split: a share `heldout` of all texts, by hash."""
    return int.from_bytes(digest[:8], "big") < heldout * 2**64


def is_one_stream(job: ConversionJob) -> bool:
    """Whether this conversion holds out the last windows of one stream."""
    return (job.out / UNFINISHED / ONE_STREAM).is_file()


def switch_to_one_stream(job: ConversionJob) -> None:
    """Write the marker file: all parts are then converted with a held-out share of 0."""
    write_atomically(job.out / UNFINISHED / ONE_STREAM, "")


def too_few_documents(job: ConversionJob, records: Iterable[PartRecord]) -> bool:
    """Whether holding out entire documents misses the requested share by far.

    That is so if fewer than one document is expected in one of the splits, if a split has no window, or if training
    has less than half of its share of tokens because a long document is held out.
    """
    if not job.heldout:
        return False
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for record in records:
        for split in SPLITS:
            documents[split] += record.documents_in[split]
            tokens[split] += record.tokens[split] + record.documents_in[split]
    expected_documents = sum(documents.values()) * min(job.heldout, 1 - job.heldout)
    min_train_tokens = (1 - job.heldout) / 2 * sum(tokens.values())
    return expected_documents < 1 or min(tokens.values()) <= job.seq_len or tokens["train"] < min_train_tokens


def cut_windows(
    job: ConversionJob, shards: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Move the held-out share from the end of train/'s `shards` (entries of index.json) to heldout/.

    Returns the entries of train/, those of heldout/, and the number of EOS tokens in the latter. Each split gets at
    least one window if there are two. No file of `shards` is changed.
    """
    windows = sum(shard["samples"] for shard in shards)
    heldout_windows = min(max(1, round(windows * job.heldout)), windows - 1) if windows > 1 else 0
    window = job.seq_len + 1
    first, windows_before = len(shards), windows  # the first shard that is divided or moved, and the windows before it
    while windows_before > windows - heldout_windows:
        first -= 1
        windows_before -= shards[first]["samples"]
    kept = ShardWriter(job.out / "train" / KEPT, job.seq_len, job.dtype, job.compression, f"{KEPT}/")
    cut = ShardWriter(job.out / "heldout" / CUT, job.seq_len, job.dtype, job.compression, f"{CUT}/")
    num_eos = 0
    kept_tokens = (windows - heldout_windows - windows_before) * window  # of the shard `first`
    for shard in shards[first:]:
        tokens = read_tokens(job.out / "train", shard, job)
        kept.add(tokens[:kept_tokens])
        cut.add(tokens[kept_tokens:])
        num_eos += int((tokens[kept_tokens:] == job.eos_id).sum())
        kept_tokens = 0
    kept.finish()
    cut.finish()
    assert cut.windows == heldout_windows and not len(kept.tail) + len(cut.tail), "tokens were lost"
    return shards[:first] + kept.shards, cut.shards, num_eos


def read_tokens(folder: Path, shard: dict[str, Any], job: ConversionJob) -> np.ndarray:
    """All tokens of a shard that this conversion wrote to `folder`."""
    content = (folder / stored_file(shard)["basename"]).read_bytes()
    if shard["zip_data"]:
        content = pa.Codec("zstd").decompress(content, shard["raw_data"]["bytes"], asbytes=True)
    count = shard["samples"] * (job.seq_len + 1)
    return np.frombuffer(content, job.dtype, count, len(content) - count * np.dtype(job.dtype).itemsize)


def split_counts(job: ConversionJob, total: SplitCounts, windows: int, num_eos: int) -> dict[str, SplitCounts]:
    """The counts of both splits after the last `windows` windows of `total`, with `num_eos` EOS tokens, were moved to
    heldout/. A document counts in the split that has its EOS; the partial window stays in train/."""
    moved = windows * (job.seq_len + 1)
    train = replace(
        total,
        documents=total.documents - num_eos,
        tokens=total.tokens - (moved - num_eos),
        windows=total.windows - windows,
        tokens_written=total.tokens_written - moved,
    )
    return {"train": train, "heldout": SplitCounts(num_eos, moved - num_eos, windows, moved, 0, 0)}
