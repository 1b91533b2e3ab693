"""Conversations with a model, encoded as in training (data/chat.py)."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mythos_dist.data.chat import ChatRenderer, Message, encode
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.sampling import Sampling
from mythos_dist.generate.text import TextStream
from mythos_dist.model.mythos import Mythos


class Chat:
    """A conversation: `stream` and `answer` append the user's message and the model's."""

    def __init__(
        self,
        engine: DecodingEngine,
        tokenizer: Tokenizer,
        renderer: ChatRenderer,
        *,
        system: str | None = None,
        max_new_tokens: int = 100,
        seed: int = 0,
        **sampling: Any,
    ):
        """`system`: the first message. `max_new_tokens`: of an answer. `seed`: of the answers' seeds. `sampling`:
        further fields of `Sampling`."""
        self._engine, self._tokenizer, self._renderer = engine, tokenizer, renderer
        self._max_new_tokens, self._sampling, self._seeds = max_new_tokens, sampling, random.Random(seed)
        self._end = tokenizer.special_tokens[renderer.end_of_turn()]
        self._system: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self._turns: list[Message] = []  # of the user and the model
        self.forgotten = 0  # turns that no longer fit into the context

    def answer(self, text: str) -> str:
        """The model's answer to `text`, as `stream`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """The model's answer to `text`, piece by piece as it is made. The oldest turns are forgotten where the context
        is too short for all. An answer that is not read to its end is not part of the conversation.

        Raises UserError if `text` alone is too long, or contains the text of a special token.
        """
        turns: list[Message] = [*self._turns, {"role": "user", "content": text}]
        prompt = prompt_tokens(self._tokenizer, self._renderer, [*self._system, *turns])
        longest, forgotten = self._engine.max_seq_len, 0
        while len(turns) > 1 and len(prompt) + self._max_new_tokens > longest:
            turns, forgotten = turns[2:], forgotten + 1
            prompt = prompt_tokens(self._tokenizer, self._renderer, [*self._system, *turns])
        if len(prompt) >= longest:
            raise UserError(
                f"the message takes {len(prompt)} tokens, and the context has {longest}; shorten it to leave room for "
                "an answer"
            )
        new = min(self._max_new_tokens, longest - len(prompt))
        # Its text is that of its tokens alone, as it is encoded in the next prompt.
        stream, pieces = TextStream(self._tokenizer.decode), []
        for token in self._tokens(prompt, new):
            if token != self._end:
                stream.add(token)
                if piece := stream.text[sum(map(len, pieces)) :]:
                    pieces.append(piece)
                    yield piece
        self._turns = [*turns, {"role": "assistant", "content": stream.text}]
        self.forgotten += forgotten

    def _tokens(self, prompt: Sequence[int], new: int) -> Iterator[int]:
        """The tokens of an answer, as they come."""
        seed = self._seeds.getrandbits(62)
        sampling = Sampling(max_new_tokens=new, stop_tokens=(self._end,), seed=seed, **self._sampling)
        request, done = self._engine.submit(prompt, sampling), 0
        try:
            while request.finish_reason is None:
                self._engine.step()
                yield from request.tokens[done:]
                done = len(request.tokens)
        finally:
            self._engine.cancel(request)  # does nothing to a finished one


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
