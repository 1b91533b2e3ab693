"""Packing against the plainest reference: one list of all tokens, sliced."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.data.pack import Packer, document_ids, pack

EOS = 2
DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=40), max_size=12)


@given(documents=DOCUMENTS, seq_len=st.integers(1, 50))
def test_windows_are_slices_of_the_joined_documents(documents, seq_len):
    joined = [token for document in documents for token in [*document, EOS]]
    whole = len(joined) // (seq_len + 1)
    expected = [joined[i * (seq_len + 1) : (i + 1) * (seq_len + 1)] for i in range(whole)]
    windows = pack((np.array(document, dtype=np.int32) for document in documents), seq_len, EOS)
    assert [window.tolist() for window in windows] == expected


@given(documents=DOCUMENTS, seq_len=st.integers(1, 50))
def test_no_token_is_lost_or_made_up(documents, seq_len):
    """tokens + an EOS per document = written + still pending, after every document."""
    packer = Packer(seq_len, EOS)
    added = written = 0
    for document in documents:
        added += len(document) + 1
        written += packer.add(np.array(document, dtype=np.int32)).size
        assert added == written + packer.pending
        assert packer.pending <= seq_len


def test_a_window_needs_a_token():
    with pytest.raises(ValueError, match="seq_len=0"):
        list(pack([np.array([5])], 0, EOS))


@given(rows=st.lists(st.lists(st.sampled_from([EOS, 5, 6]), min_size=6, max_size=6), min_size=2, max_size=4))
def test_document_ids_count_the_documents_that_ended_before(rows):
    tokens = np.array(rows).reshape(len(rows), 2, 3)
    expected = [[[row[:i].count(EOS) for i in range(len(row))] for row in pair] for pair in tokens.tolist()]
    ids = document_ids(tokens, EOS)
    assert ids.tolist() == expected
    assert ids.dtype == np.int32


def test_an_eos_belongs_to_the_document_it_ends():
    assert document_ids(np.array([5, EOS, EOS, 6, 7, EOS]), EOS).tolist() == [0, 0, 1, 2, 2, 2]
