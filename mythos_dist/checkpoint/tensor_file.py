"""Files of tensors in the safetensors format: written in one pass and hashed on the way, read in parts.

    uint64 length of the header | JSON: name -> dtype, shape, place of its bytes | the bytes, one tensor after the other

The package safetensors wants all tensors of a file in memory at once; a checkpoint is written as it comes, and of a
large tensor a rank reads its own part only. Nothing here can run code: a file holds names and numbers.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import xxhash
from pydantic import ConfigDict, TypeAdapter

from mythos_dist.checkpoint.pieces import Index, Region, Size
from mythos_dist.checkpoint.strict_json import parse, shorten, validate

BLOCK_BYTES = 16 << 20
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_LIMIT = 100 << 20  # bytes of a header, as in the package


class Hash(Protocol):
    """Of hashlib or xxhash."""

    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class _Entry:
    """Of a header."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dtype: Literal["F32"]
    shape: Index
    data_offsets: tuple[Size, Size]


_HEADER = TypeAdapter(dict[str, _Entry])


def write_tensors(
    file: Path,
    shapes: Mapping[str, Index],
    data: Iterable[memoryview],
    dtype: str = "F32",
    notes: Mapping[str, str] | None = None,
    sha256: "Hash | None" = None,
) -> tuple[int, str]:
    """Write tensors whose bytes come in the order of `shapes`, in any blocks; the file is on disk when this returns.

    `notes` become the header's __metadata__; `sha256` is updated with all that is written. Returns the file's bytes and
    its xxh3_128.
    """
    header: dict[str, object] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests: list[Hash] = [xxh3 := xxhash.xxh3_128(), *([sha256] if sha256 else [])]
    size = 0
    with open(file, "wb", buffering=0) as stream:
        size += _write(stream, memoryview(len(text).to_bytes(8, "little") + text), digests)
        for block in data:
            size += _write(stream, block, digests)
        os.fsync(stream.fileno())
    assert size == 8 + len(text) + end, f"{file}: {size} bytes instead of {8 + len(text) + end}"
    return size, xxh3.hexdigest()


def _write(stream: BinaryIO, block: memoryview, digests: Sequence["Hash"]) -> int:
    block = block.cast("B") if block.nbytes else memoryview(b"")
    for start in range(0, len(block), BLOCK_BYTES):
        rest = block[start : start + BLOCK_BYTES]
        for digest in digests:
            digest.update(rest)
        while rest:
            rest = rest[stream.write(rest) :]
    return len(block)


def file_hash(file: Path, sha256: "Hash | None" = None) -> str:
    """xxh3_128 of a file; `sha256` is updated with its bytes. OSError if it cannot be read."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with open(file, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
            if sha256:
                sha256.update(block[:size])
    return digest.hexdigest()


class TensorFile:
    """A file that is there; tensors of fp32 are read as flat arrays, in regions."""

    def __init__(self, file: Path):
        """Raises OSError or ValueError if it is no such file, or holds something else than tensors of fp32."""
        self.file = file
        self.sizes: dict[str, int] = {}  # elements of each tensor
        self._begins: dict[str, int] = {}
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_LIMIT, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            header = parse(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        end = 8 + length
        for name, entry in sorted(validate(_HEADER, header).items(), key=lambda item: item[1].data_offsets):
            elements = math.prod(entry.shape)
            begin, behind = (8 + length + offset for offset in entry.data_offsets)
            if begin != end or behind != begin + 4 * elements:
                raise ValueError(f"{shorten(name)} has bytes [{begin}, {behind}) of the file and shape {entry.shape}")
            self.sizes[name], self._begins[name], end = elements, begin, behind
        if end != size:
            raise ValueError(f"its tensors end at byte {end} of {size}")

    def read(self, name: str, source: Region, out: np.ndarray, target: Region) -> None:
        """Copy the region `source` of an fp32 tensor, seen as a flat array, to the region `target` of a flat array.

        ValueError if there is no such tensor, or it is too small.
        """
        if source.offset + math.prod(source.shape) > self.sizes.get(name, -1):
            raise ValueError(f"it does not hold all of {shorten(name)}")
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
