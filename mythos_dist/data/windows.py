"""Reading windows of token ids by index from MDS shard files, which are verified before use.

Shards are decoded by streaming's MDSReader, but not through its StreamingDataset: that shares memory between ranks,
which a kill -9 leaves in /dev/shm, waits for all ranks in its constructor, and hangs or ends silently on a wrong hash.
Here each process checks a shard's size and hash at its first use, and decompresses compressed shards into a cache.
Several processes and nodes may decompress the same shard at once: each writes its own file and renames it.

Decisions: DATA-4, DATA-14.
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

from mythos_dist.data.decompress import CHUNK_BYTES, TooLarge, decompress
from mythos_dist.errors import UserError
from mythos_dist.private import default_shard_cache, make_private_folder

OPEN_FILES = 128  # kept open per stream: reopening per sample would overload a cluster's metadata server
CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli", "snappy": "snappy"}  # streaming's names -> ours


@dataclass(frozen=True)
class Shard:
    """One shard file of a split, as index.json lists it."""

    folder: Path  # of the split
    fingerprint: str  # of the corpus; names its folder in the cache
    entry: dict[str, Any]  # in index.json

    @property
    def stored(self) -> dict[str, Any]:
        """Name, size and hashes of the file in the folder, compressed or not."""
        return self.entry["zip_data"] or self.entry["raw_data"]

    @property
    def name(self) -> str:
        return f"{self.folder.name}/{self.stored['basename']}"

    def damaged(self, what: str) -> UserError:
        """The error for a shard file that cannot be used."""
        corpus = self.folder.parent
        return UserError(
            f"{self.name}: {what}; list the damaged files with `python tools/verify_shards.py {corpus}` and copy them "
            "again, or convert again",
            str(corpus),
        )


class WindowReader:
    """Reads windows of `window` tokens by their index in the concatenation of `shards`."""

    def __init__(self, shards: Sequence[Shard], window: int, verify: bool = True, cache: str | Path | None = None):
        """`verify` False: only sizes are checked, not hashes. `cache`: where compressed shards are decompressed;
        None: below the system's temporary folder."""
        self._shards, self._window, self._verify = shards, window, verify
        self._ends = np.cumsum([shard.entry["samples"] for shard in shards])
        self._cache = Path(cache) if cache else None
        self._verified: set[int] = set()  # shards whose hash was checked
        self._open: dict[int, _OpenShard] = {}
        import_reader()  # once, before loader processes fork

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a spawned process opens its own files

    def read(self, samples: Sequence[int]) -> np.ndarray:
        """The windows with the indices `samples`, unsigned integers of shape (B, window).

        Raises UserError for a shard that is missing, changed or damaged, or that cannot be read or decompressed.
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
            except (OSError, ValueError, IndexError, KeyError, TypeError) as error:  # the decoder, on arbitrary bytes
                raise self._shards[shard].damaged(f"sample {index} of this file cannot be read ({error})") from None
            rows.append(tokens)
        return np.stack(rows)

    def _opened(self, number: int) -> "_OpenShard":
        opened = self._open.pop(number, None)  # reinserted last: the dict is in order of use
        if opened is None:
            while len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            opened = self._open_checked(self._shards[number], self._verify and number not in self._verified)
            self._verified.add(number)
        self._open[number] = opened
        return opened

    def _open_checked(self, shard: Shard, hashed: bool) -> "_OpenShard":
        """Verify a shard, decompress it if needed, and open it. Raises UserError."""
        raw = shard.entry["raw_data"]
        if not shard.entry["zip_data"]:
            try:
                return _OpenShard(shard, _open_verified(shard.folder / raw["basename"], raw, hashed))
            except _DamagedFile as problem:
                raise shard.damaged(str(problem)) from None
        if raw["bytes"] > _max_bytes(shard, self._window):
            raise shard.damaged(f"index.json says {raw['bytes']} bytes, more than its samples can fill")
        cache = self._cache or make_private_folder(default_shard_cache(), "set data.cache to a folder of yours")
        decompressed = cache / shard.fingerprint[:16] / shard.folder.name / raw["basename"]
        with contextlib.suppress(_DamagedFile):  # missing, or damaged after a power cut: decompress it (again)
            return _OpenShard(shard, _open_verified(decompressed, raw, hashed))
        _decompress(shard, decompressed, self._verify)
        try:
            return _OpenShard(shard, _open_verified(decompressed, raw, hashed))
        except _DamagedFile as problem:
            raise shard.damaged(f"decompressed to {decompressed}: {problem}") from None


def _max_bytes(shard: Shard, window: int) -> int:
    """The most bytes that a shard of this many samples can have: 8 per token, and a header; offsets are uint32."""
    return min(1 << 32, (1 << 16) + shard.entry["samples"] * (4 + 8 * window))


class _OpenShard:
    """An open shard file. It is read without a file position, so forked processes may share it."""

    def __init__(self, shard: Shard, file: int):
        self._file = file
        try:
            self._reader = import_reader().from_json(str(shard.folder.parent), shard.folder.name, shard.entry)
            self._reader.validate(allow_unsafe_types=False)  # loading a pickled column would run its author's code
        except (ValueError, KeyError, TypeError) as error:
            raise shard.damaged(f"index.json describes a shard that cannot be read ({error})") from None

    def __del__(self) -> None:
        os.close(self._file)

    def tokens(self, index: int) -> np.ndarray:
        """As `MDSReader.get_item`, without opening the file for each sample."""
        begin, end = np.frombuffer(os.pread(self._file, 8, 4 + 4 * index), "<u4").tolist()
        return self._reader.decode_sample(os.pread(self._file, end - begin, begin))["tokens"]


def import_reader() -> Any:
    """Streaming's MDSReader class. Thread-safe."""
    with _import_lock:
        return _reader()


@functools.cache
def _reader() -> Any:
    """MDSReader, imported without running the `__init__.py` of its parent packages.

    Those import streaming's datasets, and with them Transformers and torchvision: 560 modules, 4,700 opened files and
    1.3 s of CPU on each rank. Empty packages with the same paths replace them during this import only, so a later
    `import streaming` is complete. Raises ModuleNotFoundError if streaming is not installed.
    """
    reader = "streaming.base.format.mds.reader"
    spec = importlib.util.find_spec("streaming")
    if "streaming" in sys.modules or spec is None or spec.origin is None:
        return importlib.import_module(reader).MDSReader
    for name in _PARENT_PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    try:
        return importlib.import_module(reader).MDSReader
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "streaming"]:
            del sys.modules[name]


_import_lock = threading.Lock()
_PARENT_PACKAGES = (
    "streaming",
    "streaming.base",
    "streaming.base.format",
    "streaming.base.format.base",
    "streaming.base.format.mds",
)


class _DamagedFile(Exception):
    """A file is missing, cannot be read, or differs from its entry in index.json."""


def _open_verified(path: Path, expected: dict[str, Any], hashed: bool) -> int:
    """Open `path` after checking its size and, if `hashed`, its hash. Returns a descriptor; raises _DamagedFile."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _DamagedFile(f"cannot be opened ({error.strerror})") from None
    try:
        if (size := os.fstat(file).st_size) != expected["bytes"]:
            raise _DamagedFile(f"has {size} bytes, but index.json says {expected['bytes']}")
        if hashed:
            _check_hash(_chunks(file), expected["hashes"])
        return file
    except OSError as error:
        os.close(file)
        raise _DamagedFile(f"cannot be read ({error.strerror})") from None
    except BaseException:
        os.close(file)
        raise


def _chunks(file: int) -> Iterator[bytes]:
    offset = 0
    while chunk := os.pread(file, CHUNK_BYTES, offset):
        yield chunk
        offset += len(chunk)


def _check_hash(chunks: Iterable[bytes], hashes: dict[str, str]) -> None:
    """Raise _DamagedFile if the chunks' hash is not the one in index.json: xxh64, or else the slower sha1."""
    import xxhash

    kinds = {"xxh64": xxhash.xxh64, "sha1": hashlib.sha1}
    kind = next((kind for kind in kinds if kind in hashes), None)
    if kind is None:
        raise _DamagedFile("index.json has neither its xxh64 nor its sha1; set data.verify=false to read it anyway")
    digest = kinds[kind]()
    for chunk in chunks:
        digest.update(chunk)
    if digest.hexdigest() != hashes[kind]:
        raise _DamagedFile(f"its {kind} is {digest.hexdigest()}, but index.json says {hashes[kind]}")


def _decompress(shard: Shard, target: Path, verify: bool) -> None:
    """Decompress the shard to `target`; UserError if that fails, or if the compressed file is damaged.

    At most the size in index.json is written: a few kB may decompress to many GB.
    """
    compressed, size = shard.folder / shard.stored["basename"], shard.entry["raw_data"]["bytes"]
    unfinished = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                for chunk in _decompressed_chunks(shard, compressed, size, verify):
                    file.write(chunk)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{shard.name} cannot be decompressed to {target} ({error.strerror}); "
            f"set data.cache to a folder with space for the decompressed shards ({size / 1e6:.1f} MB for this one)",
            str(shard.folder.parent),
        ) from None


def _decompressed_chunks(shard: Shard, compressed: Path, size: int, verify: bool) -> Iterator[bytes]:
    """The raw file, `size` bytes in all. UserError if the compressed file is damaged, or has more or less content."""
    codec = CODECS.get(str(shard.entry["compression"]).partition(":")[0])
    if codec is None:
        raise shard.damaged(f"compression={shard.entry['compression']} in index.json is unknown")
    done = 0
    try:
        os.close(_open_verified(compressed, shard.stored, verify))
        if codec == "snappy":  # has no streaming decoder; it checks the size in the file's header first
            chunks: Iterable[bytes] = [pa.Codec(codec).decompress(compressed.read_bytes(), size, asbytes=True)]
        else:
            chunks = decompress(lambda: open(compressed, "rb"), codec, size)  # noqa: SIM115
        for chunk in chunks:
            done += len(chunk)
            yield chunk
    except _DamagedFile as problem:
        raise shard.damaged(str(problem)) from None
    except TooLarge:
        raise shard.damaged(f"it decompresses to more than the {size} bytes that index.json says") from None
    except (OSError, pa.ArrowException) as error:
        raise shard.damaged(f"cannot be decompressed ({type(error).__name__}: {error})") from None
    if done != size:
        raise shard.damaged(f"it decompresses to {done} bytes, but index.json says {size}")
