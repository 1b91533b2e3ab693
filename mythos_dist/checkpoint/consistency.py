"""Whether a manifest agrees with itself: its pieces make up each tensor exactly, and its files can hold them.

Types and bounds are checked where it is parsed (`manifest.py`). What is checked here keeps a manifest that was tampered
with from causing reads beyond a file, huge allocations, or values that no file holds.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mythos_dist.checkpoint.names import DATA_FILE
from mythos_dist.checkpoint.pieces import Index, Piece, real_numbers
from mythos_dist.checkpoint.strict_json import shorten

if TYPE_CHECKING:
    from mythos_dist.checkpoint.manifest import CheckpointManifest

MAX_DIMS = 8
MAX_ELEMENTS = 1 << 50  # of a tensor


def contradictions(manifest: "CheckpointManifest") -> Iterator[str]:
    """What is wrong, one message each; nothing if every tensor can be read from the files."""
    bad_tensors = set()
    for name, tensor in manifest.tensors.items():
        if problem := _shape_problem(tensor.shape) or _kinds_problem(tensor.kinds):
            bad_tensors.add(name)
            yield f"tensor {shorten(name)} {problem}"
    pieces: dict[str, list[Piece]] = {name: [] for name in manifest.tensors}
    for file, entry in manifest.files.items():
        if not DATA_FILE.fullmatch(file):
            yield f"{shorten(file)} is no name of a checkpoint's file"
        least = 0
        for name, piece in entry.pieces.items():
            tensor = manifest.tensors.get(name)
            if tensor is None:
                yield f"{shorten(file)} holds {shorten(name)}, which is no tensor of this checkpoint"
            elif name not in bad_tensors:
                if problem := _piece_problem(piece, tensor.shape):
                    bad_tensors.add(name)
                    yield f"the piece of {shorten(name)} in {shorten(file)} {problem}"
                pieces[name].append(piece)
                least += 4 * (piece.last - piece.first) * len(tensor.kinds)
        if entry.bytes < least:
            yield f"{shorten(file)} has {entry.bytes} bytes, and its pieces take {least}"
    for name, tensor in manifest.tensors.items():
        if name not in bad_tensors and (problem := _partition_problem(pieces[name], tensor.shape)):
            yield f"tensor {shorten(name)}: {problem}"


def _shape_problem(shape: Index) -> str:
    if len(shape) > MAX_DIMS:
        return f"has {len(shape)} dims, at most {MAX_DIMS} are read"
    if 0 in shape:
        return f"has shape {list(shape)}, which holds nothing"
    return f"has shape {list(shape)}, which is too large" if math.prod(shape) > MAX_ELEMENTS else ""


def _kinds_problem(kinds: Sequence[str]) -> str:
    known = {"parameter", "exp_avg", "exp_avg_sq"}
    if kinds and len(set(kinds)) == len(kinds) and (kinds == ("buffer",) or set(kinds) <= known):
        return ""
    return f"is of kinds {shorten(list(kinds)) if len(kinds) > 4 else [shorten(kind) for kind in kinds]}"


def _piece_problem(piece: Piece, whole: Index) -> str:
    if not len(piece.shape) == len(piece.start) == len(whole):
        return f"has {len(piece.shape)} dims and begins at {len(piece.start)}, and the tensor has {len(whole)}"
    if problem := _shape_problem(piece.shape):
        return problem
    if not piece.first < piece.last <= math.prod(piece.shape):
        return f"is [{piece.first}, {piece.last}) of {math.prod(piece.shape)} elements"
    return ""


def _partition_problem(pieces: Iterable[Piece], whole: Index) -> str:
    """What keeps the pieces from holding each element of the tensor once; empty: nothing.

    Slices of a tensor form a grid: along each dim, two of them have the same range or none in common.
    """
    slices: dict[tuple[Index, Index], list[Piece]] = {}
    for piece in pieces:
        slices.setdefault((piece.start, piece.shape), []).append(piece)
    boxes, found = [], 0
    for (start, shape), parts in slices.items():
        parts.sort(key=lambda part: part.first)
        if any(before.last > part.first for before, part in itertools.pairwise(parts)):
            return "its pieces overlap"
        box = [(min(low, end), min(low + size, end)) for low, size, end in zip(start, shape, whole, strict=True)]
        if all(first < last for first, last in box):  # others are padding only
            boxes.append(tuple(box))
            full = sum(part.last - part.first for part in parts) == math.prod(shape)
            inside = math.prod(last - first for first, last in box)
            found += inside if full else sum(real_numbers(part, whole) for part in parts)
    ranges = [sorted({box[dim] for box in boxes}) for dim in range(len(whole))]
    if len(set(boxes)) < len(boxes) or any(
        before[1] > after[0] for along in ranges for before, after in itertools.pairwise(along)
    ):
        return "its pieces overlap"
    return "" if found == math.prod(whole) else f"its pieces hold {found} of {math.prod(whole)} elements"
