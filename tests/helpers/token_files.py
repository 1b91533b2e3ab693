"""Token files as other trainers write them, by their published layouts; and their documents, by a plain loop."""

import json
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

EOS = 2
MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
STRUCT_LETTERS = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "float32": "f", "uint16": "H"}
Rows = Sequence[Sequence[int]]


def write_megatron(prefix: Path, rows: Rows, dtype: str = "int32", sequences: int = 1) -> Path:
    """PREFIX.bin and PREFIX.idx (megatron/core/datasets/indexed_dataset.py); each row is a document of `sequences`."""
    lengths, edges, size = [], [0], struct.calcsize(f"<{STRUCT_LETTERS[dtype]}")
    with open(f"{prefix}.bin", "wb") as file:
        for row in rows:
            file.write(struct.pack(f"<{len(row)}{STRUCT_LETTERS[dtype]}", *row))
            cuts = [len(row) * i // sequences for i in range(sequences + 1)]
            lengths += [b - a for a, b in pairwise(cuts)]
            edges.append(len(lengths))
    pointers = list(accumulate((size * length for length in lengths), initial=0))[:-1]
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(lengths), len(edges)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))
        file.write(struct.pack(f"<{len(pointers)}q", *pointers))
        file.write(struct.pack(f"<{len(edges)}q", *edges))
    return prefix


def write_nanoset(path: Path, rows: Rows, size: int = 2, metadata: bool = True) -> Path:
    """NAME.ds, .index and .metadata (datatrove/pipeline/tokens/tokenizer.py)."""
    with open(path, "wb") as file:
        for row in rows:
            file.write(struct.pack(f"<{len(row)}{'H' if size == 2 else 'I'}", *row))
    ends = list(accumulate(map(len, rows)))
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        Path(f"{path}.metadata").write_text(f"a/tokenizer|{size}\n{sum(map(len, rows))}\n1 T")
    return path


def write_saved_dataset(folder: Path, rows: Rows, column: str = "input_ids", shards: int = 1, **columns) -> Path:
    """Hugging Face's own Dataset.save_to_disk."""
    from datasets import Dataset

    Dataset.from_dict({column: list(map(list, rows)), **columns}).save_to_disk(str(folder), num_shards=shards)
    return folder


def write_mds(
    folder: Path, rows: Rows, encoding: str = "bytes", dtype: str = "int64", subfolders: Sequence[int] = (), **options
) -> Path:
    """MosaicML's own MDSWriter, with LLM-Foundry's column `tokens`. `subfolders`: the number of rows of each; as of
    convert_text_to_mds.py with several processes, whose index.json lists all."""
    from streaming import MDSWriter

    groups = list(subfolders) or [len(rows)]
    entries: list[dict] = []
    for number, (first, count) in enumerate(zip(accumulate(groups, initial=0), groups, strict=False)):
        out = folder / str(number) if subfolders else folder
        writer = MDSWriter(out=str(out), columns={"tokens": encoding}, **options)
        for row in rows[first : first + count]:
            values = np.array(row, dtype)
            writer.write({"tokens": values.tobytes() if encoding == "bytes" else values})
        writer.finish()
        if subfolders:
            for entry in json.loads((out / "index.json").read_text())["shards"]:
                for data in filter(None, (entry["raw_data"], entry["zip_data"])):
                    data["basename"] = f"{number}/{data['basename']}"
                entries.append(entry)
            (out / "index.json").unlink()
    if subfolders:
        (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def documents_of(rows: Iterable[Sequence[int]], by_rows: bool) -> list[tuple[list[int], bool]]:
    """(tokens, whether EOS ended it) of each document of a stream of rows, empty ones included."""
    documents: list[tuple[list[int], bool]] = []
    current: list[int] = []
    for row in rows:
        for token in row:
            if token == EOS:
                documents.append((current, True))
                current = []
            else:
                current.append(token)
        if by_rows and (current or not row):
            documents.append((current, False))
            current = []
    if current:
        documents.append((current, False))
    return documents


def windows_of(documents: Iterable[Sequence[int]], seq_len: int) -> tuple[list[list[int]], list[int]]:
    """The windows of documents that are joined with EOS, and the tokens that do not fill one."""
    stream = [token for document in documents for token in [*document, EOS]]
    size = seq_len + 1
    full = len(stream) // size * size
    return [stream[i : i + size] for i in range(0, full, size)], stream[full:]
