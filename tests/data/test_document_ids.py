"""Document ids against a count of EOS tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.data.sequences import document_ids

EOS = 2


@given(rows=st.lists(st.lists(st.sampled_from([EOS, 5, 6]), min_size=6, max_size=6), min_size=2, max_size=4))
def test_document_id_is_the_number_of_eos_tokens_before(rows):
    tokens = np.array(rows).reshape(len(rows), 2, 3)
    expected = [[[row[:i].count(EOS) for i in range(len(row))] for row in pair] for pair in tokens.tolist()]
    ids = document_ids(tokens, EOS)
    assert ids.tolist() == expected
    assert ids.dtype == np.int32


def test_an_eos_belongs_to_the_document_that_it_ends():
    assert document_ids(np.array([5, EOS, EOS, 6, 7, EOS]), EOS).tolist() == [0, 0, 1, 2, 2, 2]
