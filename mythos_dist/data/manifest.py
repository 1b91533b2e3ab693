"""`manifest.json`: what a folder of shards was made from and holds. Written last: where it is, the conversion is whole.

Training reads it before any shard, to refuse shards that do not fit the config. Nothing in it depends on when, where
or by how many workers the shards were made.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mythos_dist.errors import UserError
from mythos_dist.units import count

FORMAT_VERSION = 2
SPLITS = ("train", "heldout")
EMPTY_INDEX = json.dumps({"version": 2, "shards": []}, sort_keys=True)  # index.json of a split without windows


@dataclass(frozen=True)
class InputFile:
    """One file that was converted: its path below the folder that all inputs share, its size in bytes, its hash."""

    name: str
    size: int
    hash: str  # "sha256:…"; of a remote file what its server gives: "sha256:…", "etag:…", or "" where it gives nothing


@dataclass(frozen=True)
class Filters:
    """Which documents were left out on request; None: that filter was off."""

    min_score: float | None = None  # least value of the column `score`
    min_tokens: int | None = None  # least number of tokens of a document
    limit_tokens: int | None = None  # the document with which this many tokens are reached is the last
    dedup: bool = False  # of documents with the same text, only the first was kept


@dataclass(frozen=True)
class DocumentCounts:
    """read == written + empty + low_score + duplicate + short."""

    read: int = 0
    written: int = 0
    empty: int = 0
    low_score: int = 0
    duplicate: int = 0
    short: int = 0  # fewer than `min_tokens`
    repaired: int = 0  # of those read: invalid UTF-8 or lone surrogates became U+FFFD


@dataclass(frozen=True)
class SplitCounts:
    """tokens + documents (one EOS each) == tokens_written + tokens_dropped."""

    documents: int
    tokens: int  # without EOS
    windows: int
    tokens_written: int  # windows * window
    tokens_dropped: int  # at the very end of the split: less than a window
    eos_dropped: int  # of tokens_dropped: the shards hold documents - eos_dropped EOS tokens


@dataclass(frozen=True)
class Skipped:
    """Input that could not be read and was left out with --skip-bad."""

    name: str  # of the input
    where: str  # "file", "row group 3", "line 17"
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards was made from and holds; `fingerprint` is the sha256 of its index files."""

    format_version: int
    seq_len: int
    dtype: str
    vocab_size: int
    eos: str  # the text of the token that ends documents
    eos_id: int
    tokenizer: str  # name of the tokenizer's file in the folder
    tokenizer_sha256: str
    heldout: float
    compression: str | None  # of the shards: "zstd:3"
    text_column: str
    sample_by: str  # of plain text files: a "document" or a "line" is a document
    filters: Filters
    inputs: tuple[InputFile, ...]
    documents: DocumentCounts
    splits: dict[str, SplitCounts]
    skipped: tuple[Skipped, ...] = field(default=())
    fingerprint: str = ""
    # Rows of seq_len labels behind the seq_len + 1 tokens of each window, row t for what the model should say after
    # loop t, the last row for all loops behind it; a label that is `eos_id` does not count. 0: labels are next tokens.
    targets: int = 0
    # "document": whole documents were held out, by a hash of their text. "window": these were too few, and the last
    # windows of the text were held out; a document counts in the split that has its EOS.
    heldout_by: str = "document"

    @property
    def window(self) -> int:
        """Numbers in a window."""
        return self.seq_len + 1 + self.targets * self.seq_len

    @property
    def tokens(self) -> int:
        """Of all documents, without EOS."""
        return sum(split.tokens for split in self.splits.values())

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return json.loads(json.dumps(asdict(self)))

    def summary(self) -> str:
        """A few lines for a person."""
        left_out = [
            f"{getattr(self.documents, fate):,} {name}"
            for fate, name in (
                ("empty", "empty"),
                ("low_score", "below the score"),
                ("duplicate", "duplicate"),
                ("short", "too short"),
            )
            if getattr(self.documents, fate)
        ]
        read = count(self.documents.read, "document")
        lines = [f"{read} read" + (f", left out: {', '.join(left_out)}" if left_out else "")]
        if self.documents.repaired:
            lines.append(f"{count(self.documents.repaired, 'document')} held invalid text, which became U+FFFD")
        lines += [f"skipped: {one.name}, {one.where}: {one.reason}" for one in self.skipped]
        return "\n".join([*lines, *map(self._split_summary, SPLITS)])

    def _split_summary(self, name: str) -> str:
        split = self.splits[name]
        documents, tokens = count(split.documents, "document"), count(split.tokens, "token")
        windows = f"{count(split.windows, 'window')} of {self.seq_len}"
        if name == "heldout" and not split.windows:
            why = "the text fills only one window" if self.heldout else "a share of 0 was asked for"
            return f"{name}: none, because {why}; training runs without evaluation"
        if name == "heldout" and self.heldout_by == "window":
            written = count(self.documents.written, "document")
            return (
                f"{name}: {tokens} -> {windows}, cut from the end of the text: {written} cannot be divided as a whole "
                f"to hold out a share of {self.heldout:g}"
            )
        dropped, fill = count(split.tokens_dropped, "token"), "fills" if split.tokens_dropped == 1 else "fill"
        return f"{name}: {documents}, {tokens} -> {windows}; {dropped} at the end {fill} none"


def read_manifest(path: str | Path) -> Manifest:
    """Raises UserError if `path` is missing, is empty, was not finished, or its manifest cannot be read."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            "no such folder; set data.path to a folder of shards, or make them with tools/make_shards.py", str(path)
        )
    if not any(path.iterdir()):
        raise UserError(
            "no shards here; set data.path to a folder of shards, or make them with tools/make_shards.py", str(path)
        )
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError("no manifest.json: not a finished conversion; run tools/make_shards.py (again)", str(path))
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format_version"] != FORMAT_VERSION:
            version = raw["format_version"]
            raise UserError(
                f"format_version={version} is not {FORMAT_VERSION}: another version of mythos_dist made these shards; "
                "delete the folder and convert again",
                str(file),
            )
        raw["filters"] = Filters(**raw["filters"])
        raw["inputs"] = tuple(InputFile(**one) for one in raw["inputs"])
        raw["documents"] = DocumentCounts(**raw["documents"])
        raw["splits"] = {split: SplitCounts(**raw["splits"][split]) for split in SPLITS}
        raw["skipped"] = tuple(Skipped(**one) for one in raw["skipped"])
        return Manifest(**raw)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({type(error).__name__}: {error}); convert again", str(file)) from None


def index_fingerprint(path: Path) -> str:
    """sha256 over the index.json of every split; these hold the hashes of the shards. OSError if train/ has none.

    A folder without heldout/ has the fingerprint of one whose heldout/ is empty.
    """
    digest = hashlib.sha256((path / "train" / "index.json").read_bytes())
    heldout = path / "heldout"
    digest.update((heldout / "index.json").read_bytes() if heldout.exists() else EMPTY_INDEX.encode())
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
