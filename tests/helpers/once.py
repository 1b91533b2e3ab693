"""Read-only folders that are slow to build: one worker builds the folder, all others wait for it and read it."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The folder that `build(folder)` has filled, the same for all workers of this session.

    If `build` raises, that worker gets the exception, and the next worker tries again.
    """
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    done = root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder = factory.mktemp(name)
            build(folder)
            done.write_text(str(folder))
    return Path(done.read_text())
