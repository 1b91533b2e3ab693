"""The canonical form of a checkpoint: full (unsharded) tensors in few large files, whatever layout wrote it.

Any layout loads any checkpoint as it is. The canonical form is for archiving a checkpoint, for moving it to another
cluster, and for runs of thousands of ranks, which then read few files. Tensors are assembled a block at a time, so
memory does not grow with the model.

Decisions: CHECKPOINT-2.
"""

import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mythos_dist.checkpoint.manifest import FORMAT_VERSION, CheckpointManifest, FileEntry
from mythos_dist.checkpoint.names import remove_checkpoint, temporary_name
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.publish import publish
from mythos_dist.checkpoint.reader import Checkpoint, checkpoints_of
from mythos_dist.checkpoint.signature import Key, signing_key
from mythos_dist.checkpoint.tensor_file import write_tensors
from mythos_dist.errors import UserError, delaying_interrupts
from mythos_dist.files import make_folders, reason
from mythos_dist.progress import Progress
from mythos_dist.units import short_bytes

FILE_BYTES = 4 << 30  # limit of a file, unless the tensors of a single name are larger
BLOCK_ELEMENTS = 1 << 24


def write_canonical(
    source: Checkpoint,
    run_dir: Path,
    *,
    workers: int = 4,
    verify: bool = True,
    progress: Progress = lambda size: None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the canonical form of a checkpoint as the first checkpoint of a new run in `run_dir`; returns its folder.

    `workers`: files written at once. `verify`: check for damage first, which reads every byte once more; done
    in any case if the source's signature is checked. Signed if MYTHOS_CHECKPOINT_KEY_FILE names a key.
    Raises UserError if the source is damaged, or if `run_dir` has too little space, cannot be written or already holds
    checkpoints.
    """
    run_dir = output_path(source, run_dir)
    source.raise_if_damaged(verify)
    tensors = partial(tensor_blocks, source, progress=progress)
    return write_full_tensors(run_dir, source.manifest, tensors, workers=workers, file_bytes=file_bytes)


def write_full_tensors(
    run_dir: Path,
    manifest: CheckpointManifest,
    blocks: Callable[[str, str], Iterator[memoryview]],
    *,
    workers: int,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write all tensors of `manifest` as the first checkpoint of a run; `blocks(kind, name)` yields a tensor's bytes.

    Returns its folder; leaves nothing if writing fails. Signed if MYTHOS_CHECKPOINT_KEY_FILE names a key.
    Raises UserError if `run_dir` has too little space, cannot be written or already holds checkpoints.
    """
    key = signing_key()
    checkpoints = run_dir / "checkpoints"
    existing = [path.name for path in checkpoints_of(checkpoints)]
    if existing:
        raise UserError(f"already holds {', '.join(existing[:3])}; name another folder", str(checkpoints))
    try:
        make_folders(checkpoints)
        return _write(checkpoints, manifest, blocks, workers, file_bytes, key)
    except OSError as error:
        raise UserError(
            f"cannot be written ({reason(error)}); name another folder or free some space", str(run_dir)
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
    groups = group_by_size(sizes, file_bytes)
    check_free_space(checkpoints, sum(sizes.values()))
    # By a tool (start 0), with a name that no other process uses.
    folder = checkpoints / f"{temporary_name(manifest.step, start=0)}-{secrets.token_hex(4)}"
    folder.mkdir()

    def write_file(index: int, names: list[str]) -> tuple[str, FileEntry]:
        file = f"tensors-{index:05d}-of-{len(groups):05d}.safetensors"
        keys = [(kind, name) for name in names for kind in tensors[name].kinds]
        shapes = {f"{kind}/{name}": tensors[name].shape for kind, name in keys}
        data = (block for kind, name in keys for block in blocks(kind, name))
        sha256 = hashlib.sha256() if key else None
        size, digest = write_tensors(folder / file, shapes, data, sha256=sha256)
        pieces = {name: Piece.full(tensors[name].shape) for name in names}
        return file, FileEntry(size, digest, pieces, sha256.hexdigest() if sha256 else None)

    try:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            files = dict(pool.map(write_file, range(len(groups)), groups))
        with delaying_interrupts():  # or a complete checkpoint would be there without `latest`
            return publish(folder, replace(manifest, files=files, format_version=FORMAT_VERSION), key)
    finally:
        with suppress(OSError):
            remove_checkpoint(folder)  # does nothing after `publish`, which renames it


def output_path(source: Checkpoint, out: Path) -> Path:
    """`out` with `~` expanded. Raises UserError if it is inside the source, or inside a run's folder of checkpoints."""
    try:
        out = out.expanduser()
        if not isinstance(source.folder, Path):
            return out
        folder = source.folder.resolve()
        out_and_parents = [out.resolve(), *out.resolve().parents]
    except (OSError, RuntimeError) as error:  # RuntimeError: a cycle of links, an unknown home
        raise UserError(f"cannot be used ({reason(error)})", str(out)) from None
    forbidden = [folder, folder.parent] if folder.parent.name == "checkpoints" else [folder]
    for path in forbidden:
        if path in out_and_parents:
            raise UserError(f"is inside {path}; name another folder", str(out))
    return out


def new_output(source: Checkpoint, out: Path, verify: bool) -> Path:
    """As `output_path`, of a folder that must not exist. Raises UserError also if the source is damaged; `verify`: its
    hashes are checked."""
    out = output_path(source, out)
    if os.path.lexists(out):
        raise UserError("exists; name a new folder", str(out))
    source.raise_if_damaged(verify)
    return out


def check_free_space(folder: Path, size: int) -> None:
    """Raises UserError unless `size` bytes are free; OSError if that cannot be determined."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < size:  # some file systems report 0 of 0
        raise UserError(
            f"{short_bytes(size)} are needed, {short_bytes(usage.free)} are free; free some space", str(folder)
        )


def group_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in alphabetical order, in groups of up to `limit` bytes; a larger tensor is a group of its own."""
    groups: list[list[str]] = [[]]
    remaining = limit
    for name, size in sorted(sizes.items()):
        if groups[-1] and size > remaining:
            groups.append([])
            remaining = limit
        groups[-1].append(name)
        remaining -= size
    return groups


def tensor_blocks(
    source: Checkpoint, kind: str, name: str, progress: Progress = lambda size: None
) -> Iterator[memoryview]:
    """The bytes of an unsharded fp32 tensor, in order; a block is valid until the next one is requested."""
    shape = source.manifest.tensors[name].shape
    total = math.prod(shape)
    buffer = np.empty(min(total, BLOCK_ELEMENTS), np.float32)
    for first in range(0, total, BLOCK_ELEMENTS):
        block = buffer[: min(BLOCK_ELEMENTS, total - first)]
        source.read(kind, name, Piece(shape, (0,) * len(shape), first, first + len(block)), block)
        yield block.data
        progress(block.nbytes)
