"""Conversations with a model, encoded as in training (data/chat.py)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from mythos_dist.data.chat import ChatRenderer, Message, encode
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.model.mythos import Mythos


class Chat:
    """A conversation: `answer` appends the user's message and the model's."""

    def __init__(
        self,
        model: Mythos,
        tokenizer: Tokenizer,
        renderer: ChatRenderer,
        *,
        system: str | None = None,
        max_new_tokens: int = 100,
        **sampling: Any,
    ):
        """`system`: the first message. `max_new_tokens`: of an answer; `sampling`: settings of `generate`."""
        self._model, self._tokenizer, self._renderer = model, tokenizer, renderer
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._system: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self._turns: list[Message] = []  # of the user and the model
        self.forgotten = 0  # turns that no longer fit into the context

    def answer(self, text: str) -> str:
        """The model's answer to `text`. The oldest turns are forgotten where the context is too short for all.

        Raises UserError if `text` alone is too long, or contains the text of a special token.
        """
        turns: list[Message] = [*self._turns, {"role": "user", "content": text}]
        prompt = prompt_tokens(self._tokenizer, self._renderer, [*self._system, *turns])
        context, forgotten = self._model.config.max_seq_len, 0
        while len(turns) > 1 and len(prompt) + self._max_new_tokens > context:
            turns, forgotten = turns[2:], forgotten + 1
            prompt = prompt_tokens(self._tokenizer, self._renderer, [*self._system, *turns])
        if len(prompt) >= context:
            raise UserError(
                f"the message takes {len(prompt)} tokens, and the context has {context}; shorten it to leave room for "
                "an answer"
            )
        new = min(self._max_new_tokens, context - len(prompt))
        (answer,) = complete(
            self._model, self._tokenizer, self._renderer, [prompt], max_new_tokens=new, **self._sampling
        )
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        self.forgotten += forgotten
        return answer


def prompt_tokens(tokenizer: Tokenizer, renderer: ChatRenderer, messages: Sequence[Message]) -> list[int]:
    """What a model continues to answer the last of `messages`. Raises UserError if they cannot be rendered."""
    try:
        pieces = renderer.prompt(messages)
    except ValueError as error:
        raise UserError(f"the conversation cannot be continued: {error}") from None
    return encode(tokenizer, pieces)[0].tolist()


def complete(
    model: Mythos, tokenizer: Tokenizer, renderer: ChatRenderer, prompts: Sequence[Sequence[int]], **sampling: Any
) -> list[str]:
    """The answers to `prompts` of `prompt_tokens`, without the end of the turn; `sampling`: settings of `generate`.

    Prompts of equal length are one batch.
    """
    end = tokenizer.special_tokens[renderer.end_of_turn()]
    by_length = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    answers = [""] * len(prompts)
    for length, indices in by_length.items():
        tokens = model.generate(torch.tensor([prompts[i] for i in indices]), stop_token=end, **sampling)
        for i, row in zip(indices, tokens[:, length:].tolist(), strict=True):
            answers[i] = tokenizer.decode(row[: row.index(end)] if end in row else row)
    return answers
