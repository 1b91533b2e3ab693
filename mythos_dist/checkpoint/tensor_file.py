"""Files of tensors in the safetensors format: written and hashed in one pass, read by region.

    uint64 length of the header | JSON: name -> dtype, shape, offsets | the tensors' bytes, one tensor after the other

The package safetensors needs all tensors of a file in memory to write it. Here blocks are written as they come, and a
rank reads only its region of a large tensor. Loading runs no code: a file holds names and values, and no pickle.
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
from mythos_dist.checkpoint.strict_json import parse_json, shorten, validate

BLOCK_BYTES = 16 << 20
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
_MAX_HEADER_BYTES = 100 << 20  # as in the package


class Hash(Protocol):
    """An object of hashlib or xxhash."""

    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class _HeaderEntry:
    """What a header says of a tensor."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dtype: Literal["F32"]
    shape: Index
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True)
class _FloatEntry:
    """The same, of an export."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dtype: Literal["F32", "BF16", "F16", "F64"]
    shape: Index
    data_offsets: tuple[Size, Size]


_HEADER, _FLOAT_HEADER = TypeAdapter(dict[str, _HeaderEntry]), TypeAdapter(dict[str, _FloatEntry])


def write_tensors(
    file: Path,
    shapes: Mapping[str, Index],
    data: Iterable[memoryview],
    dtype: str | Mapping[str, str] = "F32",
    metadata: Mapping[str, str] | None = None,
    sha256: "Hash | None" = None,
) -> tuple[int, str]:
    """Write tensors whose bytes come in the order of `shapes`, in blocks of any size; fsyncs the file.

    `dtype`: of all tensors, or by name.
    `metadata` becomes the header's __metadata__; `sha256` is updated with all bytes written. Returns the file's size in
    bytes and its xxh3_128.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        label = dtype if isinstance(dtype, str) else dtype[name]
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[label]
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    xxh3 = xxhash.xxh3_128()
    digests: list[Hash] = [xxh3, sha256] if sha256 else [xxh3]
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
            written = stream.write(rest)
            rest = rest[written:]
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


class TensorHeader:
    """Where the tensors of a file are."""

    def __init__(self, content: bytes, file_bytes: int, any_float: bool = False):
        """`content`: the beginning of the file, `header_bytes(content)` bytes or more.

        Raises ValueError if it is not of this format, or has tensors of another dtype than fp32, or with `any_float`
        than those of exports.
        """
        end = header_bytes(content, file_bytes)
        header = parse_json(content[8:end])
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self.content = content[:end]
        self.sizes: dict[str, int] = {}  # elements of each tensor
        self.begins: dict[str, int] = {}  # first byte of each tensor
        self.entries: dict[str, _HeaderEntry | _FloatEntry] = validate(_FLOAT_HEADER if any_float else _HEADER, header)
        data_begin = end
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].data_offsets):
            elements = math.prod(entry.shape)
            tensor_begin, tensor_end = (data_begin + offset for offset in entry.data_offsets)
            if tensor_begin != end or tensor_end != tensor_begin + ITEM_BYTES[entry.dtype] * elements:
                raise ValueError(
                    f"{shorten(name)} of shape {entry.shape} is at bytes [{tensor_begin}, {tensor_end}) of the file"
                )
            self.sizes[name], self.begins[name] = elements, tensor_begin
            end = tensor_end
        if end != file_bytes:
            raise ValueError(f"its tensors end at byte {end} of {file_bytes}")

    def check_region(self, name: str, source: Region) -> int:
        """The first byte of a tensor. Raises ValueError if there is no such tensor, or if it does not hold `source`."""
        if source.offset + math.prod(source.shape) > self.sizes.get(name, -1):
            raise ValueError(f"it does not hold all of {shorten(name)}")
        return self.begins[name]


def header_bytes(content: bytes, file_bytes: int) -> int:
    """Length of a file's header, from its first 8 bytes. Raises ValueError if it is too long."""
    length = int.from_bytes(content[:8], "little")
    if length > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"its header has {length} bytes, which is too long")
    return 8 + length


class TensorFile:
    """A local file of fp32 tensors, to read regions of them."""

    def __init__(self, file: Path):
        """Raises OSError or ValueError if it cannot be read, is not of this format, or has tensors of another dtype."""
        self.file = file
        with open(file, "rb") as stream:
            size, begin = os.fstat(stream.fileno()).st_size, stream.read(8)
            self.header = TensorHeader(begin + stream.read(header_bytes(begin, size) - 8), size)

    def read(self, name: str, source: Region, out: np.ndarray, target: Region) -> None:
        """Copy the region `source` of the flattened tensor `name` to the region `target` of the flat array `out`.

        Raises ValueError if there is no such tensor, or it is too small.
        """
        begin = self.header.check_region(name, source)
        source_range, target_range = source.contiguous, target.contiguous
        if source_range and target_range:
            self._read_into(begin + 4 * source_range[0], out[slice(*target_range)].data.cast("B"))
            return
        # Mapped: where only some columns of the rows are needed, memory holds a page at a time.
        source_box = np.memmap(self.file, "<f4", "r", begin + 4 * source.offset, source.shape)
        target_box = out[target.offset : target.offset + math.prod(target.shape)].reshape(target.shape)
        target_box[target.slices] = source_box[source.slices]

    def _read_into(self, begin: int, block: memoryview) -> None:
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(begin)
            while block:
                size = stream.readinto(block[: 64 << 20])
                if not size:
                    raise OSError(f"{self.file} ends too early")
                block = block[size:]
