"""`manifest.json`: the inputs and contents of a folder of shards. Written last, so it marks a finished conversion.

Training reads it before any shard, to refuse shards that do not fit the config. Its content does not depend on when,
where or with how many workers the shards were converted. It may come from an untrusted source, so its structure and
values are checked here.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mythos_dist.errors import UserError
from mythos_dist.units import count

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT_VERSION = 2
SPLITS = ("train", "heldout")
_EXACT = {"extra": "forbid", "strict": True}  # pydantic: no unknown keys, and no "32" for 32
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
}
EMPTY_INDEX = json.dumps({"version": 2, "shards": []}, sort_keys=True)  # index.json of a split without windows


@dataclass(frozen=True)
class InputFile:
    """One converted file: its path relative to the inputs' common folder, its size in bytes, its hash."""

    __pydantic_config__: ClassVar = _EXACT
    name: str
    size: int
    hash: str  # "sha256:…"; for a remote file from its server: "sha256:…", "etag:…", or "" if it sends none


@dataclass(frozen=True)
class Filters:
    """The filters of the conversion; None: off."""

    __pydantic_config__: ClassVar = _EXACT
    min_score: float | None = None  # minimum of the column `score`
    min_tokens: int | None = None  # per document
    limit_tokens: int | None = None  # the document that reaches this many tokens is the last
    dedup: bool = False  # only the first of documents with the same text was kept


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations were rendered as text (chat.py)."""

    __pydantic_config__: ClassVar = _EXACT
    text: str  # in Jinja, as in Hugging Face's tokenizer_config.json
    tokens: dict[str, str]  # its variables: "bos_token", "eos_token" and the like


@dataclass(frozen=True)
class DocumentCounts:
    """read == written + empty + low_score + duplicate + short + not_learnt."""

    __pydantic_config__: ClassVar = _EXACT
    read: int = 0
    written: int = 0
    empty: int = 0
    low_score: int = 0
    duplicate: int = 0
    short: int = 0  # fewer than `min_tokens`
    repaired: int = 0  # of those read: invalid UTF-8 or lone surrogates were replaced by U+FFFD
    not_learnt: int = 0  # conversations without a completion token in the first seq_len + 1 tokens
    truncated: int = 0  # of those written: conversations of more than seq_len + 1 tokens, which lost their end


@dataclass(frozen=True)
class SplitCounts:
    """tokens + documents (one EOS each) == tokens_written + tokens_dropped; with a loss mask, where no EOS is added and
    nothing is dropped: tokens + padding == tokens_written."""

    __pydantic_config__: ClassVar = _EXACT
    documents: int
    tokens: int  # without EOS
    windows: int
    tokens_written: int  # windows * tokens_per_window
    tokens_dropped: int  # a partial window at the end of the split
    eos_dropped: int  # EOS tokens among them: the shards have documents - eos_dropped
    learnt: int = 0  # with a loss mask: completion tokens, the labels that count
    padding: int = 0  # with a loss mask


@dataclass(frozen=True)
class TokenRules:
    """How token files of other trainers are read (prepare/tokens/)."""

    __pydantic_config__: ClassVar = _EXACT
    format: str = "auto"  # of every source; or "auto": what each source is
    # What ends a document. "stored": the source's document index or rows, and EOS tokens; "eos": EOS tokens only,
    # because its rows are windows of one stream; "auto": "eos" for MDS, "stored" for the others.
    documents: str = "auto"
    column: str | None = None  # of token ids; None: the first of the format's usual names
    bytes_dtype: str = "int64"  # of an MDS column of bytes


@dataclass(frozen=True)
class TokenCounts:
    """The counts of imported token files: read == eos + tokens of the splits + left_out."""

    __pydantic_config__: ClassVar = _EXACT
    read: int  # with EOS
    eos: int  # EOS tokens among them; documents without one get one
    left_out: int  # tokens of documents shorter than `min_tokens`


@dataclass(frozen=True)
class Skipped:
    """Input that could not be read and was skipped with --skip-bad."""

    __pydantic_config__: ClassVar = _EXACT
    name: str  # of the input
    where: str  # "file", "row group 3", "line 17", "what follows line 17"
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """A file or folder (its name ends with /) in an input folder or pattern that was not converted."""

    __pydantic_config__: ClassVar = _EXACT
    name: str  # relative to the input folder
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class ShardManifest:
    """Inputs and contents of a folder of shards; `fingerprint` is the sha256 of its index files."""

    __pydantic_config__: ClassVar = _EXACT
    format_version: int
    seq_len: int
    dtype: str
    vocab_size: int
    eos: str  # text of the EOS token, which follows each document
    eos_id: int
    tokenizer: str  # name of the tokenizer file in the folder
    tokenizer_sha256: str
    heldout: float
    compression: str | None  # of the shards, such as "zstd:3"
    text_column: str
    sample_by: str  # how plain text files are split into documents: "document" or "line"
    filters: Filters
    inputs: tuple[InputFile, ...]
    documents: DocumentCounts
    splits: dict[str, SplitCounts]
    skipped: tuple[Skipped, ...] = field(default=())
    left_out: tuple[LeftOut, ...] = field(default=())
    unknown_tokens: int = 0  # <unk>, characters that the tokenizer cannot encode
    fingerprint: str = ""
    # Rows of seq_len labels after the seq_len + 1 tokens of each window: row t has the labels of loop t, the last row
    # those of all later loops. A label equal to `eos_id` is ignored. 0: labels are the next tokens.
    targets: int = 0
    # "document": complete documents were held out, by a hash of their text. "window": there were too few documents, so
    # the last windows of the text were held out; a document counts in the split that has its EOS.
    heldout_by: str = "document"
    # The seq_len + 1 tokens of a window are followed by as many flags (loss_mask.py): which tokens are in the loss,
    # where documents begin, and what is padding.
    loss_mask: bool = False
    chat: ChatTemplate | None = None  # documents are conversations
    token_rules: TokenRules | None = None  # the inputs are token files of other trainers
    token_counts: TokenCounts | None = None  # of those

    @property
    def window(self) -> int:
        """Values per window: token ids, stored labels and flags."""
        return (self.seq_len + 1) * (2 if self.loss_mask else 1) + self.targets * self.seq_len

    @property
    def tokens_per_window(self) -> int:
        """What `tokens_written` counts per window: token ids and stored labels, no flags."""
        return self.seq_len + 1 if self.loss_mask else self.window

    @property
    def tokens(self) -> int:
        """The tokens of all documents, without EOS."""
        return sum(split.tokens for split in self.splits.values())

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return json.loads(json.dumps(asdict(self)))

    def summary(self) -> str:
        """A few lines for the console."""
        counts = self.documents
        reasons = {
            "empty": counts.empty,
            "below the score": counts.low_score,
            "duplicate": counts.duplicate,
            "too short": counts.short,
            "without completion tokens": counts.not_learnt,
        }
        left_out = [f"{number:,} {reason}" for reason, number in reasons.items() if number]
        read = count(counts.read, self._noun)
        lines = [f"{read} read" + (f", left out: {', '.join(left_out)}" if left_out else "")]
        if tokens := self.token_counts:
            without = counts.read - tokens.eos
            lines.append(
                f"{count(tokens.read, 'token')} read, of which {tokens.eos:,} EOS and {tokens.left_out:,} left out; "
                f"EOS was added to {count(without, 'document')} without one"
            )
        if counts.truncated:
            lines.append(
                f"{count(counts.truncated, 'conversation')} longer than a window, cut after {self.seq_len + 1} tokens"
            )
        if counts.repaired:
            lines.append(f"{count(counts.repaired, self._noun)} with invalid characters, replaced by U+FFFD")
        if self.unknown_tokens:
            share = 100 * self.unknown_tokens / max(1, self.tokens)
            lines.append(
                f"{count(self.unknown_tokens, 'token')} ({share:.2g} %) {'is' if self.unknown_tokens == 1 else 'are'} "
                "<unk>: characters that the tokenizer cannot encode and that are lost; to keep them, train a tokenizer "
                "with byte fallback (`mythos tokenizer`)"
            )
        lines += [f"skipped: {one.name}, {one.where}: {one.reason}" for one in self.skipped]
        if self.left_out:
            lines.append(f"files left out: {count_reasons(self.left_out)}; manifest.json lists them")
        return "\n".join([*lines, *map(self._split_summary, SPLITS)])

    @property
    def _noun(self) -> str:
        return "conversation" if self.chat else "document"

    def _split_summary(self, name: str) -> str:
        split = self.splits[name]
        documents, tokens = count(split.documents, self._noun), count(split.tokens, "token")
        windows = f"{count(split.windows, 'window')} of {self.seq_len}"
        if name == "heldout" and not split.windows:
            what = "conversations fill" if self.chat else "text fills"
            why = f"the {what} only one window" if self.heldout else "--heldout is 0"
            return f"{name}: none, because {why}; training runs without evaluation"
        if self.loss_mask:
            padding = 100 * split.padding / max(1, split.tokens_written)
            in_loss = f"of which {split.learnt:,} are in the loss"
            return f"{name}: {documents}, {tokens}, {in_loss} -> {windows}; {padding:.2g} % padding"
        if name == "heldout" and self.heldout_by == "window":
            written = f"{self.documents.written:,}"
            return (
                f"{name}: {tokens} -> {windows}, cut from the end of the text: too few documents ({written}) to hold "
                f"out a share of {self.heldout:g} as complete documents"
            )
        dropped = count(split.tokens_dropped, "trailing token")
        return f"{name}: {documents}, {tokens} -> {windows}; {dropped} dropped (partial window)"


def count_reasons(left_out: Iterable[LeftOut]) -> str:
    """ "3 hidden, 1 dangling link", the most frequent first."""
    frequent = Counter(one.reason for one in left_out).most_common()
    return ", ".join(f"{number:,} {reason}" for reason, number in frequent)


def read_shard_manifest(path: str | Path) -> ShardManifest:
    """Raises UserError if the folder is missing, empty or unfinished, or if its manifest cannot be read."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            "no such folder; set data.path to a folder of shards, or make them with `mythos shards`", str(path)
        )
    if not any(path.iterdir()):
        raise UserError(
            "no shards here; set data.path to a folder of shards, or make them with `mythos shards`",
            str(path),
        )
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError("no manifest.json: not a finished conversion; run `mythos shards` (again)", str(path))
    try:
        return parse_shard_manifest(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"cannot be read ({type(error).__name__}: {error}); convert again", str(file)) from None


def parse_shard_manifest(content: bytes, source: str) -> ShardManifest:
    """The manifest in the bytes of a manifest.json; `source` is its path or URL. Raises UserError if it is invalid."""
    try:
        version = read_json(content)["format_version"]
        if version != FORMAT_VERSION:
            other = "a newer" if type(version) is int and version > FORMAT_VERSION else "another"
            raise UserError(
                f"format_version={version!r:.40} is not {FORMAT_VERSION}: {other} version of "
                "mythos_dist wrote these shards; use that version, or convert again into another folder",
                source,
            )
        return _checked(content)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({type(error).__name__}: {error}); convert again", source) from None


def read_json(content: bytes | str) -> Any:
    """Parse JSON. Raises ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@functools.cache
def _validator() -> "TypeAdapter[ShardManifest]":
    """Built once: that takes 10 ms."""
    from pydantic import TypeAdapter

    return TypeAdapter(ShardManifest)


def _checked(content: bytes) -> ShardManifest:
    """The manifest in a JSON document. Raises ValueError that names every value that cannot be."""
    from pydantic import ValidationError  # a second of import, for those that read one

    try:
        manifest = _validator().validate_json(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'JSON'}: "
            + (
                f"expected {_EXPECTED[one['type']]}, not {one['input']!r:.40}"
                if one["type"] in _EXPECTED
                else one["msg"]
            )
            for one in error.errors()
        ]
        raise ValueError("; ".join(problems[:5]) + " …" * (len(problems) > 5)) from None
    if manifest.splits.keys() != {*SPLITS}:
        raise ValueError(f"splits: expected {' and '.join(SPLITS)}, not {', '.join(manifest.splits) or 'none'}")
    counts = [vars(one) for one in (manifest, manifest.documents, *manifest.splits.values(), *manifest.inputs)]
    wrong = [
        f"{name}={value}"
        for group in counts
        for name, value in group.items()
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63
    ]
    least = {"seq_len": 1, "vocab_size": 1, "eos_id": 0, "targets": 0}
    wrong += [f"{name}={getattr(manifest, name)}" for name, low in least.items() if getattr(manifest, name) < low]
    if not manifest.tokenizer or manifest.tokenizer != Path(manifest.tokenizer).name:
        wrong.append(f"tokenizer={manifest.tokenizer!r}, which is not a file name")
    if manifest.targets and manifest.loss_mask:
        wrong.append(f"targets={manifest.targets} with loss_mask=true")
    if manifest.chat and not manifest.loss_mask:
        wrong.append("chat with loss_mask=false")
    if wrong:
        raise ValueError("; ".join(wrong[:5]))
    return manifest


def index_fingerprint(path: Path) -> str:
    """sha256 of the index.json of all splits, which have the hashes of the shards. OSError if train/ has none.

    A folder without heldout/ has the fingerprint of one whose heldout/ is empty.
    """
    digest = hashlib.sha256((path / "train" / "index.json").read_bytes())
    heldout = path / "heldout"
    digest.update((heldout / "index.json").read_bytes() if heldout.exists() else EMPTY_INDEX.encode())
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
