"""Conversations in JSON lines, as documents: a document's text is the JSON list of its rendered pieces.

They are rendered where their line is read, so that an error names the line. All that holds for documents holds for
them: duplicates, scores, the hash that decides which are held out, resuming.
"""

import json

import numpy as np

from mythos_dist.data.chat import ChatRenderer, TextSpan, encode, messages_of
from mythos_dist.data.loss_mask import FIRST, IN_LOSS
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.prepare.lines import BLANK, NOT_JSON_LINES, LineText, load_json, parse_score_of


def parse_conversation(line: bytes | bytearray, renderer: ChatRenderer, score_key: str | None) -> LineText | None:
    """The conversation in a JSON line; None if the line is blank. Raises ValueError with the problem."""
    record = load_json(line)
    if record is BLANK:
        return None
    if isinstance(record, list):
        raise ValueError(f"is a list, not a conversation; {NOT_JSON_LINES}")
    pieces = renderer.pieces(messages_of(record))
    text = json.dumps(pieces, ensure_ascii=False).encode("utf-8", "mythos_dist.invalid")
    return LineText(text, parse_score_of(record, score_key))


def tokens_and_flags(text: bytes, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The document `text` as tokens, int32 (n,), and flags (data/loss_mask.py), int32 (n,)."""
    tokens, in_loss = encode(tokenizer, [TextSpan(*piece) for piece in json.loads(text)])
    flags = np.where(in_loss, IN_LOSS, 0).astype(np.int32)
    flags[:1] = FIRST  # not IN_LOSS: no token of the conversation precedes it
    return tokens, flags


def fit(flags: np.ndarray, size: int) -> int:
    """How many tokens of a conversation are kept in a window of `size` tokens: of the first `size`, up to the last one
    in the loss; 0: none of those is."""
    in_loss = np.flatnonzero(flags[:size] & IN_LOSS)
    return int(in_loss[-1]) + 1 if len(in_loss) else 0
