"""nanotron's nanosets, which datatrove's DocumentTokenizer writes.

    NAME.ds           tokens, uint16 or uint32, little-endian
    NAME.ds.index     uint64: the end of each document, in tokens
    NAME.ds.metadata  text: "TOKENIZER|BYTES PER TOKEN", the number of tokens, the same in words; may be missing
    NAME.ds.loss      a loss mask, which is not read

A row is a document. Source: datatrove/pipeline/tokens/tokenizer.py: TokenizedFile.
"""

import re
from pathlib import Path

import numpy as np

from mythos_dist.errors import UserError
from mythos_dist.prepare.inputs import Source
from mythos_dist.prepare.tokens.flat import FlatRows, map_array

DTYPES = {2: "uint16", 4: "uint32"}
CHECKED_AT_ONCE = 1 << 20  # entries of the index


class NanosetRows(FlatRows):
    """The documents of one .ds file, which `source.path` names."""

    def __init__(self, source: Source):
        index = f"{source.path}.index"
        index_bytes, size = Path(index).stat().st_size, Path(source.path).stat().st_size
        if index_bytes % 8:
            raise UserError(f"has {index_bytes:,} bytes, which are not 8 per document; copy it again", index)
        self._ends = map_array(index, "uint64", index_bytes // 8)
        num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        itemsize = size // num_tokens if num_tokens else 2
        if itemsize not in DTYPES or itemsize * num_tokens != size:
            raise UserError(
                f"has {size:,} bytes, but its index describes {num_tokens:,} tokens, of 2 or 4 bytes each; copy .ds "
                "and .ds.index again",
                source.path,
            )
        self._itemsize = itemsize
        super().__init__(source, map_array(source.path, DTYPES[itemsize], num_tokens), len(self._ends))

    def row_ends(self, low: int, high: int) -> np.ndarray:
        return np.asarray(self._ends[low:high]).astype(np.int64)

    def files(self) -> list[str]:
        return [self.source.path, f"{self.source.path}.index"]

    def check(self) -> None:
        """The index must be ascending, and the metadata, if there is one, must agree with it."""
        for start in range(0, len(self._ends), CHECKED_AT_ONCE):
            ends = self._ends[start : start + CHECKED_AT_ONCE + 1]
            if (ends[1:] < ends[:-1]).any():
                raise UserError("is not ascending; write it again", f"{self.source.path}.index")
        metadata = Path(f"{self.source.path}.metadata")
        if not metadata.is_file():
            return
        described = re.match(r"[^\n]*\|(\d+)\n(\d+)(\n|$)", metadata.read_text(encoding="utf-8", errors="replace"))
        if described and (int(described[1]), int(described[2])) != (self._itemsize, self.num_units):
            raise UserError(
                f"describes {int(described[2]):,} tokens of {described[1]} bytes, but the files have "
                f"{self.num_units:,} of {self._itemsize}; copy all files again",
                str(metadata),
            )
