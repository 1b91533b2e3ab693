"""Pieces of tensors: what one rank holds of a named tensor, and how one layout's pieces fill another's.

A rank holds a slice of a tensor (a box, by tensor and expert parallelism), and of the slice's flattened numbers ZeRO
leaves it a stretch. Any stretch is a few boxes that lie one after the other in memory: the end of a row, whole rows,
the beginning of a row. So two pieces, cut by any two layouts, share boxes, and copying those is all that changing the
layout is. The trap: a slice may be allocated larger than its part of the tensor (`parallel/tensor.py`); what lies
outside of the whole tensor is filling, and is never copied.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

Size = Annotated[int, Field(strict=True, ge=0, le=1 << 52)]  # bounds hold where a manifest is read
Index = tuple[Size, ...]


@dataclass(frozen=True)
class Piece:
    """The numbers [first, last) of a flattened slice."""

    shape: Index  # of the slice, filling included
    start: Index  # where it begins in the whole tensor
    first: Size
    last: Size

    @staticmethod
    def whole(shape: Index) -> "Piece":
        """All of a tensor."""
        return Piece(shape, (0,) * len(shape), 0, math.prod(shape))


@dataclass(frozen=True)
class Box:
    """A part of a piece that is contiguous in it."""

    offset: int  # in the piece, in numbers
    lower: Index  # in the whole tensor
    upper: Index

    @property
    def shape(self) -> Index:
        return tuple(high - low for low, high in zip(self.lower, self.upper, strict=True))


@dataclass(frozen=True)
class Region:
    """A part of a box: `where` in an array of the box's shape, which begins at `offset` in the piece."""

    offset: int
    shape: Index
    where: tuple[slice, ...]

    @property
    def contiguous(self) -> tuple[int, int] | None:
        """Where in the piece its numbers lie one after the other, or None if they do not."""
        begin, end, size, open_ended = self.offset, self.offset + 1, 1, True
        for length, part in zip(reversed(self.shape), reversed(self.where), strict=True):
            if not open_ended and part.stop - part.start > 1:
                return None
            open_ended = open_ended and part.stop - part.start == length
            begin += part.start * size
            end += (part.stop - 1) * size
            size *= length
        return begin, end


def boxes(piece: Piece) -> Iterator[Box]:
    """The boxes that make up a piece, in order."""
    offset = 0
    for lower, upper in _boxes(piece.shape, piece.first, piece.last):
        moved = [tuple(map(sum, zip(corner, piece.start, strict=True))) for corner in (lower, upper)]
        box = Box(offset, *moved)
        offset += math.prod(box.shape)
        yield box


def _boxes(shape: Index, first: int, last: int) -> Iterator[tuple[Index, Index]]:
    if first >= last:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    top, before = divmod(first, row)
    bottom, behind = divmod(last, row)
    if top == bottom:
        yield from _inside(top, shape[1:], before, behind)
        return
    if before:
        yield from _inside(top, shape[1:], before, row)
        top += 1
    if top < bottom:
        yield (top, *(0,) * (len(shape) - 1)), (bottom, *shape[1:])
    yield from _inside(bottom, shape[1:], 0, behind)


def _inside(index: int, shape: Index, first: int, last: int) -> Iterator[tuple[Index, Index]]:
    for lower, upper in _boxes(shape, first, last):
        yield (index, *lower), (index + 1, *upper)


def shared(source: Piece, target: Piece, whole: Index) -> Iterator[tuple[Region, Region]]:
    """What two pieces of a tensor of shape `whole` have in common: regions of equal shape, in source and target."""
    for here, there in itertools.product(boxes(source), boxes(target)):
        lower = tuple(map(max, here.lower, there.lower))
        upper = tuple(map(min, here.upper, there.upper, whole))
        if all(low < high for low, high in zip(lower, upper, strict=True)):
            yield _region(here, lower, upper), _region(there, lower, upper)


def _region(box: Box, lower: Index, upper: Index) -> Region:
    where = tuple(slice(low - at, high - at) for low, high, at in zip(lower, upper, box.lower, strict=True))
    return Region(box.offset, box.shape, where)


def real_numbers(piece: Piece, whole: Index) -> int:
    """How many of a piece's numbers belong to the whole tensor; the others are filling."""
    return sum(
        math.prod(max(0, min(high, size) - low) for low, high, size in zip(box.lower, box.upper, whole, strict=True))
        for box in boxes(piece)
    )
