"""Fixtures: a run in this process that saves checkpoints of one small matrix, with a process group of one rank."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.small_checkpoint import VALUES, manifest

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import LocalShard
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.publish import remove_unfinished
from mythos_dist.checkpoint.save import Saver
from mythos_dist.checkpoint.signature import VARIABLE
from mythos_dist.config.schema import CheckpointConfig


@pytest.fixture(autouse=True)
def no_signing_key(monkeypatch):
    """A key in the developer's environment must not change the results."""
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(group, tmp_path) -> SimpleNamespace:
    """`saver(start, …)` creates the Saver of a start of the run; `save(step, …)` creates one and saves a step."""
    checkpoints = tmp_path / "run" / "checkpoints"

    def saver(start: int = 1, **settings) -> Saver:
        piece = Piece.full((5, 12))
        values = {kind: torch.from_numpy(VALUES.copy()) for kind in ("parameter", "exp_avg", "exp_avg_sq")}
        state = {"w": LocalShard(piece, (5, 12), values, writes=True)}
        config = CheckpointConfig(background=False, **settings)
        if checkpoints.is_dir():
            remove_unfinished(checkpoints, start)  # as a start does when it takes the run over
        return Saver(checkpoints, config, Fence(checkpoints.parent, start), state)

    def save(step: int, start: int = 1, seed: int = 0, **settings) -> bool:
        new_saver = saver(start, **settings)
        new_saver.save(manifest(step, start, seed))
        return new_saver.finish()

    return SimpleNamespace(checkpoints=checkpoints, saver=saver, save=save)
