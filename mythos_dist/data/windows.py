"""Reading windows of token ids by index from MDS shard files, which are verified before use.

Shards are decoded by streaming's MDSReader, but not through its StreamingDataset: that shares memory between ranks,
which a kill -9 leaves in /dev/shm, waits for all ranks in its constructor, and hangs or ends silently on a wrong hash.
Here each process checks a shard's size and hash at its first use, and decompresses compressed shards into a cache.
Several processes and nodes may decompress the same shard at once: each writes its own file and renames it. Shards of
stores are downloaded, once per node (shard_cache.py).

Decisions: DATA-4, DATA-14.
"""

import contextlib
import functools
import importlib.util
import os
import re
import secrets
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mythos_dist.data.remote import cache_folder
from mythos_dist.data.shard import DamagedFile, Shard, decompressed_chunks, max_bytes, open_verified, verify_open
from mythos_dist.data.shard_cache import ShardCache
from mythos_dist.errors import UserError

OPEN_FILES = 128  # kept open per stream: reopening per sample would overload a cluster's metadata server


class WindowReader:
    """Reads windows of `window` tokens by their index in the concatenation of `shards`."""

    def __init__(
        self, shards: Sequence[Shard], window: int, verify: bool = True, cache: ShardCache | str | Path | None = None
    ):
        """`verify` False: only sizes are checked, not hashes. `cache`: where compressed shards are decompressed, and
        those of stores are kept; None: below the system's temporary folder."""
        self._shards, self._window, self._verify = shards, window, verify
        self._ends = np.cumsum([shard.entry["samples"] for shard in shards])
        self._cache = cache if isinstance(cache, ShardCache) else Path(cache) if cache else None
        self._verified: set[int] = set()  # shards whose hash was checked
        self._open: dict[int, _OpenShard] = {}
        import_reader()  # once, before loader processes fork

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a spawned process opens its own files

    def read(self, samples: Sequence[int]) -> np.ndarray:
        """The windows with the indices `samples`, unsigned integers of shape (B, window).

        Raises UserError for a shard that is missing, changed or damaged, or that cannot be read, downloaded or
        decompressed.
        """
        shards = self.shards_of(samples)
        rows: dict[int, np.ndarray] = {}
        for at in np.argsort(shards, kind="stable").tolist():  # one shard after the other: see `_opened`
            shard = int(shards[at])
            opened = self._opened(shard)
            index = samples[at] - int(self._ends[shard]) + self._shards[shard].entry["samples"]
            try:
                tokens = opened.tokens(index)
                if tokens.shape != (self._window,) or tokens.dtype.kind != "u":
                    raise ValueError(f"{tokens.dtype} of shape {tokens.shape}, not {self._window} tokens")
            except (OSError, ValueError, IndexError, KeyError, TypeError) as error:  # the decoder, on arbitrary bytes
                raise self._shards[shard].damaged(f"sample {index} of this file cannot be read ({error})") from None
            rows[at] = tokens
        self._close_removable()
        return np.stack([rows[at] for at in range(len(samples))])

    def shards_of(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """The index of the shard of each sample, int64 (n,)."""
        return np.searchsorted(self._ends, samples, side="right")

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards, in the order of the samples."""
        return self._shards

    def _opened(self, number: int) -> "_OpenShard":
        opened = self._open.pop(number, None)  # reinserted last: the dict is in order of use
        if opened is None:
            self._close_removable()  # a cache with a limit removes no open shard: a process has one open at a time
            while len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            opened = self._open_checked(self._shards[number], self._verify and number not in self._verified)
            self._verified.add(number)
        self._open[number] = opened
        return opened

    def _close_removable(self) -> None:
        if isinstance(self._cache, ShardCache) and self._cache.limit is not None:
            self._open = {number: opened for number, opened in self._open.items() if not self._shards[number].url}

    def _open_checked(self, shard: Shard, hashed: bool) -> "_OpenShard":
        """Verify a shard, download and decompress it if needed, and open it. Raises UserError."""
        raw = shard.entry["raw_data"]
        if shard.url:
            return self._open_remote(shard, hashed)
        if not shard.entry["zip_data"]:
            try:
                return _OpenShard(shard, open_verified(shard.folder / raw["basename"], raw, hashed))
            except DamagedFile as problem:
                raise shard.damaged(str(problem)) from None
        if raw["bytes"] > max_bytes(shard, self._window):
            raise shard.damaged(f"index.json says {raw['bytes']} bytes, more than its samples can fill")
        cache = self._cache.root if isinstance(self._cache, ShardCache) else self._cache
        cache = cache or cache_folder(None)
        decompressed = cache / shard.fingerprint[:16] / shard.folder.name / raw["basename"]
        with contextlib.suppress(DamagedFile):  # missing, or damaged after a power cut: decompress it (again)
            return _OpenShard(shard, open_verified(decompressed, raw, hashed))
        _decompress(shard, decompressed, self._verify)
        try:
            return _OpenShard(shard, open_verified(decompressed, raw, hashed))
        except DamagedFile as problem:
            raise shard.damaged(f"decompressed to {decompressed}: {problem}") from None

    def _open_remote(self, shard: Shard, hashed: bool) -> "_OpenShard":
        """Open a shard of a store in the cache; one that is damaged there is downloaded again, once."""
        if not isinstance(self._cache, ShardCache):
            self._cache = ShardCache(cache_folder(self._cache))
        problem = None
        for _ in range(2):
            file = self._cache.open(shard)
            try:
                verify_open(file, shard.entry["raw_data"], hashed)
                return _OpenShard(shard, file)
            except DamagedFile as damage:
                os.close(file)
                self._cache.discard(shard)
                problem = damage
        raise shard.damaged(f"downloaded to {self._cache.path(shard)}: {problem}")


class _OpenShard:
    """An open shard file. It is read without a file position, so forked processes may share it."""

    def __init__(self, shard: Shard, file: int):
        self._file = file
        try:
            self._reader = import_reader().from_json(str(shard.folder.parent), shard.folder.name, shard.entry)
            self._reader.validate(allow_unsafe_types=False)  # loading a pickled column would run its author's code
            self._plain = _plain_dtype(shard.entry)
        except (ValueError, KeyError, TypeError) as error:
            raise shard.damaged(f"index.json describes a shard that cannot be read ({error})") from None

    def __del__(self) -> None:
        os.close(self._file)

    def tokens(self, index: int) -> np.ndarray:
        """As `MDSReader.get_item`, without opening the file for each sample."""
        begin, end = np.frombuffer(os.pread(self._file, 8, 4 + 4 * index), "<u4").tolist()
        sample = os.pread(self._file, end - begin, begin)
        if self._plain:
            return np.frombuffer(sample, self._plain)
        return self._reader.decode_sample(sample)["tokens"]


def _plain_dtype(entry: dict[str, Any]) -> np.dtype | None:
    """The dtype of shards whose samples are tokens and nothing else, as the converter writes them. MDSReader parses
    the encoding again for each sample, which takes most of the time of reading it."""
    match = re.fullmatch(r"\['ndarray:(uint16|uint32):\d+'\]", str(entry["column_encodings"]))
    return np.dtype(match[1]) if match and entry["column_names"] == ["tokens"] else None


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
                for chunk in decompressed_chunks(shard, compressed, size, verify):
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
