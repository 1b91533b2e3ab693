"""The format of a file by its name, and names that do not belong to data."""

import posixpath
import re
from typing import Literal
from urllib.parse import urlsplit

from mythos_dist.urls import is_url

FileKind = Literal["parquet", "jsonl", "text", "megatron", "nanoset", "datasets", "mds"]  # the last four: of token ids
SUFFIXES: dict[str, FileKind] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # the name of JSON lines in C4 and others
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
SUPPORTED_NAMES = "name.parquet, name.jsonl or name.txt, the latter two also with .gz, .zst, .bz2 or .xz"
KIND_NAMES: dict[str, str] = {
    "parquet": "parquet",
    "jsonl": "JSON lines",
    "text": "plain text",
    "megatron": "Megatron .bin/.idx",
    "nanoset": "nanoset .ds",
    "datasets": "saved Hugging Face data set",
    "mds": "folder of MDS",
}

_DOCUMENTATION = re.compile(
    r"(readme|licen[sc]e|copying|notice|change(log|s)|contributing|authors|citation|code_of_conduct|datasheet"
    r"|data(set)?[-_]?card|requirements|(sha\d+|md5)sums?|checksums?)([-_. ].*)?",
    re.IGNORECASE,
)
# Files of Hugging Face data sets, models and shards: a single JSON document, not JSON lines.
_METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|croissant|metadata|manifest|index|package|config|generation_config"
    r"|tokenizer|tokenizer_config|special_tokens_map|vocab)\.json",
    re.IGNORECASE,
)


def file_kind(path: str) -> tuple[FileKind, str | None] | None:
    """(format, compression) of a file with this name; None if it is not supported."""
    stem, suffix = posixpath.splitext(urlsplit(path).path if is_url(path) else path)
    compression = COMPRESSIONS.get(suffix.lower())
    if compression:
        suffix = posixpath.splitext(stem)[1]
    kind = SUFFIXES.get(suffix.lower())
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def is_hidden(name: str) -> bool:
    """Names that file managers, notebooks, macOS, Hadoop and Spark give to their own files: .ipynb_checkpoints, ._a,
    __MACOSX, _SUCCESS, _temporary."""
    return name.startswith((".", "_"))


def is_documentation(name: str) -> bool:
    """README.md, LICENSE.txt and the like."""
    return _DOCUMENTATION.fullmatch(name) is not None


def is_metadata(name: str) -> bool:
    """JSON files that describe data: dataset_info.json and the like."""
    return _METADATA.fullmatch(name) is not None


def suffix_of(name: str) -> str:
    """The suffix of a name for messages: .csv, .csv.gz, or "no suffix"."""
    stem, suffix = posixpath.splitext(name.lower())
    if suffix in COMPRESSIONS or suffix in (".part", ".tmp", ".incomplete", ".crc"):
        suffix = posixpath.splitext(stem)[1] + suffix
    return suffix or "no suffix"


def escape_control_characters(name: str) -> str:
    """A file's name for the console: line ends and terminal control sequences are escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)
