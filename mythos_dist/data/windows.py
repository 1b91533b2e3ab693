"""Windows of token ids by index, out of shard files that are checked before anything in them is used.

The format is read by streaming's own reader of a shard. Not by its StreamingDataset: that shares memory between ranks,
which a kill -9 leaves in /dev/shm, waits for all ranks when it is built, and hangs or ends silently on a wrong hash.
Here a process checks a shard's size and hash when it first touches it, and unpacks a compressed one into a cache.
Several processes and nodes may unpack the same shard at once: each writes a file of its own and renames it.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import secrets
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from mythos_dist.data.unpack import TooLarge, unpack
from mythos_dist.errors import UserError
from mythos_dist.private import default_shard_cache, make_private_folder

OPEN_FILES = 128  # per stream; opening a file for every sample would ask a cluster's metadata server thousands of times
PIECE_BYTES = 1 << 20  # that a file is hashed by
CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli", "snappy": "snappy"}  # streaming's names


@dataclass(frozen=True)
class Shard:
    folder: Path  # of its split
    fingerprint: str  # of its corpus; names the folder in the cache
    entry: dict[str, Any]  # of index.json

    @property
    def stored(self) -> dict[str, Any]:
        """Name, size and hashes of the file in the folder."""
        return self.entry["zip_data"] or self.entry["raw_data"]

    @property
    def name(self) -> str:
        return f"{self.folder.name}/{self.stored['basename']}"

    def damaged(self, what: str) -> UserError:
        corpus = self.folder.parent
        return UserError(
            f"{self.name}: {what}; `python tools/verify_shards.py {corpus}` lists what is damaged, "
            "copy that again, or convert again",
            str(corpus),
        )


class WindowReader:
    """The windows of `shards`, one after the other, by index; each has `window` tokens."""

    def __init__(self, shards: Sequence[Shard], window: int, verify: bool = True, cache: str | Path | None = None):
        """`verify` False checks sizes only; `cache` is where compressed shards are unpacked, None: the system's
        temporary folder."""
        self._shards, self._window, self._verify = shards, window, verify
        self._ends = np.cumsum([shard.entry["samples"] for shard in shards])
        self._cache = Path(cache) if cache else None
        self._checked: set[int] = set()  # shards whose hash was right
        self._open: dict[int, _OpenShard] = {}
        import_reader()  # before loader processes fork: they would all do it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a spawned process opens its own files

    def read(self, samples: Sequence[int]) -> np.ndarray:
        """The windows of `samples`, unsigned integers of shape (B, window).

        Raises UserError for a shard that is missing, changed or damaged, or that cannot be read or unpacked.
        """
        shards = np.searchsorted(self._ends, samples, side="right").tolist()
        rows = []
        for sample, shard in zip(samples, shards, strict=True):
            opened = self._opened(shard)
            index = sample - int(self._ends[shard]) + self._shards[shard].entry["samples"]
            try:
                tokens = opened.tokens(index)
                if tokens.shape != (self._window,) or tokens.dtype.kind != "u":
                    raise ValueError(f"{tokens.dtype} of shape {tokens.shape}, not {self._window} tokens")
            except (OSError, ValueError, IndexError, KeyError, TypeError) as error:  # what a decoder makes of any bytes
                raise self._shards[shard].damaged(f"sample {index} of this file cannot be read ({error})") from None
            rows.append(tokens)
        return np.stack(rows)

    def _opened(self, number: int) -> "_OpenShard":
        opened = self._open.pop(number, None)  # put back last: the first of the dict is the one used longest ago
        if opened is None:
            while len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            opened = self._open_checked(self._shards[number], self._verify and number not in self._checked)
            self._checked.add(number)
        self._open[number] = opened
        return opened

    def _open_checked(self, shard: Shard, hashed: bool) -> "_OpenShard":
        raw = shard.entry["raw_data"]
        if not shard.entry["zip_data"]:
            try:
                return _OpenShard(shard, _open_whole(shard.folder / raw["basename"], raw, hashed))
            except _NotWhole as problem:
                raise shard.damaged(str(problem)) from None
        if raw["bytes"] > _largest(shard, self._window):
            raise shard.damaged(f"index.json says {raw['bytes']} bytes, more than its samples can take")
        cache = self._cache or make_private_folder(default_shard_cache(), "set data.cache to a folder of yours")
        unpacked = cache / shard.fingerprint[:16] / shard.folder.name / raw["basename"]
        with contextlib.suppress(_NotWhole):  # not there, or not whole after a power cut: unpacked (again)
            return _OpenShard(shard, _open_whole(unpacked, raw, hashed))
        _unpack(shard, unpacked, self._verify)
        try:
            return _OpenShard(shard, _open_whole(unpacked, raw, hashed))
        except _NotWhole as problem:
            raise shard.damaged(f"unpacked to {unpacked}, {problem}") from None


def _largest(shard: Shard, window: int) -> int:
    """Bytes of a shard of so many samples, in 8 bytes a token and with room for its header; offsets are uint32."""
    return min(1 << 32, (1 << 16) + shard.entry["samples"] * (4 + 8 * window))


class _OpenShard:
    """A shard's file held open. It reads without a file position, so processes that fork may share it."""

    def __init__(self, shard: Shard, file: int):
        self._file = file
        try:
            self._reader = import_reader().from_json(str(shard.folder.parent), shard.folder.name, shard.entry)
            self._reader.validate(allow_unsafe_types=False)  # a pickled column would run code of its writer's
        except (ValueError, KeyError, TypeError) as error:
            raise shard.damaged(f"index.json describes no shard that can be read ({error})") from None

    def __del__(self) -> None:
        os.close(self._file)

    def tokens(self, index: int) -> np.ndarray:
        """What `MDSReader.get_item` gives, without opening the file for each sample."""
        begin, end = np.frombuffer(os.pread(self._file, 8, 4 + 4 * index), "<u4").tolist()
        return self._reader.decode_sample(os.pread(self._file, end - begin, begin))["tokens"]


def import_reader() -> Any:
    """Streaming's reader of MDS shards; threads may ask for it at the same time."""
    with _importing:
        return _reader()


@functools.cache
def _reader() -> Any:
    """Streaming's reader, imported without running the `__init__.py` of the packages around it.

    Those import streaming's datasets, and with them Transformers and torchvision: 560 modules, 4,700 opened files and
    1.3 s of CPU for each rank. Empty packages with the same paths replace them during the import only, so a later
    `import streaming` gets all of it. Raises ModuleNotFoundError if streaming is not installed.
    """
    reader = "streaming.base.format.mds.reader"
    spec = importlib.util.find_spec("streaming")
    if "streaming" in sys.modules or spec is None or spec.origin is None:
        return importlib.import_module(reader).MDSReader
    for name in _AROUND_THE_READER:
        package = ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    try:
        return importlib.import_module(reader).MDSReader
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "streaming"]:
            del sys.modules[name]


_importing = threading.Lock()
_AROUND_THE_READER = (
    "streaming",
    "streaming.base",
    "streaming.base.format",
    "streaming.base.format.base",
    "streaming.base.format.mds",
)


class _NotWhole(Exception):
    """A file is missing, cannot be read, or is not what its entry says."""


def _open_whole(path: Path, expected: dict[str, Any], hashed: bool) -> int:
    """A descriptor of `path`, once its size and (if `hashed`) its hash are those `expected`. Raises _NotWhole."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _NotWhole(f"cannot be opened ({error.strerror})") from None
    try:
        if (size := os.fstat(file).st_size) != expected["bytes"]:
            raise _NotWhole(f"has {size} bytes, but index.json says {expected['bytes']}")
        if hashed:
            _check_hash(_pieces(file), expected["hashes"])
        return file
    except OSError as error:
        os.close(file)
        raise _NotWhole(f"cannot be read ({error.strerror})") from None
    except BaseException:
        os.close(file)
        raise


def _pieces(file: int) -> Iterator[bytes]:
    offset = 0
    while piece := os.pread(file, PIECE_BYTES, offset):
        yield piece
        offset += len(piece)


def _check_hash(pieces: Iterable[bytes], hashes: dict[str, str]) -> None:
    """Raise _NotWhole unless `pieces` together have the hash that index.json says: xxh64, or else the slower sha1."""
    import xxhash

    kinds = {"xxh64": xxhash.xxh64, "sha1": hashlib.sha1}
    kind = next((kind for kind in kinds if kind in hashes), None)
    if kind is None:
        raise _NotWhole("index.json gives neither its xxh64 nor its sha1; to trust it set data.verify to false")
    digest = kinds[kind]()
    for piece in pieces:
        digest.update(piece)
    if digest.hexdigest() != hashes[kind]:
        raise _NotWhole(f"its {kind} is {digest.hexdigest()}, but index.json says {hashes[kind]}")


def _unpack(shard: Shard, target: Path, verify: bool) -> None:
    """Write the shard's raw file to `target`; UserError if that fails, or if the packed file is damaged.

    Never more than the bytes that index.json says: a few kB may unpack to many GB.
    """
    packed, size = shard.folder / shard.stored["basename"], shard.entry["raw_data"]["bytes"]
    unfinished = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                for piece in _unpacked(shard, packed, size, verify):
                    file.write(piece)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{shard.name} cannot be unpacked to {target} ({error.strerror}); "
            f"set data.cache to a folder with room for the raw shards ({size / 1e6:.1f} MB for this one)",
            str(shard.folder.parent),
        ) from None


def _unpacked(shard: Shard, packed: Path, size: int, verify: bool) -> Iterator[bytes]:
    """The raw file in pieces, `size` bytes in all. UserError if the packed file is damaged, or holds more or less."""
    codec = CODECS.get(str(shard.entry["compression"]).partition(":")[0])
    if codec is None:
        raise shard.damaged(f"compression={shard.entry['compression']} in index.json is not known")
    done = 0
    try:
        os.close(_open_whole(packed, shard.stored, verify))
        if codec == "snappy":  # it is not read in pieces; its own header says the size, which is compared first
            pieces: Iterable[bytes] = [pa.Codec(codec).decompress(packed.read_bytes(), size, asbytes=True)]
        else:
            pieces = unpack(lambda: open(packed, "rb"), codec, size)  # noqa: SIM115
        for piece in pieces:
            done += len(piece)
            yield piece
    except _NotWhole as problem:
        raise shard.damaged(str(problem)) from None
    except TooLarge:
        raise shard.damaged(f"it unpacks to more than the {size} bytes that index.json says") from None
    except (OSError, pa.ArrowException) as error:
        raise shard.damaged(f"cannot be unpacked ({type(error).__name__}: {error})") from None
    if done != size:
        raise shard.damaged(f"it unpacks to {done} bytes, but index.json says {size}")
