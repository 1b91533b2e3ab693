"""Texts of a corpus one by one, for those that need strings, and a small real corpus to try everything on."""

import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mythos_dist.errors import UserError
from mythos_dist.prepare.documents import (
    Columns,
    LongDocument,
    Span,
    Units,
    read_span,
    units_of,
    unreadable,
    valid_utf8,
)
from mythos_dist.prepare.inputs import MAX_RATIO, Inputs, Source, find_sources, list_inputs, reading


def write_sample_corpus(out: Path) -> Path:
    """Write CPython's own help texts (`pydoc_data.topics`, 0.5 MB of prose) to the parquet file `out`, a row a topic.

    The schema is FineWeb-Edu's; `token_count` counts words, and the scores are constants. Returns `out`.
    """
    texts = {name: topics[name].replace("\r\n", "\n") for name in sorted(topics)}
    count = len(texts)
    table = pa.table(
        {
            "text": pa.array(texts.values(), pa.string()),
            "id": pa.array([f"pydoc-topic:{name}" for name in texts], pa.string()),
            "dump": pa.array(["pydoc_data.topics"] * count, pa.string()),
            "url": pa.array(["https://docs.python.org/3/"] * count, pa.string()),
            "file_path": pa.array(["pydoc_data/topics.py"] * count, pa.string()),
            "language": pa.array(["en"] * count, pa.string()),
            "language_score": pa.array([1.0] * count, pa.float64()),
            "token_count": pa.array([len(text.split()) for text in texts.values()], pa.int64()),
            "score": pa.array([4.0] * count, pa.float64()),
            "int_score": pa.array([4] * count, pa.int64()),
        }
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    pq.write_table(table, unfinished, row_group_size=16)
    os.replace(unfinished, out)
    return out


def read_documents(inputs: Inputs) -> Iterator[str]:
    """The non-empty texts of all inputs, file after file. Raises UserError naming a file that cannot be read."""
    columns = Columns()
    for source in find_sources(inputs):
        yield from _texts([_whole(units_of(source, columns))], columns)


def sample_documents(
    inputs: Inputs,
    max_bytes: int,
    seed: int = 0,
    progress: bool = False,
    columns: Columns | None = None,
    max_unpack_ratio: float = MAX_RATIO,
) -> Iterator[str]:
    """Texts of about `max_bytes` from all over the inputs: spans in an order drawn from `seed`. A corpus that is
    smaller is read whole. Raises UserError naming a file that cannot be read.

    `progress`: on standard error, what was taken and what was not, and a bar on a terminal.
    """
    columns, listing = columns or Columns(), list_inputs(inputs, None, max_unpack_ratio)
    if listing.unreadable:
        raise UserError([f"{one.name}: {one.reason} ({one.detail})" for one in listing.unreadable])
    for line in listing.lines() if progress else []:
        print(line, file=sys.stderr, flush=True)
    units = [units_of(source, columns) for source in listing.sources]
    spans = [one.span(i, i + 1) for one in units for i in range(len(one.sizes))]
    random.Random(seed).shuffle(spans)
    total = min(max_bytes, sum(span.size for span in spans))
    size = 0
    with tqdm(
        total=total, desc="reading text", unit="B", unit_scale=True, disable=not (progress and sys.stderr.isatty())
    ) as bar:
        for text in _texts(spans, columns):
            if size >= max_bytes:
                return
            yield text
            size += len(text)
            bar.update(len(text))


def _whole(units: Units) -> Span:
    return units.span(0, len(units.sizes))


def _texts(spans: Iterable[Span], columns: Columns) -> Iterator[str]:
    for span in spans:

        def bad(where: str, reason: str, source: Source = span.source) -> None:
            raise unreadable(source, where, reason, "fetch the file again")

        with reading(span.source):
            for documents in read_span(span, columns, bad):
                if isinstance(documents, LongDocument):
                    yield "".join(piece.tobytes().decode() for piece, _ in valid_utf8(documents.pieces()))
                    continue
                data, start = documents.data.tobytes(), 0
                for end in documents.ends.tolist():
                    if end > start:
                        yield data[start:end].decode()
                    start = end
