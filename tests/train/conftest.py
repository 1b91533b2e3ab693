"""One small set of shards and a config for every training test."""

from pathlib import Path

import pytest

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.data.corpus import read_documents, write_sample_corpus
from mythos_dist.data.shards import convert
from mythos_dist.data.tokenizer import train_tokenizer

TINY = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
SMALL = (  # a step in a few hundredths of a second
    "model.dim=32 model.vocab_size=512 model.kv_lora_rank=16 model.q_lora_rank=16 model.max_loop_iters=2 "
    "train.seq_len=32 train.steps=6 optim.warmup_steps=2 optim.grad_clip=0.5 checkpoint.every=2 checkpoint.keep=3"
).split()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Shards of 32 tokens from CPython's help, vocabulary 512."""
    work = tmp_path_factory.mktemp("shards")
    corpus = write_sample_corpus(work / "corpus.parquet")
    tokenizer = train_tokenizer(read_documents(corpus), work / "tokenizer.model", 512)
    convert(corpus, tokenizer, 32, work / "mds", heldout=0.1, progress=False)
    return work / "mds"


@pytest.fixture(scope="session")
def settings(shards) -> list[str]:
    """Command line of a small run, without run.dir."""
    return [str(TINY), *SMALL, f"data.path={shards}"]


@pytest.fixture(scope="session")
def config(settings) -> Config:
    """The same as a Config."""
    return load_config(settings[0], settings[1:])
