"""Check one shard: its entry in index.json, its file's size and hashes, and its header and tokens (format: mds.py)."""

import errno
import hashlib
import io
import json
import os
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from mythos_dist.data.loss_mask import count_chat_windows
from mythos_dist.data.manifest import ShardManifest
from mythos_dist.data.shard import Shard
from mythos_dist.errors import UserError
from mythos_dist.prepare import pool
from mythos_dist.store.fetch import Unavailable, fetch
from mythos_dist.units import count
from mythos_dist.urls import join_url

PIECE_BYTES = 1 << 20  # read at a time, in complete windows
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # raised by JSON of an unexpected structure
NOT_IN_HEADER = ("samples", "raw_data", "zip_data")  # the other keys of an index entry are repeated in the shard
# Keys of an index entry that do not follow from the manifest.
SHARD_SPECIFIC = (*NOT_IN_HEADER, "hashes", "size_limit")


class Counted(NamedTuple):
    """Counts of a shard's windows: EOS tokens, or documents, loss tokens and padding by a loss mask."""

    documents: int = 0
    loss_tokens: int = 0
    padding: int = 0


def check_shard(shard: Shard) -> tuple[list[str], Counted]:
    """In a worker: the problems of a shard, and what it contains (nothing if its entry is wrong)."""
    manifest: ShardManifest = pool.shared()
    try:
        problems, counted = _check_entry(shard.entry, manifest), Counted()
        if not problems:  # the file can be checked only against a valid entry
            problems, counted = _check_file(shard, manifest)
        pool.add_progress(shard.stored["bytes"], 0)
        return problems, counted
    except UserError:  # the store cannot be reached
        raise
    except MALFORMED as error:
        return [f"its entry in index.json cannot be read ({type(error).__name__}: {error})"], Counted()


def _check_entry(entry: dict[str, Any], manifest: ShardManifest) -> list[str]:
    """The values of an index entry that contradict the manifest or the format."""
    window_bytes = manifest.window * np.dtype(manifest.dtype).itemsize
    expected = {
        "version": 2,
        "format": "mds",
        "compression": manifest.compression,
        "column_names": ["tokens"],
        "column_encodings": [f"ndarray:{manifest.dtype}:{manifest.window}"],
        "column_sizes": [window_bytes],
    }
    actual = {name: value for name, value in entry.items() if name not in SHARD_SPECIFIC}
    problems = [
        f"{name}={actual.get(name)!r} instead of {expected.get(name)!r}"
        for name in sorted(expected | actual)
        if expected.get(name) != actual.get(name)
    ]
    samples, raw_bytes = entry["samples"], entry["raw_data"]["bytes"]
    size = 8 + len(_header_json(entry)) + samples * (4 + window_bytes)
    if samples < 1 or raw_bytes != size or size >= 1 << 32:  # offsets are uint32
        problems.append(f"bytes={raw_bytes}, not {size} for {count(samples, 'window')}")
    if bool(entry["zip_data"]) != bool(manifest.compression):
        problems.append(f"zip_data={entry['zip_data']} with compression={manifest.compression}")
    for file in (entry["raw_data"], entry["zip_data"]):
        if file and (not file["hashes"] or sorted(file["hashes"]) != sorted(entry["hashes"])):
            problems.append(f"hashes={file['hashes']}, but {entry['hashes']} are required")
    return [f"index.json has {problem}" for problem in problems]


def _check_file(shard: Shard, manifest: ShardManifest) -> tuple[list[str], Counted]:
    """The problems of a shard's file, and what it contains."""
    raw, stored = shard.entry["raw_data"], shard.stored
    try:
        with _open(shard) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size != stored["bytes"]:
                return [f"has {count(size, 'byte')}, not {stored['bytes']:,}"], Counted()
            if stored is raw:
                return _check_content(file, shard.entry, manifest)
            compressed = file.read()
    except FileNotFoundError:
        return ["is missing"], Counted()
    except OSError as error:
        return [f"cannot be read ({error.strerror})"], Counted()
    hashes = _Hashes(stored)
    hashes.update(compressed)
    try:
        content = pa.Codec("zstd").decompress(compressed, raw["bytes"])
    except OSError as error:  # also if it has another size
        return [*hashes.problems(), f"cannot be decompressed ({error})"], Counted()
    problems, counted = _check_content(pa.BufferReader(content), shard.entry, manifest)
    return hashes.problems() + [f"decompressed, it {problem}" for problem in problems], counted


def _open(shard: Shard) -> IO[bytes]:
    """The stored file; one of a store is read into memory. Raises OSError if it is missing or has too many bytes, and
    Unavailable if the store cannot be reached."""
    if not shard.url:
        return open(shard.folder / shard.stored["basename"], "rb")
    content = io.BytesIO()
    try:
        fetch(join_url(shard.url, shard.name), content, shard.stored["bytes"])
    except Unavailable as error:
        if error.kind == "damaged":
            raise OSError(errno.EFBIG, f"more than {count(shard.stored['bytes'], 'byte')}") from None
        if error.missing:
            raise FileNotFoundError from None
        raise
    content.truncate()
    return content


def _check_content(stream: Any, entry: dict[str, Any], manifest: ShardManifest) -> tuple[list[str], Counted]:
    """The problems of an uncompressed shard, read in pieces of complete windows, and what it contains."""
    samples, header_json, dtype = entry["samples"], _header_json(entry), np.dtype(manifest.dtype)
    begin = 8 + 4 * samples + len(header_json)
    offsets = begin + np.arange(samples + 1) * manifest.window * dtype.itemsize
    header = {
        "number of windows": np.uint32(samples).tobytes(),
        "offsets": offsets.astype("<u4").tobytes(),
        "columns": header_json,
    }
    window_bytes = manifest.window * dtype.itemsize
    buffer = np.empty(max(1, PIECE_BYTES // window_bytes) * window_bytes, np.uint8)
    hashes, problems, counted = _Hashes(entry["raw_data"]), [], Counted()
    size = highest = 0
    for what, expected in header.items():
        actual = stream.read(len(expected))
        hashes.update(actual)
        size += len(actual)
        if actual != expected:
            problems.append(f"has other {what} in its header than index.json")
    while length := _fill(buffer, stream):
        hashes.update(buffer[:length].data)
        size += length
        tokens = buffer[: length - length % dtype.itemsize].view(dtype)
        highest = max(highest, int(tokens.max(initial=0)))
        counted = Counted(*map(sum, zip(counted, _count(tokens, manifest), strict=True)))
    if size != entry["raw_data"]["bytes"]:
        problems.append(f"has {count(size, 'byte')}, not {entry['raw_data']['bytes']:,}")
    if highest >= manifest.vocab_size:
        problems.append(f"contains the token {highest}, outside vocab_size={manifest.vocab_size}")
    return hashes.problems() + problems, counted


def _fill(buffer: np.ndarray, stream: Any) -> int:
    """Read until the buffer is full or the stream ends; the number of bytes read."""
    length = 0
    while length < len(buffer) and (read := stream.readinto(buffer[length:].data)):
        length += read
    return length


def _count(values: np.ndarray, manifest: ShardManifest) -> Counted:
    """What is in the values of consecutive windows."""
    if not manifest.loss_mask:
        return Counted(int(np.count_nonzero(values == manifest.eos_id)))
    windows = values[: len(values) // manifest.window * manifest.window].reshape(-1, manifest.window)
    counts = count_chat_windows(windows)
    return Counted(counts.documents, counts.learnt, counts.padding)


def _header_json(entry: dict[str, Any]) -> bytes:
    """The JSON in a shard's header."""
    return json.dumps({k: value for k, value in entry.items() if k not in NOT_IN_HEADER}, sort_keys=True).encode()


class _Hashes:
    """Computes every hash that index.json lists for a file."""

    def __init__(self, file: dict[str, Any]):
        self._expected = file["hashes"]
        self._states = {
            name: getattr(xxhash, name)() if name in xxhash.algorithms_available else hashlib.new(name)
            for name in self._expected
        }

    def update(self, piece: Any) -> None:
        for state in self._states.values():
            state.update(piece)

    def problems(self) -> list[str]:
        different = [name for name, state in self._states.items() if state.hexdigest() != self._expected[name]]
        return [f"has another {' and '.join(different)} than index.json lists"] if different else []
