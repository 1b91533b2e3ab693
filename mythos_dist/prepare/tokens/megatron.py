"""Megatron-LM's indexed data sets: PREFIX.bin with the tokens, PREFIX.idx with sequences and documents.

PREFIX.idx, little-endian, as in megatron/core/datasets/indexed_dataset.py:

    b"MMIDIDX\\0\\0" | uint64 version = 1 | uint8 dtype | uint64 sequences | uint64 documents + 1
    int32 length of each sequence, in tokens | int64 position of each in PREFIX.bin, in bytes
    int64 index of the sequence after each document, with a 0 before the first

A row is a document. A document of more than one sequence (sentences, with --split-sentences) is their concatenation.

Decisions: DATA-25.
"""

import struct
from pathlib import Path

import numpy as np

from mythos_dist.errors import UserError
from mythos_dist.prepare.inputs import Source
from mythos_dist.prepare.tokens.flat import FlatRows, map_array

MAGIC, LEGACY_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
OTHER_DTYPES = {6: "float64", 7: "float32"}
CHECKED_AT_ONCE = 1 << 20  # entries of the index


class MegatronRows(FlatRows):
    """The documents of PREFIX.bin and PREFIX.idx; `source.path` is PREFIX."""

    def __init__(self, source: Source):
        index = f"{source.path}.idx"
        size = Path(index).stat().st_size
        with open(index, "rb") as file:
            header = file.read(HEADER.size)
        dtype, self._num_sequences, num_documents = _parse_header(header, index)
        expected = HEADER.size + 12 * self._num_sequences + 8 * (num_documents + 1)
        if size != expected:
            raise UserError(_size_problem(size, expected, self._num_sequences), index)
        offset = HEADER.size
        self._lengths = map_array(index, "int32", self._num_sequences, offset)
        self._pointers = map_array(index, "int64", self._num_sequences, offset + 4 * self._num_sequences)
        self._documents = map_array(index, "int64", num_documents + 1, offset + 12 * self._num_sequences)
        self._itemsize = np.dtype(dtype).itemsize
        self._bytes = self._total_bytes()
        stored = Path(f"{source.path}.bin").stat().st_size
        if stored != self._bytes:
            what = "it was not written or copied completely" if stored < self._bytes else "it belongs to another index"
            raise UserError(
                f"has {stored:,} bytes, but its index describes {self._bytes:,}; {what}: copy .bin and .idx again",
                f"{source.path}.bin",
            )
        tokens = map_array(f"{source.path}.bin", dtype, self._bytes // self._itemsize)
        super().__init__(source, tokens, num_documents)

    def row_ends(self, low: int, high: int) -> np.ndarray:
        sequences = np.asarray(self._documents[low + 1 : high + 1])
        ends = np.full(len(sequences), self._bytes, np.int64)
        inside = sequences < self._num_sequences
        ends[inside] = self._pointers[sequences[inside]]
        return ends // self._itemsize

    def files(self) -> list[str]:
        return [f"{self.source.path}.idx", f"{self.source.path}.bin"]

    def check(self) -> None:
        """Sequences must follow one another without gaps, and documents must cover all of them."""
        index, position = f"{self.source.path}.idx", 0
        for start in range(0, self._num_sequences, CHECKED_AT_ONCE):
            lengths = self._lengths[start : start + CHECKED_AT_ONCE].astype(np.int64)
            ends = position + np.cumsum(lengths) * self._itemsize
            wrong = (lengths < 0) | (self._pointers[start : start + CHECKED_AT_ONCE] != ends - lengths * self._itemsize)
            if wrong.any():
                sequence = start + int(np.argmax(wrong))
                raise UserError(f"sequence {sequence:,} does not follow the one before it; write it again", index)
            position = int(ends[-1])
        first, last = int(self._documents[0]), int(self._documents[-1])
        if (first, last) != (0, self._num_sequences):
            raise UserError(
                f"its documents are sequences {first:,} to {last:,} of {self._num_sequences:,}; write it again with "
                "the last document ended (IndexedDatasetBuilder.end_document)",
                index,
            )
        for start in range(0, len(self._documents), CHECKED_AT_ONCE):
            if (np.diff(self._documents[start : start + CHECKED_AT_ONCE + 1]) < 0).any():
                raise UserError("its document index is not ascending; write it again", index)

    def _total_bytes(self) -> int:
        if not self._num_sequences:
            return 0
        return int(self._pointers[-1]) + int(self._lengths[-1]) * self._itemsize


def _parse_header(header: bytes, index: str) -> tuple[str, int, int]:
    """(dtype, sequences, documents). Raises UserError if this version or dtype of an index is not read."""
    if header.startswith(LEGACY_MAGIC):
        raise UserError(
            "is an index of Megatron-LM before 2020 (TNTIDX); tokenize again with tools/preprocess_data.py and "
            "--dataset-impl mmap",
            index,
        )
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(f"is not the index of a Megatron data set: it begins with {header[:9]!r}", index)
    _, version, code, sequences, document_edges = HEADER.unpack(header)
    if version != 1:
        raise UserError(f"has version {version} of the index, but version 1 is read; convert it with Megatron", index)
    if code not in DTYPES:
        name = OTHER_DTYPES.get(code, f"code {code}")
        raise UserError(
            f"its tokens have dtype {name}, which tokens do not have; supported: {', '.join(DTYPES.values())}", index
        )
    if not document_edges:
        raise UserError("has no document index; write it again", index)
    return DTYPES[code], sequences, document_edges - 1


def _size_problem(size: int, expected: int, sequences: int) -> str:
    if size == expected + sequences:
        return "is an index of a multimodal data set (it has a mode for each sequence), which is not read"
    what = "it was not written or copied completely" if size < expected else "it is damaged"
    return f"has {size:,} bytes, but its header describes {expected:,}; {what}: copy it again"
