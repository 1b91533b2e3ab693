"""What all tests share: few threads, OpenMythos 0.5.0 as the reference for numbers, and one small set of shards."""

import importlib
import importlib.machinery
import importlib.util
import os
import random
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.small_run import REPOSITORY, SMALL, TINY
from hypothesis import settings as hypothesis_settings

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.data.tokenizer import train_tokenizer
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.corpus import read_documents, write_sample_corpus

pytest_plugins = ["helpers.schedule", "helpers.report"]

# A busy machine is no failure; CI judges a change by the same examples every time, a person's run looks for new ones.
hypothesis_settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
hypothesis_settings.load_profile("patient")

# Streaming keeps a dozen files open per dataset that the process has had, times the datasets before it.
_, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard if _hard != resource.RLIM_INFINITY else 65536, _hard))

# A shell's background job ignores Ctrl-C, one under nohup SIGHUP, and so would every program that is started here; a
# script could not undo it.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Tensors here are tiny: a second thread costs more in hand-over than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def open_mythos() -> SimpleNamespace:
    """The reference package's modules: `main` and `variants`.

    It lies in a folder of its own, away from the environment's packages, because it asks for others that we do not
    need; its `__init__`, which imports transformers for seconds, is not run.
    """
    folder = os.environ.get("OPEN_MYTHOS") or str(REPOSITORY / ".venv" / "reference")
    spec = importlib.machinery.PathFinder.find_spec("open_mythos", [folder])
    if spec is None:
        pytest.fail(f"OpenMythos 0.5.0 is not in {folder}; `make test` installs it there", pytrace=False)
    sys.modules["open_mythos"] = importlib.util.module_from_spec(spec)
    return SimpleNamespace(
        main=importlib.import_module("open_mythos.main"), variants=importlib.import_module("open_mythos.variants")
    )


@pytest.fixture(scope="session", autouse=True)
def shared_memory_of_killed_runs(tmp_path_factory):
    """Remove what runs that a test killed have left in /dev/shm: streaming's next dataset would open all of it.

    Other jobs' memory stays: a data set's `locals` name the folder it reads, and only this session's folders count.
    """
    yield
    ours = str(tmp_path_factory.getbasetemp()).encode()
    for names in Path("/dev/shm").glob("??????_locals"):
        if ours in names.read_bytes():
            for segment in names.parent.glob(names.name.removesuffix("locals") + "*"):
                segment.unlink(missing_ok=True)


@pytest.fixture
def seed() -> int:
    """For what a test draws at random: $SEED, the same in all of CI, or a new one. A failure's report has it."""
    return int(os.environ.get("SEED") or ("CI" in os.environ) or random.SystemRandom().randrange(2**32))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Shards of 32 tokens from CPython's help, vocabulary 512."""
    work = tmp_path_factory.mktemp("shards")
    corpus = write_sample_corpus(work / "corpus.parquet")
    tokenizer = train_tokenizer(read_documents(corpus), work / "tokenizer.model", 512)
    convert(corpus, tokenizer, 32, work / "mds", heldout=0.1, quiet=True)
    return work / "mds"


@pytest.fixture(scope="session")
def settings(shards) -> list[str]:
    """Command line of a small run, without run.dir."""
    return [str(TINY), *SMALL, f"data.path={shards}"]


@pytest.fixture(scope="session")
def config(settings) -> Config:
    """The same as a Config."""
    return load_config(settings[0], settings[1:])
