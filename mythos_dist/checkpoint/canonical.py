"""The canonical form of a checkpoint: whole tensors under their names, in few large files, whatever layout wrote it.

A checkpoint can be loaded at any layout as it is. This form is for keeping it, for carrying it elsewhere, and for runs
of thousands of ranks, which find what they need in few files. Tensors are put together a block at a time: memory does
not grow with the model.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mythos_dist.checkpoint.manifest import Checkpoint, File, Manifest
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.progress import Progress
from mythos_dist.checkpoint.save import publish
from mythos_dist.checkpoint.tensor_file import write_tensors
from mythos_dist.errors import UserError

FILE_BYTES = 4 << 30  # of a file, unless one name's tensors take more
BLOCK = 1 << 24  # numbers that are put together at a time


def write_canonical(
    source: Checkpoint,
    run_dir: Path,
    *,
    workers: int = 4,
    verify: bool = True,
    progress: Progress = lambda size: None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a checkpoint's canonical form below `run_dir`, where a run finds it; returns its folder.

    `workers`: files that are written at a time. `verify`: look for damage first, which reads every byte once more.
    Raises UserError if the source is damaged, or `run_dir` has no room or holds checkpoints already.
    """
    if verify:
        source.must_be_whole()
    tensors = partial(blocks_of, source, progress=progress)
    return write_whole_tensors(run_dir, source.manifest, tensors, workers=workers, file_bytes=file_bytes)


def write_whole_tensors(
    run_dir: Path,
    manifest: Manifest,
    blocks: Callable[[str, str], Iterator[memoryview]],
    *,
    workers: int,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write all tensors of `manifest` as the first checkpoint of a run; `blocks(kind, name)` are the bytes of one.

    Returns its folder; nothing stays behind if the writing fails. Raises UserError if `run_dir` has no room or holds
    checkpoints already.
    """
    tensors = manifest.tensors
    sizes = {name: 4 * math.prod(tensor.shape) * len(tensor.kinds) for name, tensor in tensors.items()}
    groups = grouped(sizes, file_bytes)
    checkpoints = run_dir / "checkpoints"
    if found := sorted(path.name for path in checkpoints.glob("step-*")):
        raise UserError(f"holds {', '.join(found[:3])} already; name another folder", str(checkpoints))
    checkpoints.mkdir(parents=True, exist_ok=True)
    size, free = sum(sizes.values()), shutil.disk_usage(checkpoints).free
    if free < size:
        raise UserError(f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room", str(run_dir))
    folder = checkpoints / f"step-{manifest.step:08d}.tmp-0"
    folder.mkdir()

    def write(item: tuple[int, list[str]]) -> tuple[str, File]:
        number, names = item
        file = f"tensors-{number:05d}-of-{len(groups):05d}.safetensors"
        keys = [(kind, name) for name in names for kind in tensors[name].kinds]
        shapes = {f"{kind}/{name}": tensors[name].shape for kind, name in keys}
        size, digest = write_tensors(folder / file, shapes, (block for key in keys for block in blocks(*key)))
        return file, File(size, digest, {name: Piece.whole(tensors[name].shape) for name in names})

    try:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            files = dict(pool.map(write, enumerate(groups)))
        return publish(folder, replace(manifest, files=files))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # published, it has another name


def grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into groups: as many as take up to `limit` bytes together, at least one."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sorted(sizes.items()):
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def blocks_of(source: Checkpoint, kind: str, name: str, progress: Progress = lambda size: None) -> Iterator[memoryview]:
    """The bytes of a whole tensor, fp32, in order; a block is valid until the next one is asked for."""
    shape = source.manifest.tensors[name].shape
    total = math.prod(shape)
    room = np.empty(min(total, BLOCK), np.float32)
    for first in range(0, total, BLOCK):
        block = room[: min(BLOCK, total - first)]
        source.read(kind, name, Piece(shape, (0,) * len(shape), first, first + len(block)), block)
        yield block.data
        progress(block.nbytes)
