"""The document of each token in a window, computed from the EOS tokens.

Documents are concatenated, each followed by EOS, and divided into windows of seq_len + 1 tokens: inputs are w[:-1] and
labels w[1:]. Nothing is padded and windows do not overlap, so each token is trained on once per epoch. Text must
therefore never encode to EOS (tokenizer.py).
"""

import numpy as np


def document_ids(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Index of each token's document in its window, from 0; an EOS belongs to the document that it ends.

    (..., S) -> int32 (..., S). A document that continues from the previous window is document 0.
    """
    is_eos = tokens == eos
    return np.cumsum(is_eos, axis=-1, dtype=np.int32) - is_eos.astype(np.int32)
