"""The canonical form of a checkpoint: whole tensors under their names, in few large files, whatever layout wrote it.

A checkpoint can be loaded at any layout as it is. This form is for keeping it, for carrying it elsewhere, and for runs
of thousands of ranks, which find what they need in few files. Tensors are put together a block at a time: memory does
not grow with the model.
"""

import hashlib
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mythos_dist.checkpoint.manifest import Checkpoint, CheckpointManifest, FileEntry, checkpoints_of
from mythos_dist.checkpoint.names import folder_name, remove
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.progress import Progress
from mythos_dist.checkpoint.publish import publish
from mythos_dist.checkpoint.signature import Key, signing_key
from mythos_dist.checkpoint.tensor_file import write_tensors
from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, reason
from mythos_dist.units import short

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

    `workers`: files that are written at a time. `verify`: look for damage first, which reads every byte once more; it
    is done in any case if the source's signature is checked. Signed if MYTHOS_CHECKPOINT_KEY_FILE names a key.
    Raises UserError if the source is damaged, or `run_dir` has no room, cannot be written or holds checkpoints already.
    """
    run_dir = outside(source, run_dir)
    source.raise_if_damaged(verify)
    tensors = partial(blocks_of, source, progress=progress)
    return write_full_tensors(run_dir, source.manifest, tensors, workers=workers, file_bytes=file_bytes)


def write_full_tensors(
    run_dir: Path,
    manifest: CheckpointManifest,
    blocks: Callable[[str, str], Iterator[memoryview]],
    *,
    workers: int,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write all tensors of `manifest` as the first checkpoint of a run; `blocks(kind, name)` are the bytes of one.

    Returns its folder; nothing stays behind if the writing fails. Signed if MYTHOS_CHECKPOINT_KEY_FILE names a key.
    Raises UserError if `run_dir` has no room, cannot be written or holds checkpoints already.
    """
    key = signing_key()
    checkpoints = run_dir / "checkpoints"
    if found := [path.name for path in checkpoints_of(checkpoints)]:
        raise UserError(f"holds {', '.join(found[:3])} already; name another folder", str(checkpoints))
    try:
        make_folders(checkpoints)
        return _write(checkpoints, manifest, blocks, workers, file_bytes, key)
    except OSError as error:
        raise UserError(
            f"cannot be written ({reason(error)}); name another folder or make room", str(run_dir)
        ) from None


def _write(
    checkpoints: Path,
    manifest: CheckpointManifest,
    blocks: Callable[[str, str], Iterator[memoryview]],
    workers: int,
    file_bytes: int,
    key: Key | None,
) -> Path:
    tensors = manifest.tensors
    sizes = {name: 4 * math.prod(tensor.shape) * len(tensor.kinds) for name, tensor in tensors.items()}
    groups = grouped(sizes, file_bytes)
    must_have_room(checkpoints, sum(sizes.values()))
    folder = checkpoints / f"{folder_name(manifest.step)}.tmp-0-{secrets.token_hex(4)}"
    folder.mkdir()

    def write(item: tuple[int, list[str]]) -> tuple[str, FileEntry]:
        number, names = item
        file = f"tensors-{number:05d}-of-{len(groups):05d}.safetensors"
        keys = [(kind, name) for name in names for kind in tensors[name].kinds]
        shapes = {f"{kind}/{name}": tensors[name].shape for kind, name in keys}
        sha256 = hashlib.sha256() if key else None
        data = (block for one in keys for block in blocks(*one))
        size, digest = write_tensors(folder / file, shapes, data, sha256=sha256)
        pieces = {name: Piece.whole(tensors[name].shape) for name in names}
        return file, FileEntry(size, digest, pieces, sha256 and sha256.hexdigest())

    try:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            files = dict(pool.map(write, enumerate(groups)))
        return publish(folder, replace(manifest, files=files), key)
    finally:
        with suppress(OSError):
            remove(folder)  # published, it has another name


def outside(source: Checkpoint, out: Path) -> Path:
    """`out`, its `~` expanded. Raises UserError if it is inside of the source, or among a run's checkpoints."""
    try:
        out, here = out.expanduser(), source.folder.resolve()
        above = [out.resolve(), *out.resolve().parents]
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, a home that is not known
        raise UserError(f"cannot be used ({reason(error)})", str(out)) from None
    if here in above or (here.parent in above and here.parent.name == "checkpoints"):
        raise UserError(f"is inside of {here if here in above else here.parent}; name another folder", str(out))
    return out


def must_have_room(folder: Path, size: int) -> None:
    """Raises UserError unless `size` bytes are free; OSError if the system does not say."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < size:  # a file system that does not know says 0 of 0
        raise UserError(f"{short(size)}B are needed and {short(usage.free)}B are free; make room", str(folder))


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
