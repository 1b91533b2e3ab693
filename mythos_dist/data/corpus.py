"""Documents from parquet files, and a small real corpus to try everything on.

The schema is FineWeb-Edu's; only its column `text` is read. Text is decoded here and not by pyarrow, because one
document with invalid UTF-8 would end the conversion: bad bytes become U+FFFD.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq

from mythos_dist.errors import UserError

READ_ROWS = 1024  # documents held in memory at a time, about 5 MB of web text


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
    unfinished = out.with_name(out.name + ".tmp")
    pq.write_table(table, unfinished, row_group_size=16)
    os.replace(unfinished, out)
    return out


def parquet_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that a file, a folder of *.parquet, a glob, or several of these stand for; each once.

    A folder's and a glob's files are sorted by name. Raises UserError if there are none, naming `path`.
    """
    if not isinstance(path, (str, Path)):
        return list(dict.fromkeys(file for one in path for file in parquet_files(one)))
    if Path(path).is_dir():
        files = sorted(Path(path).glob("*.parquet"))
        problem = "the folder holds no *.parquet file"
    elif Path(path).exists():
        return [Path(path)]
    else:
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
        problem = "no such file or folder, and as a pattern it matches nothing"
    if not files:
        raise UserError(f"{problem}; give a parquet file, a folder of them, or a pattern", str(path))
    return files


def read_documents(path: str | Path | Sequence[str | Path]) -> Iterator[str]:
    """The non-empty texts of every row, file after file, a few row groups in memory.

    Raises UserError naming the file if it is not parquet, is cut short, or has no column `text` of strings.
    """
    for file in parquet_files(path):
        parquet = _open_parquet(file)
        try:
            for batch in parquet.iter_batches(batch_size=READ_ROWS, columns=["text"]):
                for text in batch.column(0).cast(pa.large_binary()).to_pylist():
                    if text:
                        yield text.decode("utf-8", "replace")
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"cannot be read to its end ({error}); fetch the file again", str(file)) from None
        finally:
            parquet.close()


def count_rows(files: Sequence[Path]) -> int:
    """Rows of all files, from their footers. Raises UserError on a file that `read_documents` would refuse to open."""
    total = 0
    for file in files:
        with _open_parquet(file) as parquet:
            total += parquet.metadata.num_rows
    return total


def _open_parquet(file: Path) -> pq.ParquetFile:
    """Raises UserError if `file` is not parquet or has no column `text` of strings, naming the columns it has."""
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"not a parquet file, or cut short ({error})", str(file)) from None
    schema = parquet.schema_arrow
    if "text" not in schema.names:
        problem = f"no column 'text'; the columns are {', '.join(schema.names)}"
    elif not _is_text(schema.field("text").type):
        problem = f"column 'text' holds {schema.field('text').type}, not strings"
    else:
        return parquet
    parquet.close()
    raise UserError(problem, str(file))


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))
