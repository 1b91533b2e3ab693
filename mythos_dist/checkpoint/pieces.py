"""Pieces: which elements of a named tensor a rank holds, and which elements two pieces have in common.

Tensor and expert parallelism give a rank a shard of the tensor: a box of `shape` at `start`. ZeRO gives it the range
[first, last) of the shard's flattened elements. Shard and range together are a `Piece`.

How a rank finds its piece in the files of another layout: `checkpoint.json` lists the piece of each tensor in each
file. The rank takes the files that hold pieces of its tensor, and `overlaps` yields the regions that its own piece
shares with each of them; it copies only those (`reader.Checkpoint.read`). No layout is special: a range of a box is
a few smaller boxes, each contiguous in the piece (the end of a row, full rows, the beginning of a row), and two boxes
intersect in a box.

    A tensor of shape (4, 6), in a file written at parallel.tensor=2 with 2 replicas, read at tensor=1 with 3 replicas:
    in the file   shard (4, 3) at (0, 3), range [6, 12): rows 2 and 3 of columns 3 to 5
    of the rank   shard (4, 6) at (0, 0), range [8, 16): columns 2 to 5 of row 1, columns 0 to 3 of row 2
    overlap       row 2, column 3: element 0 of the file's piece, element 7 of the rank's

The trap: a shard may be allocated larger than its part of the tensor (`parallel/tensor.py`). Elements outside of the
full tensor are padding and are never copied.

Decisions: CHECKPOINT-1.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

Size = Annotated[int, Field(strict=True, ge=0, le=1 << 52)]  # bounds are checked where a manifest is read
Index = tuple[Size, ...]


@dataclass(frozen=True)
class Piece:
    """The elements [first, last) of a flattened shard. The names are keys of checkpoint.json; `last` is exclusive."""

    shape: Index  # of the shard, padding included
    start: Index  # of the shard in the full tensor
    first: Size
    last: Size

    @staticmethod
    def full(shape: Index) -> "Piece":
        """All elements of a tensor."""
        return Piece(shape, (0,) * len(shape), 0, math.prod(shape))


@dataclass(frozen=True)
class Box:
    """A box of the tensor whose elements are contiguous in the piece."""

    offset: int  # of its first element in the piece
    lower: Index  # corners in the full tensor: lower <= index < upper
    upper: Index

    @property
    def shape(self) -> Index:
        return tuple(high - low for low, high in zip(self.lower, self.upper, strict=True))


@dataclass(frozen=True)
class Region:
    """A part of a box: `slices` of an array of the box's `shape`, which begins at `offset` in the piece."""

    offset: int
    shape: Index
    slices: tuple[slice, ...]

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(part.stop - part.start for part in self.slices)

    @property
    def contiguous(self) -> tuple[int, int] | None:
        """The region as a range [begin, end) of the piece, or None if it is not contiguous there."""
        begin, end, stride = self.offset, self.offset + 1, 1
        inner_dims_are_full = True
        for length, part in zip(reversed(self.shape), reversed(self.slices), strict=True):
            if not inner_dims_are_full and part.stop - part.start > 1:
                return None
            inner_dims_are_full = inner_dims_are_full and part.stop - part.start == length
            begin += part.start * stride
            end += (part.stop - 1) * stride
            stride *= length
        return begin, end


def boxes(piece: Piece) -> Iterator[Box]:
    """The boxes that a piece consists of, in order."""
    offset = 0
    for lower, upper in _boxes_of_range(piece.shape, piece.first, piece.last):
        box = Box(offset, _add(lower, piece.start), _add(upper, piece.start))
        offset += math.prod(box.shape)
        yield box


def _boxes_of_range(shape: Index, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    """Corners of the boxes that make up the elements [start, stop) of a flattened array of `shape`."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row_size = math.prod(shape[1:])
    start_row, begin = divmod(start, row_size)
    stop_row, end = divmod(stop, row_size)
    if start_row == stop_row:
        yield from _boxes_of_row(start_row, shape[1:], begin, end)
        return
    if begin:
        yield from _boxes_of_row(start_row, shape[1:], begin, row_size)
        start_row += 1
    if start_row < stop_row:
        zeros = (0,) * (len(shape) - 1)
        yield (start_row, *zeros), (stop_row, *shape[1:])
    yield from _boxes_of_row(stop_row, shape[1:], 0, end)


def _boxes_of_row(row: int, shape: Index, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    for lower, upper in _boxes_of_range(shape, start, stop):
        yield (row, *lower), (row + 1, *upper)


def _add(index: Index, offset: Index) -> Index:
    return tuple(a + b for a, b in zip(index, offset, strict=True))


def overlaps(source: Piece, target: Piece, full_shape: Index) -> Iterator[tuple[Region, Region]]:
    """What two pieces of a tensor have in common: pairs of regions of equal shape, in source and in target."""
    for source_box, target_box in itertools.product(boxes(source), boxes(target)):
        lower = tuple(map(max, source_box.lower, target_box.lower))
        upper = tuple(map(min, source_box.upper, target_box.upper, full_shape))
        if all(low < high for low, high in zip(lower, upper, strict=True)):
            yield _region(source_box, lower, upper), _region(target_box, lower, upper)


def _region(box: Box, lower: Index, upper: Index) -> Region:
    slices = tuple(slice(low - at, high - at) for low, high, at in zip(lower, upper, box.lower, strict=True))
    return Region(box.offset, box.shape, slices)


def size_without_padding(piece: Piece, full_shape: Index) -> int:
    """How many of a piece's elements belong to the full tensor; the others are padding."""
    size = 0
    for box in boxes(piece):
        upper = map(min, box.upper, full_shape)
        size += math.prod(max(0, high - low) for low, high in zip(box.lower, upper, strict=True))
    return size
