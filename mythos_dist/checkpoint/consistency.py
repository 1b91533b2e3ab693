"""Whether a manifest is consistent: its pieces cover each tensor exactly once, and its files are large enough for them.

Types and bounds are checked where the manifest is parsed (`manifest.py`). The checks here keep a manifest that was
tampered with from causing reads beyond a file, huge allocations, or elements that no file holds.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mythos_dist.checkpoint.names import DATA_FILE
from mythos_dist.checkpoint.pieces import Index, Piece, size_without_padding
from mythos_dist.checkpoint.strict_json import shorten

if TYPE_CHECKING:
    from mythos_dist.checkpoint.manifest import CheckpointManifest

MAX_DIMS = 8
MAX_ELEMENTS = 1 << 50  # of a tensor


def contradictions(manifest: "CheckpointManifest") -> Iterator[str]:
    """A message per problem; none if every tensor can be read from the files."""
    bad_tensors = set()
    for name, tensor in manifest.tensors.items():
        if problem := _shape_problem(tensor.shape) or _kinds_problem(tensor.kinds):
            bad_tensors.add(name)
            yield f"tensor {shorten(name)} {problem}"
    pieces: dict[str, list[Piece]] = {name: [] for name in manifest.tensors}
    for file, entry in manifest.files.items():
        if not DATA_FILE.fullmatch(file):
            yield f"{shorten(file)} is not a valid name of a checkpoint's file"
        bytes_needed = 0
        for name, piece in entry.pieces.items():
            tensor = manifest.tensors.get(name)
            if tensor is None:
                yield f"{shorten(file)} holds {shorten(name)}, which is not a tensor of this checkpoint"
            elif name not in bad_tensors:
                if problem := _piece_problem(piece, tensor.shape):
                    bad_tensors.add(name)
                    yield f"the piece of {shorten(name)} in {shorten(file)} {problem}"
                pieces[name].append(piece)
                bytes_needed += 4 * (piece.last - piece.first) * len(tensor.kinds)
        if entry.bytes < bytes_needed:
            yield f"{shorten(file)} has {entry.bytes} bytes, but its pieces need {bytes_needed}"
    for name, tensor in manifest.tensors.items():
        if name not in bad_tensors and (problem := _coverage_problem(pieces[name], tensor.shape)):
            yield f"tensor {shorten(name)}: {problem}"


def _shape_problem(shape: Index) -> str:
    if len(shape) > MAX_DIMS:
        return f"has {len(shape)} dims; at most {MAX_DIMS} are allowed"
    if 0 in shape:
        return f"has shape {list(shape)}, which has no elements"
    return f"has shape {list(shape)}, which is too large" if math.prod(shape) > MAX_ELEMENTS else ""


def _kinds_problem(kinds: Sequence[str]) -> str:
    of_parameter = {"parameter", "exp_avg", "exp_avg_sq", "momentum_buffer", "average"}
    of_buffer = {"buffer", "average"}
    if kinds and len(set(kinds)) == len(kinds) and (set(kinds) <= of_parameter or set(kinds) <= of_buffer):
        return ""
    return f"has kinds {shorten(list(kinds)) if len(kinds) > 4 else [shorten(kind) for kind in kinds]}"


def _piece_problem(piece: Piece, full_shape: Index) -> str:
    if not len(piece.shape) == len(piece.start) == len(full_shape):
        return f"has {len(piece.shape)} dims and a start of {len(piece.start)}; the tensor has {len(full_shape)} dims"
    if problem := _shape_problem(piece.shape):
        return problem
    size = math.prod(piece.shape)
    if not piece.first < piece.last <= size:
        return f"is the range [{piece.first}, {piece.last}) of {size} elements"
    return ""


def _coverage_problem(pieces: Iterable[Piece], full_shape: Index) -> str:
    """Why the pieces do not hold each element of the tensor exactly once; empty: they do.

    The shards of a tensor must form a grid: along each dim, two shards have the same range or disjoint ranges.
    """
    by_shard: dict[tuple[Index, Index], list[Piece]] = {}
    for piece in pieces:
        by_shard.setdefault((piece.start, piece.shape), []).append(piece)
    boxes: list[tuple[tuple[int, int], ...]] = []  # of each shard, its range along each dim, without padding
    covered = 0
    for (start, shape), shard_pieces in by_shard.items():
        shard_pieces.sort(key=lambda piece: piece.first)
        if any(before.last > after.first for before, after in itertools.pairwise(shard_pieces)):
            return "its pieces overlap"
        box = tuple(
            (min(low, end), min(low + size, end)) for low, size, end in zip(start, shape, full_shape, strict=True)
        )
        if any(low == high for low, high in box):
            continue  # nothing but padding
        boxes.append(box)
        if sum(piece.last - piece.first for piece in shard_pieces) == math.prod(shape):
            covered += math.prod(high - low for low, high in box)
        else:
            covered += sum(size_without_padding(piece, full_shape) for piece in shard_pieces)
    if len(set(boxes)) < len(boxes):
        return "its pieces overlap"
    for dim in range(len(full_shape)):
        ranges = sorted({box[dim] for box in boxes})
        if any(before[1] > after[0] for before, after in itertools.pairwise(ranges)):
            return "its pieces overlap"
    size = math.prod(full_shape)
    return "" if covered == size else f"its pieces hold {covered} of {size} elements"
