"""Pieces of tensors against the same question asked number by number."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.checkpoint.pieces import Piece, boxes, real_numbers, shared


@st.composite
def wholes(draw):
    """The shape of a tensor, of none to four dims."""
    return tuple(draw(st.lists(st.integers(1, 5), max_size=4)))


def pieces_of(whole):
    """Any slice, also one that is allocated beyond the tensor's end, and any stretch of it."""

    @st.composite
    def build(draw):
        shape = tuple(draw(st.integers(1, size + 1)) for size in whole)
        start = tuple(draw(st.integers(0, size - 1)) for size in whole)
        first = draw(st.integers(0, math.prod(shape)))
        return Piece(shape, start, first, draw(st.integers(first, math.prod(shape))))

    return build()


def values(piece: Piece, tensor: np.ndarray) -> np.ndarray:
    """The numbers of a piece, looked up one by one; filling is 0."""
    out = np.zeros(piece.last - piece.first)
    for i, flat in enumerate(range(piece.first, piece.last)):
        index = np.unravel_index(flat, piece.shape) if piece.shape else ()
        place = tuple(int(at) + begin for at, begin in zip(index, piece.start, strict=True))
        if all(at < size for at, size in zip(place, tensor.shape, strict=True)):
            out[i] = tensor[place]
    return out


@given(st.data())
def test_what_two_pieces_share_is_copied_and_nothing_else(data):
    whole = data.draw(wholes())
    tensor = np.arange(1.0, math.prod(whole) + 1).reshape(whole)
    source, target = data.draw(pieces_of(whole)), data.draw(pieces_of(whole))
    have, want = values(source, tensor), values(target, tensor)
    got = np.zeros_like(want)
    for here, there in shared(source, target, whole):
        region = have[here.offset : here.offset + math.prod(here.shape)].reshape(here.shape)[here.where]
        got[there.offset : there.offset + math.prod(there.shape)].reshape(there.shape)[there.where] = region
        for part, flat in ((here, have), (there, got)):
            if part.contiguous:
                assert np.array_equal(flat[slice(*part.contiguous)], region.reshape(-1))
    assert np.array_equal(got, np.where(np.isin(want, have[have > 0]), want, 0))
    assert real_numbers(target, whole) == np.count_nonzero(want)


@given(st.data())
def test_boxes_tile_a_piece(data):
    """In order, without gaps, and few: the ends of rows on both sides and whole rows between."""
    whole = data.draw(wholes())
    piece = data.draw(pieces_of(whole))
    found = list(boxes(piece))
    assert len(found) <= max(1, 2 * len(whole) - 1)
    end = 0
    for box in found:
        assert box.offset == end and math.prod(box.shape) > 0
        end += math.prod(box.shape)
    assert end == piece.last - piece.first


def test_a_whole_tensor_is_one_box():
    assert [box.shape for box in boxes(Piece.whole((3, 4, 5)))] == [(3, 4, 5)]
    assert [box.shape for box in boxes(Piece.whole(()))] == [()]
