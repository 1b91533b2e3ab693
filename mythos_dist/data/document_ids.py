"""The document of each token in a sequence, computed from the EOS tokens.

Documents are concatenated, each followed by EOS, and divided into sequences w of seq_len + 1 tokens: inputs are w[:-1]
and labels w[1:]. Nothing is padded and sequences do not overlap, so each token is trained on once per epoch. Text must
therefore never encode to EOS (tokenizer.py).
"""

import numpy as np


def document_ids(tokens: np.ndarray, eos: int, begins: np.ndarray | None = None) -> np.ndarray:
    """Index of each token's document in its sequence, from 0; an EOS belongs to the document that it ends.

    (..., S) -> int32 (..., S). A document that continues from the previous sequence is document 0.
    begins: bool (..., S), tokens that begin a document without an EOS before them.
    """
    starts = np.zeros(tokens.shape, bool)
    starts[..., 1:] = tokens[..., :-1] == eos
    if begins is not None:
        starts[..., 1:] |= begins[..., 1:]
    return np.cumsum(starts, axis=-1, dtype=np.int32)
