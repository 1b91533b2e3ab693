"""Write windows of token ids as MDS shards, byte for byte like streaming's MDSWriter.

Importing streaming takes 7 s of CPU and 700 MB in each worker (it imports torch, transformers and torchvision), and
MDSWriter processes one window at a time in Python. With windows of one length the format is simple:

    uint32 samples | uint32 (samples + 1) offsets | JSON with the columns | the windows

Samples of a fixed shape (`ndarray:uint16:2049`) have no header of their own. tests/prepare/test_mds.py compares the
files and the index entries with MDSWriter's.

Decisions: DATA-6.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

SIZE_LIMIT = 1 << 26  # bytes of a shard before compression: streaming's default
HASHES = ("sha1", "xxh64")


class ShardWriter:
    """Divides a stream of tokens into windows and writes them to shard.00000.mds, shard.00001.mds, … in `folder`.

    The folder is created with the first shard. `shards` are the entries for index.json, with `prefix` before each
    basename. After `finish`, tokens added == windows * (seq_len + 1) + len(tail).
    """

    def __init__(self, folder: Path, seq_len: int, dtype: str, compression: str | None = None, prefix: str = ""):
        self._folder, self._prefix, self._compression = folder, prefix, compression
        self._window, self._dtype = seq_len + 1, np.dtype(dtype)
        self._config = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": list(HASHES),
            "size_limit": SIZE_LIMIT,
            "column_names": ["tokens"],
            "column_encodings": [f"ndarray:{dtype}:{self._window}"],
            "column_sizes": [self._window * self._dtype.itemsize],
        }
        self._config_bytes = json.dumps(self._config, sort_keys=True).encode()
        available = SIZE_LIMIT - 8 - len(self._config_bytes)
        # Like MDSWriter, a shard takes at least one window, however long it is.
        self._tokens_per_shard = max(1, available // (4 + self._window * self._dtype.itemsize)) * self._window
        self._buffer = np.empty(self._tokens_per_shard, self._dtype)  # memory is used as it is filled
        self._used = 0
        self.shards: list[dict[str, Any]] = []
        self.windows = 0

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tokens that `add` takes."""
        return self._dtype

    @property
    def tail(self) -> np.ndarray:
        """The tokens of the partial window at the end; after `finish`."""
        return self._buffer[: self._used]

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens of the shards' dtype; they are buffered until their shard is full."""
        assert tokens.dtype == self._dtype
        while len(tokens):
            free = self._tokens_per_shard - self._used
            taken, tokens = tokens[:free], tokens[free:]
            self._buffer[self._used : self._used + len(taken)] = taken
            self._used += len(taken)
            if self._used == self._tokens_per_shard:
                self._flush()

    def finish(self) -> None:
        """Write the last shard."""
        if self._used >= self._window:
            self._flush()

    def _flush(self) -> None:
        """Write all complete windows as one shard; a partial window stays in the buffer."""
        samples = self._used // self._window
        num_tokens = samples * self._window
        begin = 4 + 4 * (samples + 1) + len(self._config_bytes)
        offsets = begin + np.arange(samples + 1, dtype=np.uint32) * np.uint32(self._window * self._dtype.itemsize)
        pieces = [np.uint32(samples).tobytes(), offsets.astype("<u4").tobytes(), self._config_bytes]
        content = [*(memoryview(piece) for piece in pieces), self._buffer[:num_tokens].data.cast("B")]
        name = f"shard.{len(self.shards):05}.mds"
        entry = {"samples": samples, "raw_data": self._describe(content, name), "zip_data": None, **self._config}
        if self._compression:
            content = [memoryview(_compress(self._compression, b"".join(content)))]
            name += ".zstd"
            entry["zip_data"] = self._describe(content, name)
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / name, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        self.shards.append(entry)
        self.windows += samples
        rest = self._used - num_tokens
        self._buffer[:rest] = self._buffer[num_tokens : self._used]
        self._used = rest

    def _describe(self, content: list[memoryview], name: str) -> dict[str, Any]:
        sha1, xxh64 = hashlib.sha1(), xxhash.xxh64()
        for piece in content:
            sha1.update(piece)
            xxh64.update(piece)
        hashes = {"sha1": sha1.hexdigest(), "xxh64": xxh64.hexdigest()}
        return {"basename": self._prefix + name, "bytes": sum(map(len, content)), "hashes": hashes}


def _compress(compression: str, data: bytes) -> bytes:
    """zstd or zstd:LEVEL, as one frame with its size in the header, as streaming needs it.

    Arrow's codec uses one thread. The `zstd` package uses one per core, and its bytes depend on their number.
    """
    level = compression.partition(":")[2]
    return pa.Codec("zstd", compression_level=int(level) if level else 3).compress(data, asbytes=True)
