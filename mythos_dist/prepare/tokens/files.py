"""Open, check and hash a source, whatever its format."""

import functools
import hashlib
from pathlib import Path

import numpy as np

from mythos_dist.data.manifest import TokenRules, file_sha256
from mythos_dist.errors import UserError
from mythos_dist.prepare.inputs import Source, reading
from mythos_dist.prepare.names import KIND_NAMES
from mythos_dist.prepare.spans import Chunks
from mythos_dist.prepare.tokens.mds_folder import MdsRows
from mythos_dist.prepare.tokens.megatron import MegatronRows
from mythos_dist.prepare.tokens.nanoset import NanosetRows
from mythos_dist.prepare.tokens.rows import RowBlock, Rows
from mythos_dist.prepare.tokens.saved_dataset import SavedDatasetRows

SEARCHED_TOKENS = 1 << 24  # for an EOS


@functools.lru_cache(maxsize=16)
def open_rows(source: Source, rules: TokenRules) -> Rows:
    """An open source; kept open, because each part of it opens it. Raises UserError or OSError."""
    if source.kind == "megatron":
        return MegatronRows(source)
    if source.kind == "nanoset":
        return NanosetRows(source)
    if source.kind == "datasets":
        return SavedDatasetRows(source, rules.column)
    return MdsRows(source, rules.column, rules.bytes_dtype)


def ends_at_rows(source: Source, rules: TokenRules) -> bool:
    """Whether each row of a source is the end of a document."""
    return rules.documents == "stored" or (rules.documents == "auto" and source.kind != "mds")


def inspect_source(source: Source, rules: TokenRules, eos_id: int, vocab_size: int) -> tuple[Chunks, str]:
    """The chunks of a source and the sha256 of its files. Raises UserError if it cannot be read."""
    open_rows.cache_clear()  # files may have changed since
    with reading(source):
        rows = open_rows(source, rules)
        rows.check()
        if not ends_at_rows(source, rules):
            _find_eos(rows, eos_id, vocab_size)
        digest = hashlib.sha256()
        for file in rows.files():
            digest.update(file_sha256(Path(file)).encode())
        return rows.chunks(), f"sha256:{digest.hexdigest()}"


def check_ids(block: RowBlock, vocab_size: int, source: Source) -> None:
    """Raises UserError for a token id outside the vocabulary, with its position."""
    low, high = int(block.tokens.min(initial=0)), int(block.tokens.max(initial=0))
    if low < 0 or high >= vocab_size:
        index = int(np.argmax((block.tokens < 0) | (block.tokens >= vocab_size)))
        raise UserError(
            f"{block.position(index)} is {int(block.tokens[index])}, but the tokenizer has ids from 0 to "
            f"{vocab_size - 1:,}; give the tokenizer that these tokens are of (and of an MDS column of bytes the right "
            "--bytes-dtype)",
            source.path,
        )


def _find_eos(rows: Rows, eos_id: int, vocab_size: int) -> None:
    """Raises UserError if the source begins with many tokens without an EOS: it would be a single document."""
    searched = 0
    for block in rows.blocks(0, rows.num_units):
        check_ids(block, vocab_size, rows.source)  # ids of another dtype have no EOS either
        if (block.tokens == eos_id).any():
            return
        searched += len(block.tokens)
        if searched >= SEARCHED_TOKENS:
            break
    if searched:
        raise UserError(
            f"none of its {'' if searched < SEARCHED_TOKENS else 'first '}{searched:,} tokens is EOS ({eos_id}), so "
            f"that documents cannot be separated; name the token that separates them with --eos, or, if each row of "
            f"this {KIND_NAMES[rows.source.kind]} is a document, set --documents stored",
            rows.source.path,
        )
