"""A start that is suspended between its look at the fence and a rename changes nothing when it continues."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.small_run import REPOSITORY
from helpers.suspended_start import run_start

from mythos_dist.checkpoint.restore import find_checkpoint

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def group():
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def contents(run_dir: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of each file; `writer.guard` is the lock itself."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "writer.guard"]
    return {str(path.relative_to(run_dir)): (path.stat().st_ino, path.read_bytes()) for path in files}


@pytest.mark.parametrize(
    "name",
    [
        *"writer.json metrics.jsonl step-00000002 COMPLETED step-00000002.replaced-by-2".split(),
        # Written by the function that writes COMPLETED.
        *(pytest.param(n, marks=pytest.mark.long) for n in "config.yaml deepspeed.json rollbacks.json latest".split()),
    ],
)
def test_a_start_that_is_suspended_before_a_rename_renames_nothing_when_it_continues(tmp_path, monkeypatch, name):
    """SIGSTOP just before the rename, a whole new start meanwhile, SIGCONT: every file is the new start's."""
    monkeypatch.setattr("mythos_dist.checkpoint.fence._LOCK_TIMEOUT", 0.2)
    if name == "metrics.jsonl" or "replaced-by" in name:  # there must be one to replace
        run_start(tmp_path)
    command = [sys.executable, "-m", "helpers.suspended_start", str(tmp_path), name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])}
    old = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _, status = os.waitpid(old.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), old.communicate()
        run_start(tmp_path)
        new = contents(tmp_path)
        assert {"COMPLETED", "rollbacks.json", "checkpoints/latest"} < new.keys()
        old.send_signal(signal.SIGCONT)
        out = old.communicate()[0]
    finally:
        old.kill()
    assert old.returncode and ("taken over by start" in out or name == "writer.json"), out
    assert contents(tmp_path) == new
    checkpoint, damaged = find_checkpoint(tmp_path / "checkpoints")
    assert checkpoint and not damaged
