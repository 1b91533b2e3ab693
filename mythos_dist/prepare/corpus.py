"""Read the texts of a corpus one by one as strings, and write a small real corpus for tests and the demo."""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq

from mythos_dist.errors import UserError
from mythos_dist.files import replacing, write_atomically
from mythos_dist.prepare.batches import LongDocument, valid_utf8
from mythos_dist.prepare.documents import read_span, unreadable
from mythos_dist.prepare.inputs import MAX_RATIO, Inputs, Source, reading
from mythos_dist.prepare.listing import find_sources, list_inputs
from mythos_dist.prepare.spans import Columns, Span, divide_file
from mythos_dist.progress import Bar


def write_sample_corpus(out: Path) -> Path:
    """Write CPython's own help texts (`pydoc_data.topics`, 0.5 MB of prose) to the parquet file `out`, a row each.

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
    with replacing(out) as stream:
        pq.write_table(table, stream, row_group_size=16)
    return out


def write_sample_chats(out: Path) -> Path:
    """Write conversations about the same texts to the file of JSON lines `out`: asked for a paragraph, the assistant
    says it. Returns `out`."""
    lines = []
    for name in sorted(topics):
        blocks = topics[name].replace("\r\n", "\n").split("\n\n")
        prose = [" ".join(block.split()) for block in blocks if block[:1].isalpha() and "***" not in block]
        for number, text in enumerate(prose, 1):
            lines.append(json.dumps({"prompt": f"Say paragraph {number} of the help on {name}.", "completion": text}))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "\n".join(lines) + "\n")
    return out


def read_documents(inputs: Inputs) -> Iterator[str]:
    """The non-empty texts of all inputs, file after file. Raises UserError naming a file that cannot be read."""
    columns = Columns()
    for source in find_sources(inputs):
        chunks = divide_file(source, columns)
        yield from _texts([chunks.span(0, len(chunks.sizes))], columns)


def sample_documents(
    inputs: Inputs,
    max_bytes: int,
    seed: int = 0,
    progress: bool = False,
    columns: Columns | None = None,
    max_unpack_ratio: float = MAX_RATIO,
) -> Iterator[str]:
    """About `max_bytes` of text from all inputs: chunks in a random order drawn from `seed`. A smaller corpus is read
    completely. Raises UserError that names a file that cannot be read.

    `progress`: print on standard error which files are read and which are not, and a bar on a terminal.
    """
    columns = columns or Columns()
    listing = list_inputs(inputs, None, max_unpack_ratio)
    if listing.unreadable:
        raise UserError(listing.unreadable_problems())
    if progress:
        for line in listing.lines():
            print(line, file=sys.stderr, flush=True)
    spans = []
    for source in listing.sources:
        chunks = divide_file(source, columns)
        spans += [chunks.span(i, i + 1) for i in range(len(chunks.sizes))]
    random.Random(seed).shuffle(spans)
    total = min(max_bytes, sum(span.size for span in spans))
    size = 0
    with Bar("reading text", total, quiet=not progress) as shown:
        for text in _texts(spans, columns):
            if size >= max_bytes:
                return
            yield text
            size += len(text)
            shown.update(len(text))


def _texts(spans: Iterable[Span], columns: Columns) -> Iterator[str]:
    for span in spans:

        def on_bad(where: str, reason: str, source: Source = span.source) -> None:
            raise unreadable(source, where, reason, "fetch the file again")

        with reading(span.source):
            for item in read_span(span, columns, on_bad):
                if isinstance(item, LongDocument):
                    yield "".join(piece.tobytes().decode() for piece, _ in valid_utf8(item.pieces()))
                    continue
                data, start = item.data.tobytes(), 0
                for end in item.ends.tolist():
                    if end > start:
                        yield data[start:end].decode()
                    start = end
