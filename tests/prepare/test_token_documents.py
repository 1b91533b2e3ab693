"""Rows of other trainers' token files give the same documents wherever they are divided, against a plain loop."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from helpers.selection import examples
from helpers.token_files import EOS, documents_of, write_mds, write_megatron, write_nanoset, write_saved_dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mythos_dist.data.manifest import TokenRules
from mythos_dist.errors import UserError
from mythos_dist.prepare.spans import Span
from mythos_dist.prepare.tokens import documents as documents_module
from mythos_dist.prepare.tokens import flat, mds_folder, rows
from mythos_dist.prepare.tokens.documents import read_token_documents
from mythos_dist.prepare.tokens.files import open_rows
from mythos_dist.prepare.tokens.listing import list_token_sources

VOCAB_SIZE = 100
ROWS = st.lists(st.lists(st.sampled_from([EOS, EOS, 5, 6, 7, 99]), max_size=9), max_size=12)
EXAMPLES = settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def tiny_blocks(monkeypatch):
    """`tiny_blocks(block, long)`: blocks of `block` tokens; documents of more than `long` tokens are read in pieces."""

    def patch(block: int, long: int) -> None:
        for module in (rows, flat, mds_folder):
            monkeypatch.setattr(module, "BLOCK_TOKENS", block)
        monkeypatch.setattr(flat, "FIRST_BLOCK_TOKENS", 1)
        monkeypatch.setattr(documents_module, "LONG_TOKENS", long)

    return patch


def read(path, edges=(), **rules) -> list[tuple[list[int], bool]]:
    """The documents of all spans between `edges` (units), and of each the whole, whatever pieces it came in."""
    token_rules = TokenRules(**rules)
    (source,) = list_token_sources(path, token_rules).sources
    open_rows.cache_clear()
    units = open_rows(source, token_rules).num_units
    limits = sorted({0, units, *(edge % (units + 1) for edge in edges)})
    found = []
    for first, last in pairwise(limits):
        pieces: list[int] = []
        for item in read_token_documents(Span(source, first, last, 0), token_rules, EOS, VOCAB_SIZE):
            assert len(item.ends) or len(item.tokens)
            if not len(item.ends):
                pieces += item.tokens.tolist()
                continue
            assert item.ends[-1] == len(item.tokens)
            for number, (start, end) in enumerate(pairwise([0, *item.ends])):
                found.append((pieces + item.tokens[start:end].tolist(), bool(item.had_eos[number])))
                pieces = []
        assert not pieces
    return found


@EXAMPLES
@given(ROWS, st.lists(st.integers(0, 200), max_size=6), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_flat_files_divided_anywhere_keep_each_document_once(tmp_path, tiny_blocks, some, edges, block, long, by_rows):
    """A unit is a token: spans begin inside documents, at EOS, at the ends of rows and between empty rows."""
    tiny_blocks(block, long)
    expected = documents_of(some, by_rows)
    documents = "stored" if by_rows else "eos"
    prefix = write_megatron(tmp_path / "a", some, "uint16", sequences=2)
    nanoset = write_nanoset(tmp_path / "a.ds", some, size=4)
    if not any(some):
        expected = []  # rows without a token in the entire file have no unit
    assert read(prefix, edges, documents=documents) == expected
    assert read(nanoset, edges, documents=documents) == expected


@EXAMPLES
@given(ROWS, st.lists(st.integers(0, 20), max_size=4), st.integers(1, 9), st.integers(1, 9), st.booleans())
@example(some=[[]] * 7, edges=[2], block=1, long=1, by_rows=False)  # two batches without tokens before a span
def test_tables_divided_anywhere_keep_each_document_once(tmp_path, tiny_blocks, some, edges, block, long, by_rows):
    """Several record batches in several files, some with rows without tokens only."""
    tiny_blocks(block, long)
    for file in tmp_path.glob("*.arrow"):
        file.unlink()
    names = []
    for number in range(2):  # as Dataset.save_to_disk writes them, with record batches of three rows
        names.append({"filename": f"data-{number:05}.arrow"})
        table = pa.table({"input_ids": pa.array(some[number::2], pa.list_(pa.int32()))})
        with pa.ipc.new_stream(tmp_path / names[-1]["filename"], table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": names}))
    order = [*some[0::2], *some[1::2]]
    assert read(tmp_path, edges, documents="stored" if by_rows else "eos") == documents_of(order, by_rows)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.uint16()), pa.list_(pa.int32(), 3)], ids=["list", "large", "fixed"]
)
def test_every_kind_of_list_is_read(tmp_path, kind):
    some = [[5, 6, 7], [8, 9, EOS], [10, 11, 12]]
    table = pa.table({"input_ids": pa.array(some, kind)})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    assert read(tmp_path) == documents_of(some, True)


def test_the_real_writer_of_datasets_gives_its_rows(tmp_path):
    some = [[5, 6, 7], [], [8, EOS], [9] * 20]
    for number, column in enumerate(("input_ids", "tokens")):
        assert read(write_saved_dataset(tmp_path / str(number), some, column, shards=2)) == documents_of(some, True)


@pytest.mark.parametrize(
    ("encoding", "dtype", "rules"),
    [
        ("bytes", "int64", {}),
        ("bytes", "uint16", {"bytes_dtype": "uint16"}),
        ("ndarray:int32", "int32", {}),
        ("ndarray", "uint16", {}),
        ("ndarray:uint16:8", "uint16", {}),
    ],
)
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_mds_of_each_encoding_is_one_stream(tmp_path, tiny_blocks, encoding, dtype, rules, compression):
    """LLM-Foundry's samples are windows; 300 bytes a shard, so that documents continue across shards and spans."""
    tiny_blocks(7, 11)
    stream = [EOS if i % 13 == 5 else 3 + i % 90 for i in range(8 * 40)]
    some = [stream[i : i + 8] for i in range(0, len(stream), 8)]
    folder = write_mds(
        *(tmp_path / "mds", some, encoding, dtype), compression=compression, hashes=["sha1", "xxh64"], size_limit=400
    )
    expected = documents_of(some, by_rows=False)
    assert len(expected) > 20 and expected == documents_of([stream], by_rows=False)
    assert read(folder, **rules) == expected
    assert read(folder, range(40), **rules) == expected
    assert read(folder, range(40), documents="stored", **rules) == documents_of(some, by_rows=True)


def test_a_document_ends_where_the_stream_of_a_process_ends(tmp_path):
    """The last document of the first process was cut; the next process begins with another."""
    some = [[5, 6], [7, 8], [9, 10], [EOS, 11]]
    folder = write_mds(tmp_path / "mds", some, subfolders=[2, 2])
    assert read(folder) == [([5, 6, 7, 8], False), ([9, 10], True), ([11], False)]
    assert read(folder, [1]) == read(folder)


@pytest.mark.parametrize("value", [100, -1])
def test_an_id_outside_the_vocabulary_is_refused_with_its_position(tmp_path, value):
    some = [[5] * 20 for _ in range(30)]
    some[17][3] = value
    with pytest.raises(UserError, match=rf"a: row 17, token 3 is {value}, but the tokenizer has ids from 0 to 99;"):
        read(write_megatron(tmp_path / "a", some))
    with pytest.raises(UserError, match=rf"row 17, token 3 is {value}, but"):
        read(write_saved_dataset(tmp_path / "saved", some))
    with pytest.raises(UserError, match=rf"row 17, token 3 is {value}, but"):
        read(write_mds(tmp_path / "mds", some, size_limit=900))


def test_positions_count_from_the_begin_of_a_row_across_blocks(tmp_path, tiny_blocks):
    tiny_blocks(4, 1000)
    with pytest.raises(UserError, match="row 1, token 10 is 100, but"):
        read(write_nanoset(tmp_path / "a.ds", [[5, 6], [7] * 10 + [100]]), [9])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_every_dtype_of_megatron_is_read(tmp_path, dtype):
    some = [[5, 6, 7, 99], [98]]
    assert read(write_megatron(tmp_path / "a", some, dtype)) == documents_of(some, True)


def test_memory_does_not_grow_with_a_document(tmp_path, monkeypatch):
    """Of one document of 4 M tokens no item has more than two blocks and what precedes them."""
    np.full(1 << 22, 7, "<u2").tofile(tmp_path / "a.ds")
    np.array([1 << 22], "<u8").tofile(tmp_path / "a.ds.index")
    (source,) = list_token_sources(tmp_path / "a.ds", TokenRules()).sources
    items = list(read_token_documents(Span(source, 0, 1 << 22, 0), TokenRules(), EOS, VOCAB_SIZE))
    assert sum(len(item.tokens) for item in items) == 1 << 22
    assert max(len(item.tokens) for item in items) <= 3 << 20
