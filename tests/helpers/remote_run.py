"""A run folder with checkpoints of several files, for tests of uploads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers.small_checkpoint import manifest

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import FileEntry, TensorEntry
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.publish import publish
from mythos_dist.checkpoint.remote import UploadSettings
from mythos_dist.checkpoint.tensor_file import write_tensors


def start(run_dir: Path, url: str, run: str = "a-run", **settings: Any) -> UploadSettings:
    """A new start of the run in a folder."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "logs").mkdir(exist_ok=True)
    fence = Fence.take(run_dir)
    return UploadSettings(str(run_dir), url, run, fence.start, fence.token, **settings)


def save(run_dir: Path, step: int, files: int = 3, size: int = 1000, seed: int = 0) -> Path:
    """Publish a checkpoint of one matrix, of which each file has `size` rows; its values depend on (step, seed)."""
    temporary = run_dir / "checkpoints" / f"step-{step:08d}.tmp-1"
    temporary.mkdir(parents=True)
    entries, rng = {}, np.random.default_rng([step, seed])
    for i in range(files):
        values = rng.random(size, np.float32)
        name = f"rank-{i:05d}.safetensors"
        written = write_tensors(temporary / name, {"parameter/w": (size,)}, [values.data])
        entries[name] = FileEntry(*written, {"w": Piece((size,), (i * size,), 0, size)})
    tensors = {"w": TensorEntry((files * size,), ("parameter",))}
    folder = publish(temporary, replace(manifest(step, 1), files=entries, tensors=tensors))
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(f'{{"step": {step}}}\n')
    return folder


def local(run_dir: Path, *steps: int) -> dict[str, bytes]:
    """The files of checkpoints, by their names below the run folder; of all checkpoints if no steps are given."""
    folders = [run_dir / "checkpoints" / f"step-{step:08d}" for step in steps]
    folders = folders or sorted((run_dir / "checkpoints").glob("step-*"))
    return {
        str(file.relative_to(run_dir)): file.read_bytes() for folder in folders for file in sorted(folder.iterdir())
    }
