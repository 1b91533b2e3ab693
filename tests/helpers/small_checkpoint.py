"""A one-rank checkpoint of one matrix `w` of shape (5, 12) and its moments."""

from pathlib import Path

import numpy as np

from mythos_dist.checkpoint.manifest import CheckpointManifest

VALUES = np.arange(60, dtype=np.float32)  # of the matrix and of each moment


def manifest(step: int, start: int = 1, seed: int = 0) -> CheckpointManifest:
    """A manifest as the training loop builds it, without tensors and files."""
    return CheckpointManifest(
        step=step, tokens=step * 8, start=start, layout={"ranks": 1}, config={"model": {}, "run": {"seed": seed}},
        data="", versions={"torch": "2"}, optimizer={"steps": step, "skipped_steps": 0, "loss_scale": {}},
        tensors={}, files={},
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    """Sorted names of the entries of a folder."""
    return sorted(path.name for path in folder.iterdir())
