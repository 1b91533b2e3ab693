"""A part of a conversion: the unit of work and of resuming, and the record that is written when it is finished.

Which spans a part has depends on the inputs alone, so the shards are the same bytes at any number of workers. Files get
their final names only when they are complete:

    out/train/part-00007/shard.00000.mds    (written in part-00007.tmp first)
    out/heldout/part-00007/shard.00000.mds
    out/unfinished/part-00007.json          the record, written last: counts, index entries, tokens of partial windows

Decisions: DATA-7.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mythos_dist.data.manifest import SPLITS, Filters, Skipped, read_json
from mythos_dist.files import write_atomically as write_file
from mythos_dist.prepare.mds import ShardWriter
from mythos_dist.prepare.spans import Chunks, Columns, Span

# A part holds about 1 / PARTS of the text, within these bounds: enough parts for many workers, few enough files.
PARTS = 256
MIN_PART_BYTES, MAX_PART_BYTES = 1 << 21, 128 << 20

# Only one conversion at a time writes to a folder, so it may overwrite the temporary files of a killed one.
write_atomically = functools.partial(write_file, ending=".tmp")
UNFINISHED = "unfinished"  # the folder of records; removed once the manifest is written
OUTCOMES = (
    "written",
    "empty",
    "low_score",
    "duplicate",
    "short",
    "not_learnt",
)  # of a document; fields of DocumentCounts


@dataclass(frozen=True)
class ConversionJob:
    """The settings that all parts share."""

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

    @property
    def is_chat(self) -> bool:
        """Whether documents are conversations, written with a loss mask."""
        return self.columns.chat is not None

    @property
    def window(self) -> int:
        """Values of a window in the shards: tokens, and flags of conversations."""
        return (self.seq_len + 1) * (2 if self.is_chat else 1)

    def writer(self, split: str, folder: str, prefix: str) -> ShardWriter:
        """A writer of windows to a folder of a split; `prefix`: of the names in its index."""
        return ShardWriter(self.out / split / folder, self.window - 1, self.dtype, self.compression, f"{prefix}/")


@dataclass(frozen=True)
class ConversionPart:
    """Consecutive spans of the inputs that are converted together."""

    index: int
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        return f"part-{self.index:05}"

    @property
    def size(self) -> int:
        """Approximate bytes of text."""
        return sum(span.size for span in self.spans)


@dataclass
class PartRecord:
    """The result of converting a part."""

    limit: int | None = None  # the tokens that remained of --limit-tokens when the part began
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    repaired: int = 0
    unknown: int = 0  # tokens for characters that are not in the tokenizer's vocabulary
    documents_in: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # without EOS between documents
    added_eos: int = 0  # between documents
    learnt: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # tokens, of conversations
    truncated: int = 0  # conversations
    tokens_read: int = 0  # of token files, EOS included
    eos_read: int = 0  # EOS tokens among them
    tokens_left_out: int = 0  # of token files: those of short documents
    shards: dict[str, list[dict]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    tails: dict[str, str] = field(
        default_factory=lambda: dict.fromkeys(SPLITS, "")
    )  # tokens of a partial window, or tokens and flags of conversations (2, n), base64
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def tokens_with_eos(self) -> int:
        return sum(self.tokens.values()) + self.added_eos

    @property
    def disk_bytes(self) -> int:
        return sum(stored_file(shard)["bytes"] for shards in self.shards.values() for shard in shards)


def stored_file(shard: dict[str, Any]) -> dict[str, Any]:
    """The file on disk that an entry of index.json describes."""
    return shard["zip_data"] or shard["raw_data"]


def split_into_parts(files: list[Chunks]) -> Iterator[ConversionPart]:
    """Join consecutive chunks into parts of about equal size. The result depends on the inputs only."""
    total = sum(int(chunks.sizes.sum()) for chunks in files)
    target = min(max(total // PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
    index, size = 0, 0
    spans: list[Span] = []
    for chunks in files:
        first = 0
        for i, chunk_size in enumerate(chunks.sizes.tolist()):
            if size and size + chunk_size / 2 > target:
                if i > first:
                    spans.append(chunks.span(first, i))
                yield ConversionPart(index, tuple(spans))
                index, size, spans, first = index + 1, 0, [], i
            size += chunk_size
        if len(chunks.sizes) > first:
            spans.append(chunks.span(first, len(chunks.sizes)))
    if spans:
        yield ConversionPart(index, tuple(spans))


def read_record(job: ConversionJob, part: ConversionPart, size_of: Callable[[str], int]) -> PartRecord | None:
    """The record of a finished part, or None if there is none or one of its files is missing or has another size.

    size_of: bytes of a file, by its name below the output folder; raises OSError if it is missing.
    With a held-out share of 0, a part with held-out documents does not count as finished: see heldout.py.
    """
    try:
        raw = read_json((job.out / UNFINISHED / f"{part.name}.json").read_bytes())
        if raw.keys() != asdict(PartRecord()).keys():  # written by another version
            return None
        record = PartRecord(**raw)
        record.skipped = [Skipped(**one) for one in record.skipped]  # type: ignore[arg-type]
        for split in SPLITS:
            for file in map(stored_file, record.shards[split]):
                if size_of(f"{split}/{file['basename']}") != file["bytes"]:
                    return None
        if not job.heldout and record.documents_in["heldout"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record
