"""Texts one by one, for the training of tokenizers, and the sample corpus from Python's help texts."""

from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mythos_dist.errors import UserError
from mythos_dist.prepare.corpus import read_documents, sample_documents, write_sample_corpus

FINEWEB_EDU = "text id dump url file_path language language_score token_count score int_score".split()


def write(file, **columns):
    pq.write_table(pa.table(columns), file, row_group_size=10)
    return file


def test_the_sample_corpus_is_pythons_help_in_finewebs_schema(corpus, tmp_path):
    assert pq.read_schema(corpus).names == FINEWEB_EDU
    assert sorted(read_documents(corpus)) == sorted(topics.values())
    assert write_sample_corpus(tmp_path / "again.parquet").read_bytes() == corpus.read_bytes()


def test_empty_texts_are_left_out_and_invalid_bytes_replaced(tmp_path):
    texts = pa.array([b"caf\xc3\xa9", None, b"", b"bad \xff byte"], pa.binary()).cast(pa.string(), safe=False)
    assert list(read_documents(write(tmp_path / "a.parquet", text=texts))) == ["café", "bad \ufffd byte"]


def test_a_long_document_is_one_text(tmp_path):
    text = "wörter " * 300_000
    assert list(read_documents(write(tmp_path / "a.parquet", text=["before", text, "after"]))) == [
        "before",
        text,
        "after",
    ]


def test_a_file_that_cannot_be_read_is_named(corpus, tmp_path):
    damaged = bytearray(corpus.read_bytes())
    damaged[4:50_000] = bytes(len(damaged[4:50_000]))
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    (tmp_path / "cut.parquet").write_bytes(corpus.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"damaged.parquet: row group 0 cannot be read"):
        list(read_documents(tmp_path / "damaged.parquet"))
    with pytest.raises(UserError, match=r"cut.parquet: cannot be read"):
        list(read_documents(tmp_path / "cut.parquet"))


def test_a_sample_is_drawn_from_all_files_and_depends_on_the_seed(tmp_path):
    texts = [f"document {number} " + "x" * 1000 for number in range(400)]
    for part in range(2):
        write(tmp_path / f"{part}.parquet", text=texts[part * 200 : part * 200 + 200])
    samples = [list(sample_documents(tmp_path, 50_000, seed)) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert 50_000 <= sum(map(len, samples[0])) < 50_000 + len(texts[0]) + 10
    indices = sorted(texts.index(text) for text in samples[0])
    assert len(set(indices)) == len(indices)
    assert indices[0] < 200 <= indices[-1], "from both files"
    assert sorted(sample_documents(tmp_path, 10**9)) == sorted(texts), "a smaller corpus is read completely"
