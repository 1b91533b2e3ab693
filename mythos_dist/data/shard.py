"""A shard file: its entry in index.json, the checks of its size and hash, and its uncompressed bytes."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mythos_dist.data.decompress import CHUNK_BYTES, TooLarge, decompress
from mythos_dist.errors import UserError

CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli", "snappy": "snappy"}  # streaming's names -> ours


@dataclass(frozen=True)
class Shard:
    """One shard file of a split, as index.json lists it."""

    folder: Path  # of the split
    fingerprint: str  # of the corpus; names its folder in the cache
    entry: dict[str, Any]  # in index.json
    url: str = ""  # of the folder of shards, if it is in a store; `folder` then is in data.cache

    @property
    def stored(self) -> dict[str, Any]:
        """Name, size and hashes of the file in the folder, compressed or not."""
        return self.entry["zip_data"] or self.entry["raw_data"]

    @property
    def name(self) -> str:
        return f"{self.folder.name}/{self.stored['basename']}"

    def damaged(self, what: str) -> UserError:
        """The error for a shard file that cannot be used."""
        if self.url:
            return UserError(f"{self.name}: {what}; copy it to the store again, or convert again", self.url)
        corpus = self.folder.parent
        return UserError(
            f"{self.name}: {what}; list the damaged files with `mythos verify {corpus}` and copy them "
            "again, or convert again",
            str(corpus),
        )


def max_bytes(shard: Shard, window: int) -> int:
    """The most bytes that a shard of this many samples can have: 8 per token, and a header; offsets are uint32."""
    return min(1 << 32, (1 << 16) + shard.entry["samples"] * (4 + 8 * window))


class DamagedFile(Exception):
    """A file is missing, cannot be read, or differs from its entry in index.json."""


def open_verified(path: Path, expected: dict[str, Any], hashed: bool) -> int:
    """Open `path` after checking its size and, if `hashed`, its hash. Returns a descriptor; raises DamagedFile."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DamagedFile(f"cannot be opened ({error.strerror})") from None
    try:
        verify_open(file, expected, hashed)
        return file
    except BaseException:
        os.close(file)
        raise


def verify_open(file: int, expected: dict[str, Any], hashed: bool) -> None:
    """Check the size of an open file and, if `hashed`, its hash. Raises DamagedFile."""
    try:
        if (size := os.fstat(file).st_size) != expected["bytes"]:
            raise DamagedFile(f"has {size} bytes, but index.json says {expected['bytes']}")
        if hashed:
            check_hash(chunks_of(file), expected["hashes"])
    except OSError as error:
        raise DamagedFile(f"cannot be read ({error.strerror})") from None


def chunks_of(file: int) -> Iterator[bytes]:
    """The content of an open file; its position is not used."""
    offset = 0
    while chunk := os.pread(file, CHUNK_BYTES, offset):
        yield chunk
        offset += len(chunk)


def check_hash(chunks: Iterable[bytes], hashes: dict[str, str]) -> None:
    """Raise DamagedFile if the chunks' hash is not the one in index.json: xxh64, or else the slower sha1."""
    import xxhash

    kinds = {"xxh64": xxhash.xxh64, "sha1": hashlib.sha1}
    kind = next((kind for kind in kinds if kind in hashes), None)
    if kind is None:
        raise DamagedFile("index.json has neither its xxh64 nor its sha1; set data.verify=false to read it anyway")
    digest = kinds[kind]()
    for chunk in chunks:
        digest.update(chunk)
    if digest.hexdigest() != hashes[kind]:
        raise DamagedFile(f"its {kind} is {digest.hexdigest()}, but index.json says {hashes[kind]}")


def decompressed_chunks(shard: Shard, compressed: Path, size: int, verify: bool) -> Iterator[bytes]:
    """The raw file, `size` bytes in all. UserError if the compressed file is damaged, or has more or less content."""
    codec = CODECS.get(str(shard.entry["compression"]).partition(":")[0])
    if codec is None:
        raise shard.damaged(f"compression={shard.entry['compression']} in index.json is unknown")
    done = 0
    try:
        os.close(open_verified(compressed, shard.stored, verify))
        if codec == "snappy":  # has no streaming decoder; it checks the size in the file's header first
            chunks: Iterable[bytes] = [pa.Codec(codec).decompress(compressed.read_bytes(), size, asbytes=True)]
        else:
            chunks = decompress(lambda: open(compressed, "rb"), codec, size)  # noqa: SIM115
        for chunk in chunks:
            done += len(chunk)
            yield chunk
    except DamagedFile as problem:
        raise shard.damaged(str(problem)) from None
    except TooLarge:
        raise shard.damaged(f"it decompresses to more than the {size} bytes that index.json says") from None
    except (OSError, pa.ArrowException) as error:
        raise shard.damaged(f"cannot be decompressed ({type(error).__name__}: {error})") from None
    if done != size:
        raise shard.damaged(f"it decompresses to {done} bytes, but index.json says {size}")
