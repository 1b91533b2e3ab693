"""The fixtures of all tests: the OpenMythos 0.5.0 reference, a small set of shards, a small config, a store.

Decisions: PROJECT-1.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import os
import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.s3 import Store, serving_s3
from helpers.small_run import REPOSITORY, SMALL, TINY

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.data.chat_template import find_renderer
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.corpus import read_documents, write_sample_corpus
from mythos_dist.prepare.spans import Columns
from mythos_dist.prepare.tokenizer_training import train_tokenizer
from mythos_dist.store import fetch

# Tensors in tests are tiny: a second thread costs more in synchronization than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def open_mythos() -> SimpleNamespace:
    """The reference package's modules: `main` and `variants`.

    It is in a folder outside the environment, because it requires packages that we do not need. Its `__init__` is not
    run, because it imports transformers, which takes seconds.
    """
    folder = os.environ.get("OPEN_MYTHOS") or str(REPOSITORY / ".venv" / "reference")
    spec = importlib.machinery.PathFinder.find_spec("open_mythos", [folder])
    if spec is None:
        pytest.fail(f"OpenMythos 0.5.0 not found in {folder}; `make test` installs it", pytrace=False)
    sys.modules["open_mythos"] = importlib.util.module_from_spec(spec)
    return SimpleNamespace(
        main=importlib.import_module("open_mythos.main"), variants=importlib.import_module("open_mythos.variants")
    )


@pytest.fixture(scope="session", autouse=True)
def shared_memory_of_killed_runs(tmp_path_factory):
    """Remove /dev/shm segments of killed runs at the end: streaming's next dataset would open all of them.

    Segments of other jobs stay: a dataset's `locals` segment contains the folder it reads, and only folders of this
    session are considered.
    """
    yield
    session_folder = str(tmp_path_factory.getbasetemp()).encode()
    for names in Path("/dev/shm").glob("??????_locals"):
        if session_folder in names.read_bytes():
            for segment in names.parent.glob(names.name.removesuffix("locals") + "*"):
                segment.unlink(missing_ok=True)


@pytest.fixture
def seed() -> int:
    """Seed for random choices of a test: $SEED; otherwise 1 in CI, and random elsewhere. Failure reports show it."""
    return int(os.environ.get("SEED") or ("CI" in os.environ) or random.SystemRandom().randrange(2**32))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Shards with samples of 32 tokens from CPython's help, vocabulary 512."""
    work = tmp_path_factory.mktemp("shards")
    corpus = write_sample_corpus(work / "corpus.parquet")
    tokenizer = train_tokenizer(read_documents(corpus), work / "tokenizer.model", 512)
    convert(corpus, tokenizer, 32, work / "mds", heldout=0.1, quiet=True)
    return work / "mds"


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """Shards of conversations with samples of 32 tokens, of which 1 to 25 are in the loss; vocabulary 260."""
    work, draw = tmp_path_factory.mktemp("conversations"), random.Random(1)
    tokenizer = Tokenizer.load(write_byte_tokenizer(work))
    words = ["".join(draw.choices(string.printable[:94], k=draw.choice([1, 2, 4, 9, 22]))) for _ in range(800)]
    pairs = [{"prompt": f"{i}", "completion": word} for i, word in enumerate(words)]
    (work / "chats.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    columns = Columns(chat=find_renderer(tokenizer, None))
    convert(work / "chats.jsonl", tokenizer, 32, work / "mds", heldout=0.1, columns=columns, quiet=True)
    return work / "mds"


@pytest.fixture(scope="session")
def settings(shards) -> list[str]:
    """Command-line arguments of a small run, without run.dir."""
    return [str(TINY), *SMALL, f"data.path={shards}"]


@pytest.fixture(scope="session")
def config(settings) -> Config:
    """`settings` as a Config."""
    return load_config(settings[0], settings[1:])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Store]:
    with serving_s3() as server:
        yield server


@pytest.fixture(scope="module")
def store(s3_server) -> Iterator[Store]:
    """An S3 server with a proxy that injects faults; the environment of the module's tests is that of its client.
    Files use buckets of different names, since the server is the same for all."""
    s3_server.reset()
    with s3_server.environment():
        yield s3_server


@pytest.fixture
def no_faults(store, monkeypatch) -> None:
    """The test begins without faults and counts from zero; retries follow at once."""
    store.reset()
    monkeypatch.setattr(fetch, "FIRST_DELAY", 0.01)
