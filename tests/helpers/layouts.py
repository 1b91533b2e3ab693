"""A checkpoint of given tensors as ranks of any layout would save it, and the pieces that a rank of a layout holds."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from helpers.small_checkpoint import manifest

from mythos_dist.checkpoint.manifest import CheckpointManifest, FileEntry, TensorEntry
from mythos_dist.checkpoint.names import MANIFEST_FILE, folder_name
from mythos_dist.checkpoint.pieces import Piece, boxes
from mythos_dist.checkpoint.tensor_file import write_tensors

KINDS = ("parameter", "exp_avg", "exp_avg_sq")


class Layout(NamedTuple):
    """`tensor` shards of each tensor along a dim (None: replicated, saved by the first), of which each of `data`
    replicas holds a range."""

    tensor: int
    data: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    def piece(self, rank: int, shape: tuple[int, ...], dim: int | None) -> Piece | None:
        """What a rank holds of a tensor; None: nothing. The last shards and ranges may be smaller."""
        replica, shard = divmod(rank, self.tensor)
        if dim is None:
            if shard:
                return None
            shard_shape, start = shape, (0,) * len(shape)
        else:
            width = -(-shape[dim] // self.tensor)
            shard_shape = (*shape[:dim], width, *shape[dim + 1 :])
            start = tuple(shard * width if i == dim else 0 for i in range(len(shape)))
        size = math.prod(shard_shape)
        first, last = (size * i // self.data for i in (replica, replica + 1))
        return Piece(shard_shape, start, first, last) if first < last else None


def values(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors, by kind/name."""
    draw = np.random.default_rng(seed)
    return {
        f"{kind}/{name}": draw.standard_normal(shape, np.float32) for name, shape in shapes.items() for kind in KINDS
    }


def part(full: np.ndarray, piece: Piece) -> np.ndarray:
    """The elements of a piece, flat; padding is zero. Box by box, with numpy's slices."""
    out = np.zeros(piece.last - piece.first, np.float32)
    for box in boxes(piece):
        padded = np.zeros(box.shape, np.float32)
        inside = full[tuple(slice(low, high) for low, high in zip(box.lower, box.upper, strict=True))]
        padded[tuple(slice(0, n) for n in inside.shape)] = inside
        out[box.offset : box.offset + padded.size] = padded.reshape(-1)
    return out


def write_checkpoint(
    checkpoints: Path, step: int, layout: Layout, tensors: Mapping[str, np.ndarray], dims: Mapping[str, int | None]
) -> Path:
    """`dims`: the dim along which each tensor is sharded, by name. Returns the folder."""
    folder = checkpoints / folder_name(step)
    folder.mkdir(parents=True)
    files: dict[str, FileEntry] = {}
    for rank in range(layout.ranks):
        held = {
            name: piece
            for name, dim in dims.items()
            if (piece := layout.piece(rank, tensors[f"parameter/{name}"].shape, dim))
        }
        parts = {f"{k}/{name}": part(tensors[f"{k}/{name}"], piece) for name, piece in held.items() for k in KINDS}
        file = f"rank-{rank:05d}.safetensors"
        shapes = {key: value.shape for key, value in parts.items()}
        size, digest = write_tensors(folder / file, shapes, (value.data for value in parts.values()))
        files[file] = FileEntry(size, digest, held)
    about: CheckpointManifest = manifest(step)
    entries = {name: TensorEntry(tensors[f"parameter/{name}"].shape, KINDS) for name in dims}
    (folder / MANIFEST_FILE).write_text(replace(about, files=files, tensors=entries).to_text())
    return folder
