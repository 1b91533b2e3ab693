"""Data sets that Hugging Face's `datasets` wrote with Dataset.save_to_disk: a unit is an Arrow record batch.

    FOLDER/state.json                    lists the Arrow files
    FOLDER/data-00000-of-00002.arrow     Arrow's IPC stream format

The files are mapped, and only the column of token ids is read. `datasets` itself would do the same after an import of
seconds in each worker, and nothing else here needs it.
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mythos_dist.data.manifest import read_json
from mythos_dist.errors import UserError
from mythos_dist.files import is_utf8
from mythos_dist.prepare.inputs import Source
from mythos_dist.prepare.spans import Chunks
from mythos_dist.prepare.tokens.rows import RowBlock, blocks_of

USUAL_COLUMNS = ("input_ids", "tokens")
MASK = "attention_mask"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class SavedDatasetRows:
    """The rows of a saved data set; `source.path` is its folder."""

    def __init__(self, source: Source, column: str | None):
        self.source = source
        self._files = [str(Path(source.path, name)) for name in data_files(source.path)]
        self._column = ""
        rows, units = [], []
        self._sizes: list[int] = []  # bytes of tokens of each unit
        for file in self._files:
            batches = list(_batches(file))
            for batch in batches:
                self._column = _column_of(batch.schema, column, file)
                self._sizes.append(_num_tokens(batch, self._column) * _itemsize(batch, self._column))
            rows += [batch.num_rows for batch in batches]
            units.append(len(batches))
        self._first_rows = list(accumulate(rows, initial=0))  # of each unit
        self._first_units = list(accumulate(units, initial=0))  # of each file
        self.num_units = self._first_units[-1]

    def check(self) -> None:
        """No row may be null or padded: padding would be in the loss."""
        for unit, batch in self._read(0, self.num_units):
            rows = f"rows {self._first_rows[unit]:,} to {self._first_rows[unit + 1] - 1:,}"
            if batch.column(self._column).null_count + batch.column(self._column).values.null_count:
                raise UserError(f"{rows}: a row, or a token of one, is null; remove it", self.source.path)
            if MASK in batch.schema.names and not _values(batch, MASK).all():
                raise UserError(
                    f"{rows}: a row is padded (its {MASK} has a 0), and padding would be in the loss; remove the "
                    f"padding, and the column {MASK}",
                    self.source.path,
                )

    def files(self) -> list[str]:
        return self._files

    def chunks(self) -> Chunks:
        return Chunks(self.source, np.arange(self.num_units + 1), np.array(self._sizes, np.int64))

    def blocks(self, first: int, last: int) -> Iterator[RowBlock]:
        for unit, batch in self._read(first, last):
            offsets = _lists(batch, self._column).offsets.to_numpy()
            yield from blocks_of(_values(batch, self._column), offsets[1:] - offsets[0], self._first_rows[unit])

    def starts_row(self, unit: int) -> bool:
        return True

    def token_before(self, unit: int) -> int | None:
        for before in range(unit - 1, -1, -1):
            ((_, batch),) = self._read(before, before + 1)
            if len(tokens := _values(batch, self._column)):
                return int(tokens[-1])
        return None

    def _read(self, first: int, last: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Units and their record batches. A stream has no index, but of a skipped batch only the header is read."""
        for index in range(bisect_right(self._first_units, first) - 1, len(self._files)):
            for unit, batch in enumerate(_batches(self._files[index]), self._first_units[index]):
                if unit >= last:
                    return
                if unit >= first:
                    yield unit, batch


def data_files(folder: str) -> list[str]:
    """The names of the Arrow files of a saved data set. Raises UserError."""
    state = Path(folder, "state.json")
    try:
        names = [one["filename"] for one in read_json(state.read_bytes())["_data_files"]]
        if not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError(f"{names!r:.80} are not file names")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"does not list the files of a saved data set ({error}); save it again", str(state)) from None
    if missing := [name for name in names if not Path(folder, name).is_file()]:
        raise UserError(f"{', '.join(missing[:3])} is missing; copy the folder again", folder)
    return names


def _batches(file: str) -> Iterator[pa.RecordBatch]:
    """The record batches of a file, mapped. Raises UserError if it is not complete."""
    try:
        with open(file, "rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - len(END_OF_STREAM)))
            if stream.read() != END_OF_STREAM:  # Arrow does not miss it if the file was cut between two batches
                raise UserError("is truncated: it does not end with Arrow's end of stream; copy it again", file)
        yield from pa.ipc.open_stream(_mapped(file))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"is not an Arrow stream, or damaged ({error}); copy it again", file) from None


def _mapped(file: str) -> Any:
    if is_utf8(file):
        return pa.memory_map(file)
    with open(file, "rb") as stream:
        return pa.BufferReader(pa.py_buffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))


def _column_of(schema: pa.Schema, wanted: str | None, file: str) -> str:
    """The name of the column of token ids. Raises UserError."""
    names = (wanted,) if wanted else USUAL_COLUMNS
    name = next((name for name in names if name in schema.names), None)
    if name is None:
        hint = "name the column of token ids with --column"
        if "text" in schema.names:
            hint += ", or write the texts with Dataset.to_parquet and convert them with `mythos shards`"
        raise UserError(f"no column {' or '.join(names)}; the columns are {', '.join(schema.names)}; {hint}", file)
    kind = schema.field(name).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise UserError(f"column {name!r} holds {kind!s:.100}, not lists of token ids", file)
    return name


def _lists(batch: pa.RecordBatch, column: str) -> pa.LargeListArray:
    """A column of lists, whatever their kind, checked: offsets of a damaged file may point anywhere."""
    lists = batch.column(column)
    lists.validate(full=True)
    return lists.cast(pa.large_list(lists.type.value_type))


def _num_tokens(batch: pa.RecordBatch, column: str) -> int:
    offsets = _lists(batch, column).offsets
    return offsets[-1].as_py() - offsets[0].as_py()


def _itemsize(batch: pa.RecordBatch, column: str) -> int:
    return batch.column(column).type.value_type.bit_width // 8


def _values(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """The values of all rows of a column of lists, concatenated, without a copy (but of bits). No value may be null."""
    lists = _lists(batch, column)
    values = lists.values.slice(lists.offsets[0].as_py(), _num_tokens(batch, column))
    return values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))
