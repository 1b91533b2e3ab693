"""Open parquet files, check their columns, and read them as plain texts and scores, whatever their encoding."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mythos_dist.files import is_utf8
from mythos_dist.prepare.inputs import Source, open_bytes
from mythos_dist.prepare.lines import parse_score

# Writers stop using a dictionary of more than 1 MB, so rows of larger row groups with longer texts share no texts.
SMALL_BYTES = 4 << 20  # of a row group's texts
SHORT_BYTES = 256  # of a text, on average


def open_parquet(source: Source, text: str | None = None, groups: Iterable[int] = ()) -> pq.ParquetFile:
    """Open a file. Pages are read when they are needed: a row group may be as large as its file.

    `text`: the column of `groups` that will be read. Raises ArrowInvalid or OSError if the file is not parquet, or
    truncated.
    """
    file: Any = open_bytes(source) if source.remote or not is_utf8(source.path) else source.path
    options: Any = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
    parquet = pq.ParquetFile(file, memory_map=False, **options)
    footer = parquet.metadata
    if text is None or not any(_shares_texts(footer.row_group(group), text) for group in groups):
        return parquet
    return pq.ParquetFile(file, memory_map=False, metadata=footer, read_dictionary=[text], **options)


def _shares_texts(group: Any, name: str) -> bool:
    """Whether many rows may refer to the same text, so that a few kB expand to many GB. The column is then read as a
    dictionary, which `plain_texts` expands in pieces."""
    column = next(column for i in range(group.num_columns) if (column := group.column(i)).path_in_schema == name)
    size = column.total_uncompressed_size
    return column.has_dictionary_page and (size < SMALL_BYTES or size < SHORT_BYTES * group.num_rows)


def schema_problem(schema: pa.Schema, text: str, score: str | None) -> str | None:
    """Why these columns cannot be read; None if they can."""
    for name, what, fits in [(text, "strings", _is_text), (score, "numbers", _is_number)]:
        if name is None:
            continue
        if name not in schema.names:
            return f"no column {name!r}; the columns are {', '.join(schema.names)}"
        if (count := schema.names.count(name)) > 1:
            return f"{count} columns are called {name!r}; write the file again with unique names"
        if not fits(kind := schema.field(name).type):
            return f"column {name!r} holds {kind!s:.200}, not {what}"
    return None


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    others = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
    return _is_string(kind) or any(is_kind(kind) for is_kind in others)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    others = (pa.types.is_decimal, pa.types.is_boolean, pa.types.is_null, _is_string)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or any(is_kind(kind) for is_kind in others)


def plain_texts(column: Any, batch_bytes: int) -> Iterator[tuple[int, pa.LargeBinaryArray]]:
    """(row of the first, texts without nulls), in pieces of about `batch_bytes`: with a dictionary, a batch may be much
    larger than its file."""
    edges = [0, len(column)]
    if pa.types.is_dictionary(column.type):
        lengths = (
            pc.call_function("binary_length", [column.dictionary.cast(pa.large_binary())])
            .take(column.indices)
            .fill_null(0)
        )
        ends = np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
        edges = [0]
        while edges[-1] < len(column):
            done = ends[edges[-1] - 1] if edges[-1] else 0
            edges.append(max(edges[-1] + 1, int(np.searchsorted(ends, done + batch_bytes, "right"))))
    for first, last in pairwise(edges):
        texts = column.slice(first, last - first).cast(pa.large_binary())
        yield first, texts.fill_null(b"") if texts.null_count else texts  # it copies


def parse_scores(column: Any) -> tuple[np.ndarray, dict[int, str]]:
    """Scores as float64 (n,), NaN where there is none, and row -> problem for values that are not numbers."""
    try:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        numbers = column
        if _is_string(column.type):
            trimmed = pc.call_function("utf8_trim_whitespace", [column.cast(pa.large_string())])
            numbers = pc.call_function("if_else", [pc.call_function("equal", [trimmed, ""]), None, trimmed])
        numbers = numbers.cast(pa.float64(), safe=False).fill_null(float("nan"))
        return numbers.to_numpy(zero_copy_only=False), {}
    except pa.ArrowInvalid:
        pass
    numbers, invalid = np.full(len(column), np.nan), {}
    for i, value in enumerate(column.to_pylist()):
        try:
            numbers[i] = parse_score(value)
        except ValueError as error:
            invalid[i] = str(error)
    return numbers, invalid
