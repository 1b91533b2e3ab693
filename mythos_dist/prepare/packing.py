"""Pack conversations into windows of one length; none is divided.

A conversation goes into the fullest of the last OPEN_WINDOWS windows that has room for it, or begins a new one; if too
many are open, the fullest is padded and written. The windows that are open at the end of a part are emptied and their
conversations packed with those of other parts, in order, so that ten thousand small files need no more padding than
one large file.

Decisions: DATA-20.
"""

import numpy as np

from mythos_dist.data.loss_mask import FIRST, PADDING
from mythos_dist.prepare.mds import ShardWriter

OPEN_WINDOWS = 64


class WindowPacker:
    """Packs conversations, arrays (2, n) of tokens and flags (data/loss_mask.py), into windows (2, seq_len + 1)."""

    def __init__(self, writer: ShardWriter, seq_len: int, pad_id: int):
        """`writer`: of windows of 2 * (seq_len + 1) values. `pad_id`: the token of padding."""
        self._writer, self._size, self._pad_id = writer, seq_len + 1, pad_id
        self._open: list[list[np.ndarray]] = []  # oldest first

    def add(self, conversation: np.ndarray) -> None:
        """Append a conversation of 1 to seq_len + 1 tokens, in the shards' dtype."""
        length = conversation.shape[1]
        assert 0 < length <= self._size, f"{length} tokens do not fit a window of {self._size}"
        window = max((one for one in self._open if _length(one) + length <= self._size), key=_length, default=None)
        if window is None:
            window = []
            self._open.append(window)
        window.append(conversation)
        fullest = max(self._open, key=_length)
        if _length(fullest) == self._size or len(self._open) > OPEN_WINDOWS:
            self._write(fullest)

    def finish(self) -> None:
        """Pad and write the open windows."""
        while self._open:
            self._write(self._open[0])

    def take_open(self) -> np.ndarray:
        """The conversations of the open windows, (2, tokens), instead of `finish`; `split_conversations` separates
        them again."""
        conversations = [one for window in self._open for one in window]
        self._open = []
        return np.concatenate([np.empty((2, 0), self._writer.dtype), *conversations], axis=1)

    def _write(self, window: list[np.ndarray]) -> None:
        self._open = [one for one in self._open if one is not window]
        padding = np.empty((2, self._size - _length(window)), self._writer.dtype)
        padding[0], padding[1] = self._pad_id, PADDING
        padding[1, :1] |= FIRST
        self._writer.add(np.concatenate([*window, padding], axis=1).ravel())


def split_conversations(conversations: np.ndarray) -> list[np.ndarray]:
    """The conversations in an array (2, tokens), each (2, n)."""
    starts = np.flatnonzero(conversations[1] & FIRST)
    return np.split(conversations, starts[1:], axis=1) if len(starts) else []


def _length(window: list[np.ndarray]) -> int:
    return sum(one.shape[1] for one in window)
