"""Checkpoints of one small matrix, made in this process; and a process group of one, for what ranks do together."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.small_checkpoint import VALUES, manifest

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.save import Saver
from mythos_dist.checkpoint.signature import VARIABLE
from mythos_dist.checkpoint.state import LocalShard
from mythos_dist.config.schema import CheckpointConfig


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    """A key of the person who runs the tests must not decide what they find."""
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(group, tmp_path) -> SimpleNamespace:
    """A run that saves: `saver(start, …)` is its Saver, `save(step, …)` begins a start and saves one step."""
    checkpoints = tmp_path / "run" / "checkpoints"

    def saver(start: int = 1, **settings) -> Saver:
        piece = Piece.full((5, 12))
        values = {kind: torch.from_numpy(VALUES.copy()) for kind in ("parameter", "exp_avg", "exp_avg_sq")}
        state = {"w": LocalShard(piece, (5, 12), values, writes=True)}
        config = CheckpointConfig(background=False, **settings)
        return Saver(checkpoints, config, Fence(checkpoints.parent, start), state)

    def save(step: int, start: int = 1, seed: int = 0, **settings) -> bool:
        one = saver(start, **settings)
        one.save(manifest(step, start, seed))
        return one.finish()

    return SimpleNamespace(checkpoints=checkpoints, saver=saver, save=save)
