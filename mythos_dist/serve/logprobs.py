"""Log-probabilities as the two endpoints write them."""

import math
from collections.abc import Sequence
from typing import Any

from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.generate.sampling import TokenLogprob

LEAST = -9999.0  # in place of minus infinity, which JSON does not have; OpenAI's value


class TokenTexts:
    """The text of single tokens: what decodes to nothing alone, such as EOS, has its name."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {token: text for text, token in tokenizer.special_tokens.items()}

    def __getitem__(self, token: int) -> str:
        return self._special.get(token) or self._tokenizer.decode([token])


def of_completion(texts: TokenTexts, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Parallel lists, as /v1/completions has them. `offset`: characters of the text before the first token."""
    tokens = [texts[entry.token] for entry in entries]
    offsets = [offset]
    for text in tokens:
        offsets.append(offsets[-1] + len(text))
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        best: dict[str, float] = {}
        for token, value in entry.top:
            best.setdefault(
                texts[token], _finite(value)
            )  # parts of characters have one text; the likeliest comes first
        tops.append(None if math.isnan(entry.logprob) else best)
    return {
        "tokens": tokens,
        "token_logprobs": [None if math.isnan(entry.logprob) else _finite(entry.logprob) for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets[:-1],
    }


def of_chat(texts: TokenTexts, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """An object per token, as /v1/chat/completions has them."""
    content = [
        {
            **_token(texts[entry.token], entry.logprob),
            "top_logprobs": [_token(texts[token], value) for token, value in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
