"""Windows of token ids to MDS shards, byte for byte what streaming's MDSWriter writes.

Importing streaming takes 7 s of CPU and 700 MB in each converting process (it pulls in torch, transformers and
torchvision), and MDSWriter handles a window at a time in Python. Windows of one length make the format plain:

    uint32 samples | uint32 (samples + 1) offsets | JSON with the columns | the windows, one after the other

Samples of a fixed shape (`ndarray:uint16:2049`) have no header of their own. tests/prepare/test_mds.py holds the files
and the index entries against MDSWriter's.
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
    """Cuts a stream of tokens into windows and writes them to shard.00000.mds, shard.00001.mds, … in `folder`.

    tokens added == windows * (seq_len + 1) + len(tail), at any time. The folder is made with the first shard; what
    does not fill a window stays in `tail`. `shards` are the entries for index.json, with basenames below `prefix`.
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
        room = SIZE_LIMIT - 8 - len(self._config_bytes)
        # Like MDSWriter, a shard takes at least one window, however long it is.
        self._tokens_per_shard = max(1, room // (4 + self._window * self._dtype.itemsize)) * self._window
        self._buffer = np.empty(self._tokens_per_shard, self._dtype)  # takes memory as it fills
        self._used = 0
        self.shards: list[dict[str, Any]] = []
        self.windows = 0

    @property
    def tail(self) -> np.ndarray:
        """Tokens that fill no window; after `finish`."""
        return self._buffer[: self._used]

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens of any number, already of the shards' dtype; they are kept until their shard is full."""
        assert tokens.dtype == self._dtype
        while len(tokens):
            here, tokens = np.split(tokens, [self._tokens_per_shard - self._used])
            self._buffer[self._used : self._used + len(here)] = here
            self._used += len(here)
            if self._used == self._tokens_per_shard:
                self._flush()

    def finish(self) -> None:
        """Write the last shard."""
        if self._used >= self._window:
            self._flush()

    def _flush(self) -> None:
        """Write all windows as one shard; fewer tokens than a window stay."""
        whole = self._used // self._window * self._window
        samples = whole // self._window
        begin = 4 + 4 * (samples + 1) + len(self._config_bytes)
        offsets = begin + np.arange(samples + 1, dtype=np.uint32) * np.uint32(self._window * self._dtype.itemsize)
        pieces = [np.uint32(samples).tobytes(), offsets.astype("<u4").tobytes(), self._config_bytes]
        content = [*map(memoryview, pieces), self._buffer[:whole].data.cast("B")]
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
        rest = self._used - whole
        self._buffer[:rest] = self._buffer[whole : self._used]
        self._used = rest

    def _describe(self, content: list[memoryview], name: str) -> dict[str, Any]:
        sha1, xxh64 = hashlib.sha1(), xxhash.xxh64()
        for piece in content:
            sha1.update(piece)
            xxh64.update(piece)
        hashes = {"sha1": sha1.hexdigest(), "xxh64": xxh64.hexdigest()}
        return {"basename": self._prefix + name, "bytes": sum(map(len, content)), "hashes": hashes}


def _compress(compression: str, data: bytes) -> bytes:
    """zstd or zstd:LEVEL, as one frame that says its size, as streaming's unpacking needs it.

    Arrow's codec uses one thread: the `zstd` package takes as many as there are cores, and its bytes follow.
    """
    level = compression.partition(":")[2]
    return pa.Codec("zstd", compression_level=int(level) if level else 3).compress(data, asbytes=True)
