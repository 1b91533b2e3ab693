"""One small corpus for all data tests: CPython's help texts, a vocabulary of 1000, windows of 64 tokens."""

from functools import partial

import pytest

from mythos_dist.data.corpus import read_documents, write_sample_corpus
from mythos_dist.data.shards import convert
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.data.tokenizer import train_tokenizer

SEQ_LEN = 64
VOCAB_SIZE = 1000


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
def shards(corpus, tokenizer, data_folder):
    """The folder of shards; a tenth of the documents is held out. Tests that change it copy it first."""
    out = data_folder / "shards"
    convert(corpus, tokenizer, SEQ_LEN, out, heldout=0.1)
    return out


@pytest.fixture(scope="session")
def make_stream(shards):
    """ReplicaStream with small defaults; name only what a test is about."""
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
