"""Documents to windows of one length, and back to document ids. Pure functions on arrays.

Documents are joined, each followed by EOS, and cut into disjoint windows of seq_len + 1 tokens: inputs are w[:-1] and
labels w[1:]. Nothing is padded and nothing overlaps, so a token is trained on once an epoch. Which document a token
belongs to follows from EOS alone and is not stored, so EOS must never come out of text (tokenizer.py).
"""

from collections.abc import Iterable, Iterator

import numpy as np


class Packer:
    """Cuts windows from documents added one by one; `pending` tokens wait for the next document.

    tokens added + one EOS per document == windows * (seq_len + 1) + pending, at any time.
    """

    def __init__(self, seq_len: int, eos: int):
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1")
        self.window = seq_len + 1
        self._eos = np.array([eos], dtype=np.int64)
        self._pending = np.empty(0, dtype=np.int64)

    @property
    def pending(self) -> int:
        """Tokens (with their EOS) that fill no window yet: what is dropped if no document follows."""
        return len(self._pending)

    def add(self, document: np.ndarray) -> np.ndarray:
        """The windows that `document` (tokens,) completes, int64 of shape (windows, seq_len + 1)."""
        tokens = np.concatenate([self._pending, document, self._eos])
        whole = len(tokens) // self.window * self.window
        self._pending = tokens[whole:].copy()  # a view would keep the whole document in memory
        return tokens[:whole].reshape(-1, self.window)


def pack(documents: Iterable[np.ndarray], seq_len: int, eos: int) -> Iterator[np.ndarray]:
    """Join documents, each followed by `eos`, and cut disjoint windows of seq_len + 1 tokens.

    A tail shorter than a window is dropped (`Packer.pending` counts it). Yields int64 of shape (seq_len + 1,).
    Raises ValueError if seq_len < 1.
    """
    packer = Packer(seq_len, eos)
    for document in documents:
        yield from packer.add(document)


def document_ids(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Which document of its window each token is in, from 0; an EOS belongs to the document it ends.

    (..., S) -> int32 (..., S). A document cut by a window's start counts as that window's document 0.
    """
    is_eos = tokens == eos
    return np.cumsum(is_eos, axis=-1, dtype=np.int32) - is_eos.astype(np.int32)
