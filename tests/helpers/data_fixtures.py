"""One small corpus for all data tests: CPython's help texts, a vocabulary of 1,000, windows of 64 tokens."""

import os
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.conversion import ByteTokenizer

from mythos_dist.prepare import batches, documents, lines, part
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.corpus import read_documents, write_sample_corpus
from mythos_dist.prepare.tokenizer_training import train_tokenizer

SEQ_LEN = 64
VOCAB_SIZE = 1000


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """These tests do not cover power cuts, and fsync of hundreds of small files is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def corpus(data_folder):
    """The parquet file."""
    return write_sample_corpus(data_folder / "corpus.parquet")


@pytest.fixture(scope="session")
def tokenizer(corpus, data_folder):
    return train_tokenizer(read_documents(corpus), data_folder / "tokenizer.model", VOCAB_SIZE)


@pytest.fixture(scope="session")
def byte_tokenizer(data_folder):
    """Token id = byte + 3."""
    return ByteTokenizer(data_folder / "bytes.model")


@pytest.fixture(scope="session")
def shards(corpus, tokenizer, data_folder):
    """A folder of shards with a tenth of the documents held out. Tests that change it copy it first."""
    out = data_folder / "shards"
    convert(corpus, tokenizer, SEQ_LEN, out, heldout=0.1, quiet=True)
    return out


@pytest.fixture(scope="session")
def make_stream(shards):
    """ReplicaStream with small defaults; a test passes only the settings that it is about."""
    from mythos_dist.data.stream import ReplicaStream  # imports streaming, which takes seconds

    return partial(
        ReplicaStream,
        path=shards,
        split="train",
        seq_len=SEQ_LEN,
        vocab_size=VOCAB_SIZE,
        global_batch=8,
        micro_batch=2,
        replica=0,
        num_replicas=1,
        seed=7,
    )


@pytest.fixture
def write_parquet(tmp_path):
    """Write columns (lists) to a parquet file of `tmp_path`, `rows` to a row group."""

    def write(name="a.parquet", rows=10, **columns):
        pq.write_table(pa.table(columns), tmp_path / name, row_group_size=rows)
        return tmp_path / name

    return write


@pytest.fixture
def part_per_span(monkeypatch):
    """Each row group is a part."""
    monkeypatch.setattr(part, "MIN_PART_BYTES", 1)
    monkeypatch.setattr(part, "PARTS", 1 << 30)


@pytest.fixture
def tiny_pieces(monkeypatch):
    """`tiny_pieces(n)`: documents of more than n bytes are long ones, and batches hold about 2 n bytes."""

    def patch(size):
        for module in (batches, documents, lines):
            monkeypatch.setattr(module, "LONG_BYTES", size)
        for module in (batches, documents):
            monkeypatch.setattr(module, "BATCH_BYTES", 2 * size)
        monkeypatch.setattr("mythos_dist.prepare.part_converter.FRAGMENT_BYTES", size)

    return patch
