"""`manifest.json`: what a folder of shards was made from and holds. Written last: where it is, the conversion is whole.

Training reads it before any shard, to refuse shards that do not fit the config.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mythos_dist.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class InputFile:
    """One parquet file that was converted; `size` in bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SplitCounts:
    """tokens + documents (one EOS each) == tokens_written + tokens_dropped."""

    documents: int
    tokens: int
    windows: int
    tokens_written: int  # windows * (seq_len + 1)
    tokens_dropped: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards was made from and holds; `fingerprint` is the sha256 of its index files."""

    format_version: int
    seq_len: int
    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    heldout: float
    inputs: tuple[InputFile, ...]
    splits: dict[str, SplitCounts]
    fingerprint: str


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
            raise UserError(f"format_version={raw['format_version']} is not {FORMAT_VERSION}; convert again", str(file))
        raw["inputs"] = tuple(InputFile(**one) for one in raw["inputs"])
        raw["splits"] = {split: SplitCounts(**raw["splits"][split]) for split in SPLITS}
        return Manifest(**raw)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({type(error).__name__}: {error}); convert again", str(file)) from None


def index_fingerprint(path: Path) -> str:
    """sha256 over the index.json of every split; these hold the hashes of the shards. OSError if one is missing."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update((path / split / "index.json").read_bytes())
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
