"""Windows with a loss mask: S + 1 tokens, then S + 1 flags, for S = seq_len.

A flag says whether its token is in the loss (as the label of the token before it), whether a document begins with it,
and whether it is padding. Documents are explicit here, because a conversation may have EOS after each turn, and
end-of-turn tokens have to be in the loss even if they are EOS: neither could be computed from the tokens alone. A
document that does not begin in its window does not occur (prepare/packing.py), and its first token is never in the
loss: it would be predicted from another document. Padding is a document of its own.

Decisions: DATA-21.
"""

import numpy as np

from mythos_dist.data.manifest import SplitCounts

IN_LOSS, FIRST, PADDING = 1, 2, 4  # bits of a flag
IGNORED = -100  # PyTorch's ignore_index


def labels_of(tokens: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Tokens and flags (..., S + 1) -> int64 labels (..., S): the next token where it is in the loss, else IGNORED."""
    return np.where(flags[..., 1:] & IN_LOSS, tokens[..., 1:].astype(np.int64), IGNORED)


def documents_of(flags: np.ndarray) -> np.ndarray:
    """Flags (..., S) -> int32 (..., S): the index of each token's document in its window, from 0."""
    return np.cumsum((flags & FIRST) > 0, axis=-1, dtype=np.int32) - 1


def count_chat_windows(windows: np.ndarray) -> SplitCounts:
    """The counts of windows (N, 2 * (S + 1))."""
    flags = windows.reshape(len(windows), 2, -1)[:, 1]
    padding = int(np.count_nonzero(flags & PADDING))
    return SplitCounts(
        documents=int(np.count_nonzero((flags & (FIRST | PADDING)) == FIRST)),
        tokens=flags.size - padding,
        windows=len(windows),
        tokens_written=flags.size,
        tokens_dropped=0,
        eos_dropped=0,
        learnt=int(np.count_nonzero(flags & IN_LOSS)),
        padding=padding,
    )
