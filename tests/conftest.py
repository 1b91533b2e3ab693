"""What all tests share: few threads, and OpenMythos 0.5.0 as the reference for numbers."""

import importlib
import importlib.machinery
import importlib.util
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

# A busy machine is no failure; CI judges a change by the same examples every time, a person's run looks for new ones.
settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("patient")

# Streaming keeps a dozen files open per dataset that the process has had, times the datasets before it.
_, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard if _hard != resource.RLIM_INFINITY else 65536, _hard))

REPOSITORY = Path(__file__).parents[1]

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
