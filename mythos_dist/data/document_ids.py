"""Which document a token belongs to. Not stored: it follows from EOS alone.

Documents are joined, each followed by EOS, and cut into disjoint windows of seq_len + 1 tokens: inputs are w[:-1] and
labels w[1:]. Nothing is padded and nothing overlaps, so a token is trained on once an epoch. EOS must therefore never
come out of text (tokenizer.py).
"""

import numpy as np


def document_ids(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Which document of its window each token is in, from 0; an EOS belongs to the document it ends.

    (..., S) -> int32 (..., S). A document cut by a window's start counts as that window's document 0.
    """
    is_eos = tokens == eos
    return np.cumsum(is_eos, axis=-1, dtype=np.int32) - is_eos.astype(np.int32)
