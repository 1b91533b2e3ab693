"""Files of tensors in the safetensors format: written in one pass and hashed on the way, read in parts.

    uint64 length of the header | JSON: name -> dtype, shape, place of its bytes | the bytes, one tensor after the other

The package safetensors wants all tensors of a file in memory at once; a checkpoint is written as it comes, and of a
large tensor a rank reads its own part only. Nothing here can run code: a file holds names and numbers.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from mythos_dist.checkpoint.pieces import Index, Region

BLOCK_BYTES = 16 << 20
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_LIMIT = 100 << 20  # bytes of a header, as in the package


def write_tensors(
    file: Path,
    shapes: Mapping[str, Index],
    data: Iterable[memoryview],
    dtype: str = "F32",
    notes: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Write tensors whose bytes come in the order of `shapes`, in any blocks; the file is on disk when this returns.

    `notes` become the header's __metadata__. Returns the file's bytes and its xxh3_128.
    """
    header: dict[str, object] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with open(file, "wb", buffering=0) as stream:
        size += _write(stream, memoryview(len(text).to_bytes(8, "little") + text), digest)
        for block in data:
            size += _write(stream, block, digest)
        os.fsync(stream.fileno())
    assert size == 8 + len(text) + end, f"{file}: {size} bytes instead of {8 + len(text) + end}"
    return size, digest.hexdigest()


def _write(stream: BinaryIO, block: memoryview, digest: "xxhash.xxh3_128") -> int:
    block = block.cast("B") if block.nbytes else memoryview(b"")
    for start in range(0, len(block), BLOCK_BYTES):
        rest = block[start : start + BLOCK_BYTES]
        digest.update(rest)
        while rest:
            rest = rest[stream.write(rest) :]
    return len(block)


def file_hash(file: Path) -> str:
    """xxh3_128 of a file. OSError if it cannot be read."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with open(file, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


class TensorFile:
    """A file that is there and whole; tensors of fp32 are read as flat arrays, in regions."""

    def __init__(self, file: Path):
        """Raises OSError or ValueError if it is no such file."""
        self.file = file
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LIMIT:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        self._begins: dict[str, int] = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str, source: Region, out: np.ndarray, target: Region) -> None:
        """Copy the region `source` of an fp32 tensor, seen as a flat array, to the region `target` of a flat array."""
        begin = self._begins[name]
        here, there = source.contiguous, target.contiguous
        if here and there:
            self._read_into(begin + 4 * here[0], out[slice(*there)].data.cast("B"))
            return
        size = math.prod(source.shape)
        # Mapped, so that of rows of which only some columns are wanted, memory holds a page at a time.
        flat = np.memmap(self.file, "<f4", "r", begin + 4 * source.offset, (size,))
        view = out[target.offset : target.offset + math.prod(target.shape)].reshape(target.shape)
        view[target.where] = flat.reshape(source.shape)[source.where]

    def _read_into(self, begin: int, block: memoryview) -> None:
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(begin)
            while block:
                size = stream.readinto(block[: 64 << 20])
                if not size:
                    raise OSError(f"{self.file} ends too early")
                block = block[size:]
