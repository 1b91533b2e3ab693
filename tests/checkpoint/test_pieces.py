"""Boxes and overlaps of pieces, compared with a lookup element by element."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.checkpoint.pieces import Piece, Region, boxes, overlaps, size_without_padding


@st.composite
def shapes(draw):
    """The shape of a tensor with up to four dims."""
    return tuple(draw(st.lists(st.integers(1, 5), max_size=4)))


def pieces_of(full_shape):
    """Any range of any shard, also of a shard that is padded beyond the tensor's end."""

    @st.composite
    def build(draw):
        shape = tuple(draw(st.integers(1, size + 1)) for size in full_shape)
        start = tuple(draw(st.integers(0, size - 1)) for size in full_shape)
        first = draw(st.integers(0, math.prod(shape)))
        return Piece(shape, start, first, draw(st.integers(first, math.prod(shape))))

    return build()


def elements_of(piece: Piece, tensor: np.ndarray) -> np.ndarray:
    """The elements of a piece, looked up one by one; padding is 0."""
    out = np.zeros(piece.last - piece.first)
    for i, flat in enumerate(range(piece.first, piece.last)):
        index_in_shard = np.unravel_index(flat, piece.shape) if piece.shape else ()
        index = tuple(int(at) + begin for at, begin in zip(index_in_shard, piece.start, strict=True))
        if all(at < size for at, size in zip(index, tensor.shape, strict=True)):
            out[i] = tensor[index]
    return out


def view_of(region: Region, flat: np.ndarray) -> np.ndarray:
    box = flat[region.offset : region.offset + math.prod(region.shape)].reshape(region.shape)
    return box[region.slices or ...]


@given(st.data())
def test_overlaps_copy_the_elements_that_both_pieces_hold_and_no_others(data):
    full_shape = data.draw(shapes())
    tensor = np.arange(1.0, math.prod(full_shape) + 1).reshape(full_shape)
    source, target = data.draw(pieces_of(full_shape)), data.draw(pieces_of(full_shape))
    source_elements, target_elements = elements_of(source, tensor), elements_of(target, tensor)
    copied = np.zeros_like(target_elements)
    for source_region, target_region in overlaps(source, target, full_shape):
        elements = view_of(source_region, source_elements)
        view_of(target_region, copied)[...] = elements
        for region, flat in ((source_region, source_elements), (target_region, copied)):
            if region.contiguous:
                assert np.array_equal(flat[slice(*region.contiguous)], elements.reshape(-1))
    in_both = np.isin(target_elements, source_elements[source_elements > 0])
    assert np.array_equal(copied, np.where(in_both, target_elements, 0))
    assert size_without_padding(target, full_shape) == np.count_nonzero(target_elements)


@given(st.data())
def test_boxes_tile_a_piece(data):
    """In order and without gaps; at most two partial rows per dim and one box of full rows."""
    full_shape = data.draw(shapes())
    piece = data.draw(pieces_of(full_shape))
    box_list = list(boxes(piece))
    assert len(box_list) <= max(1, 2 * len(full_shape) - 1)
    end = 0
    for box in box_list:
        assert box.offset == end and math.prod(box.shape) > 0
        end += math.prod(box.shape)
    assert end == piece.last - piece.first


def test_a_full_tensor_is_one_box():
    assert [box.shape for box in boxes(Piece.full((3, 4, 5)))] == [(3, 4, 5)]
    assert [box.shape for box in boxes(Piece.full(()))] == [()]


@given(st.data())
def test_a_region_is_contiguous_exactly_when_its_indices_are(data):
    """Else a rank would copy element by element what it could read at once."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    ends = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape]
    region = Region(data.draw(st.integers(0, 9)), shape, tuple(slice(*pair) for pair in ends))
    indices = region.offset + np.arange(math.prod(shape)).reshape(shape)[region.slices or ...].reshape(-1)
    is_contiguous = bool((np.diff(indices) == 1).all())
    assert region.contiguous == ((indices[0], indices[-1] + 1) if is_contiguous else None)


def test_a_full_piece_is_one_box():
    (box,) = boxes(Piece.full((3, 4)))
    assert (box.offset, box.lower, box.upper) == (0, (0, 0), (3, 4))
