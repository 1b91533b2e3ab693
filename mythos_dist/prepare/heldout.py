"""Which text is held out: whole documents by a hash of their text, or, of too few documents, the last windows.

A hash of each document's text needs no order and no count, so every worker applies it by itself (part.py). It fails
with few documents: one document is held out as a whole or not at all. Whether there are too few follows from the
counts of the converted parts, and so from the inputs alone. Then the documents become one stream of tokens, as with a
share of 0, and the last windows of that stream are the held-out split. Windows do not overlap, so no token is in both
splits; the two halves of a document that is cut share its subject, but not a window.

The trap is a kill in between: parts that were converted for one rule must not be joined with parts for the other. A
file in out/unfinished says that the documents are one stream, and is there before the first such part.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mythos_dist.data.manifest import SplitCounts
from mythos_dist.prepare.mds import ShardWriter
from mythos_dist.prepare.part import UNFINISHED, Job, Record, stored, write_atomically

ONE_STREAM = "one-stream"  # the file in out/unfinished
KEPT, CUT = "part-kept", "part-cut"  # folders: the windows of train/ before the cut, in its shard; heldout/'s windows


def one_stream(job: Job) -> bool:
    """Whether it was decided that all documents are one stream."""
    return (job.out / UNFINISHED / ONE_STREAM).is_file()


def begin_one_stream(job: Job) -> None:
    """Note the decision: from now on parts are converted with a held-out share of 0."""
    write_atomically(job.out / UNFINISHED / ONE_STREAM, "")


def too_few_documents(job: Job, records: Iterable[Record]) -> bool:
    """Whether holding out whole documents is far from the share that was asked for.

    So it is when less than one document is expected in either split, when a split got no window, and when training
    got less than half of its tokens because a long document was held out.
    """
    if not job.heldout:
        return False
    documents, tokens = {"train": 0, "heldout": 0}, {"train": 0, "heldout": 0}
    for record in records:
        for split in documents:
            documents[split] += record.documents_in[split]
            tokens[split] += record.tokens[split] + record.documents_in[split]
    expected = sum(documents.values()) * min(job.heldout, 1 - job.heldout)
    least = (1 - job.heldout) / 2 * sum(tokens.values())
    return expected < 1 or min(tokens.values()) <= job.seq_len or tokens["train"] < least


def cut_windows(job: Job, shards: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Cut the held-out share off the end of train/'s `shards` (entries of index.json): the entries of train/ and of
    heldout/, and the EOS tokens of the latter.

    Each split gets a window if there are two. No file of `shards` is changed.
    """
    windows = sum(shard["samples"] for shard in shards)
    wanted = min(max(1, round(windows * job.heldout)), windows - 1) if windows > 1 else 0
    window = job.seq_len + 1
    first, before = len(shards), windows  # the first shard that is cut off, and the windows before it
    while before > windows - wanted:
        first -= 1
        before -= shards[first]["samples"]
    kept = ShardWriter(job.out / "train" / KEPT, job.seq_len, job.dtype, job.compression, f"{KEPT}/")
    cut = ShardWriter(job.out / "heldout" / CUT, job.seq_len, job.dtype, job.compression, f"{CUT}/")
    eos, keep = 0, (windows - wanted - before) * window  # tokens of the shard `first` that stay
    for shard in shards[first:]:
        tokens = read_tokens(job.out / "train", shard, job)
        kept.add(tokens[:keep])
        cut.add(tokens[keep:])
        eos += int((tokens[keep:] == job.eos_id).sum())
        keep = 0
    kept.finish()
    cut.finish()
    assert cut.windows == wanted and not len(kept.tail) + len(cut.tail), "tokens were lost"
    return shards[:first] + kept.shards, cut.shards, eos


def read_tokens(folder: Path, shard: dict[str, Any], job: Job) -> np.ndarray:
    """All tokens of a shard that this conversion wrote into `folder`."""
    content = (folder / stored(shard)["basename"]).read_bytes()
    if shard["zip_data"]:
        content = pa.Codec("zstd").decompress(content, shard["raw_data"]["bytes"], asbytes=True)
    count = shard["samples"] * (job.seq_len + 1)
    return np.frombuffer(content, job.dtype, count, len(content) - count * np.dtype(job.dtype).itemsize)


def split_counts(job: Job, whole: SplitCounts, windows: int, eos: int) -> dict[str, SplitCounts]:
    """The counts of train/ and heldout/ when the last `windows` windows of `whole`, with so many EOS tokens, are cut
    off. A document counts in the split that has its EOS; what filled no window stays with train/."""
    cut = windows * (job.seq_len + 1)
    train = replace(
        whole,
        documents=whole.documents - eos,
        tokens=whole.tokens - (cut - eos),
        windows=whole.windows - windows,
        tokens_written=whole.tokens_written - cut,
    )
    return {"train": train, "heldout": SplitCounts(eos, cut - eos, windows, cut, 0, 0)}
