"""A one-rank checkpoint of one matrix `w` of shape (5, 12) and its moments; a checkpoint of a small model."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from mythos_dist.checkpoint.canonical import write_full_tensors
from mythos_dist.checkpoint.manifest import BUFFER, PARAMETER, CheckpointManifest, TensorEntry, library_versions
from mythos_dist.config.schema import Config
from mythos_dist.model import Mythos

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


def write_run(folder: Path, config: Config) -> Path:
    """A run whose only checkpoint is of step 3, with drawn weights, large enough that loops make a difference."""
    torch.manual_seed(0)
    model = Mythos(config.model, act=config.act, experts=config.experts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5 if parameter.dim() > 1 else 1
    values = {name: (PARAMETER, value) for name, value in model.named_parameters()}
    values |= {name: (BUFFER, value) for name, value in model.named_buffers()}
    tensors = {name: TensorEntry(tuple(value.shape), (kind,)) for name, (kind, value) in values.items()}
    optimizer = {"steps": 3, "skipped_steps": 0, "loss_scale": {}}
    manifest = CheckpointManifest(3, 0, 0, {}, asdict(config), "", library_versions(), optimizer, tensors, {})

    def blocks(_, name):
        yield values[name][1].detach().float().contiguous().flatten().numpy().data

    write_full_tensors(folder, manifest, blocks, workers=1)
    return folder
