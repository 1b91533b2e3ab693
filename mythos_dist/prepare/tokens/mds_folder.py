"""Folders of MDS shards as MosaicML's MDSWriter writes them: a unit is a shard, a row a sample.

LLM-Foundry's convert_dataset_hf.py and convert_text_to_mds.py write a column `tokens`, `ndarray:int32` or (in earlier
versions) `bytes` of int64. Its samples are windows of one stream: documents are joined with EOS and cut anywhere.
Several processes write several streams, into subfolders that index.json lists one after the other.

Samples are decoded by streaming's own reader. Columns that need pickle are refused: they would run their author's code.
"""

import hashlib
import mmap
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash

from mythos_dist.data.corpora import read_index
from mythos_dist.data.decompress import decompress
from mythos_dist.data.shard import CODECS, Shard
from mythos_dist.data.windows import import_reader
from mythos_dist.errors import UserError
from mythos_dist.prepare.inputs import Source
from mythos_dist.prepare.spans import Chunks
from mythos_dist.prepare.tokens.rows import BLOCK_TOKENS, RowBlock, blocks_of

USUAL_COLUMNS = ("tokens", "input_ids")
BYTES_DTYPES = ("int64", "int32", "uint32", "uint16")
MAX_BYTES = 1 << 32  # of an uncompressed shard: its offsets are uint32
HASHES = {"xxh64": xxhash.xxh64, "sha1": hashlib.sha1}  # the fastest first


class MdsRows:
    """The samples of a folder with index.json; `source.path` is the folder."""

    def __init__(self, source: Source, column: str | None, bytes_dtype: str):
        self.source, self._column, self._bytes_dtype = source, column, np.dtype(bytes_dtype).newbyteorder("<")
        folder = Path(source.path)
        self._shards = read_index(folder.parent, folder.name, "")
        self._folders = [PurePosixPath(shard.stored["basename"]).parent for shard in self._shards]
        self._first_rows = list(accumulate((shard.entry["samples"] for shard in self._shards), initial=0))
        self.num_units = len(self._shards)

    def check(self) -> None:
        """All files must be there, with their sizes, and have a column of token ids."""
        problems = []
        for shard in self._shards:
            name, size = shard.stored["basename"], shard.stored["bytes"]
            file = shard.folder / name
            if not file.is_file():
                problems.append(f"{name} is missing; copy it again")
            elif (actual := file.stat().st_size) != size:
                problems.append(f"{name} has {actual:,} bytes, but index.json says {size:,}; copy it again")
            else:
                try:
                    self._reader(shard)
                except UserError as error:
                    problems += error.problems
        if len(problems) > 5:
            problems[5:] = [f"and {len(problems) - 5:,} more"]
        if problems:
            raise UserError(problems, self.source.path)

    def files(self) -> list[str]:
        return [str(shard.folder / shard.stored["basename"]) for shard in self._shards]

    def chunks(self) -> Chunks:
        sizes = [shard.entry["raw_data"]["bytes"] for shard in self._shards]
        return Chunks(self.source, np.arange(self.num_units + 1), np.array(sizes, np.int64))

    def blocks(self, first: int, last: int) -> Iterator[RowBlock]:
        for unit in range(first, last):
            ends_stream = unit + 1 < self.num_units and self._folders[unit] != self._folders[unit + 1]
            samples, size, row = [np.empty(0, np.int64)], 0, self._first_rows[unit]
            for sample in self._samples(unit):
                if size and size + len(sample) > BLOCK_TOKENS:
                    yield from blocks_of(*_join(samples), row)
                    row, samples, size = row + len(samples) - 1, [samples[0]], 0
                samples.append(sample)
                size += len(sample)
            yield from blocks_of(*_join(samples), row, ends_stream)

    def starts_row(self, unit: int) -> bool:
        return True

    def token_before(self, unit: int) -> int | None:
        for before in range(unit - 1, -1, -1):
            if unit < self.num_units and self._folders[before] != self._folders[unit]:
                return None  # another stream
            for sample in self._samples(before, from_end=True):
                if len(sample):
                    return int(sample[-1])
        return None

    def _reader(self, shard: Shard) -> tuple[object, str]:
        """Streaming's reader of a shard, and the column of token ids. Raises UserError."""
        name = shard.stored["basename"]
        try:
            reader = import_reader().from_json(str(shard.folder.parent), shard.folder.name, shard.entry)
            reader.validate(allow_unsafe_types=False)
            encodings = dict(zip(reader.column_names, reader.column_encodings, strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name} cannot be read ({error})", self.source.path) from None
        names = (self._column,) if self._column else USUAL_COLUMNS
        column = next((one for one in names if one in encodings), None)
        if column is None:
            raise UserError(
                f"{name} has no column {' or '.join(names)}; its columns are {', '.join(encodings)}; name the "
                "column of token ids with --column, or convert the text with `mythos shards`",
                self.source.path,
            )
        if encodings[column].split(":")[0] not in ("bytes", "ndarray"):
            raise UserError(f"{name}: column {column!r} holds {encodings[column]}, not token ids", self.source.path)
        return reader, column

    def _samples(self, unit: int, from_end: bool = False) -> Iterator[np.ndarray]:
        """The token ids of the samples of a shard, in order; or, unverified, from the last to the first."""
        shard = self._shards[unit]
        (reader, column), content = self._reader(shard), self._content(shard, verify=not from_end)
        samples, name = shard.entry["samples"], shard.stored["basename"]
        offsets = np.frombuffer(content[4 : 8 + 4 * samples], "<u4").tolist()
        order = range(samples)
        for index in reversed(order) if from_end else order:
            try:
                sample = reader.decode_sample(content[offsets[index] : offsets[index + 1]])  # type: ignore[attr-defined]
                tokens = self._tokens_of(sample[column])
            except (ValueError, IndexError, KeyError, TypeError) as error:
                raise UserError(f"{name}: sample {index} cannot be read ({error})", self.source.path) from None
            yield tokens

    def _tokens_of(self, value: object) -> np.ndarray:
        """Token ids from the decoded value of a column. Raises ValueError."""
        if isinstance(value, bytes):
            if len(value) % self._bytes_dtype.itemsize:
                raise ValueError(f"{len(value)} bytes are not {self._bytes_dtype.name}; set their dtype: --bytes-dtype")
            return np.frombuffer(value, self._bytes_dtype)
        tokens = np.asarray(value)
        if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
            raise ValueError(f"an array of {tokens.dtype} with {tokens.ndim} dimensions, not a list of token ids")
        return tokens

    def _content(self, shard: Shard, verify: bool) -> "bytes | mmap.mmap":
        """A shard, uncompressed and verified by its hash, if it has one."""
        raw, stored = shard.entry["raw_data"], shard.stored
        file = shard.folder / stored["basename"]
        with open(file, "rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        kind = next((kind for kind in HASHES if kind in stored["hashes"]), None)
        if verify and kind and HASHES[kind](content).hexdigest() != stored["hashes"][kind]:
            raise UserError(f"is damaged: its {kind} is not the one in index.json; copy it again", str(file))
        if stored is raw:
            return content
        codec = CODECS.get(str(shard.entry["compression"]).partition(":")[0])
        if codec is None or codec == "snappy":
            raise UserError(f"compression {shard.entry['compression']} is not read; decompress the shards", str(file))
        return b"".join(decompress(lambda: open(file, "rb"), codec, min(raw["bytes"], MAX_BYTES)))


def _join(samples: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and row ends of `samples[1:]`; the first is empty."""
    return np.concatenate(samples[1:] or samples), np.cumsum([len(one) for one in samples[1:]], dtype=np.int64)
