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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from mythos_dist.data import loss_mask
from mythos_dist.data.manifest import SPLITS, SplitCounts
from mythos_dist.prepare.output import Output
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
    least = 0 if job.is_chat else job.seq_len  # tokens without a window; conversations are padded
    return expected_documents < 1 or min(tokens.values()) <= least or tokens["train"] < min_train_tokens


def cut_windows(
    job: ConversionJob, shards: list[dict[str, Any]], output: Output
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], SplitCounts]:
    """Move the held-out share from the end of train/'s `shards` (entries of index.json) to heldout/.

    Returns the entries of train/, those of heldout/, and the counts of the latter. Each split gets at
    least one window if there are two. No file of `shards` is changed.
    """
    windows = sum(shard["samples"] for shard in shards)
    heldout_windows = min(max(1, round(windows * job.heldout)), windows - 1) if windows > 1 else 0
    first, windows_before = len(shards), windows  # the first shard that is divided or moved, and the windows before it
    while windows_before > windows - heldout_windows:
        first -= 1
        windows_before -= shards[first]["samples"]
    kept, cut = job.writer("train", KEPT, KEPT), job.writer("heldout", CUT, CUT)
    counts = SplitCounts(0, 0, 0, 0, 0, 0)
    kept_windows = windows - heldout_windows - windows_before  # of the shard `first`
    for shard in shards[first:]:
        file = stored_file(shard)
        values = windows_of_shard(output.restore(f"train/{file['basename']}", file), shard, job)
        kept.add(values[:kept_windows].ravel())
        cut.add(values[kept_windows:].ravel())
        counts = add_counts(counts, count_windows(job, values[kept_windows:]))
        kept_windows = 0
    kept.finish()
    cut.finish()
    assert cut.windows == heldout_windows and not len(kept.tail) + len(cut.tail), "tokens were lost"
    return shards[:first] + kept.shards, cut.shards, counts


def windows_of_shard(file: Path, shard: dict[str, Any], job: ConversionJob) -> np.ndarray:
    """All windows (N, job.window) of a shard that this conversion wrote to `file`."""
    content = file.read_bytes()
    if shard["zip_data"]:
        content = pa.Codec("zstd").decompress(content, shard["raw_data"]["bytes"], asbytes=True)
    count = shard["samples"] * job.window
    values = np.frombuffer(content, job.dtype, count, len(content) - count * np.dtype(job.dtype).itemsize)
    return values.reshape(-1, job.window)


def count_windows(job: ConversionJob, windows: np.ndarray) -> SplitCounts:
    """The counts of windows (N, job.window). A document counts where its EOS is."""
    if job.is_chat:
        return loss_mask.count_chat_windows(windows)
    num_eos = int((windows == job.eos_id).sum())
    return SplitCounts(num_eos, windows.size - num_eos, len(windows), windows.size, 0, 0)


def add_counts(a: SplitCounts, b: SplitCounts, sign: int = 1) -> SplitCounts:
    """a + b, or with `sign` -1 a - b."""
    return SplitCounts(**{name: value + sign * getattr(b, name) for name, value in vars(a).items()})
