"""Response objects of both endpoints, complete or as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mythos_dist.serve.engine_thread import Delta, Generation
from mythos_dist.serve.errors import ApiError
from mythos_dist.serve.logprobs import TokenTexts, of_chat, of_completion

Parts = AsyncIterator[tuple[int, Delta]]  # of choices by index, in the order in which they come


class CompletionFormat:
    """Choices of /v1/completions; a part of a stream has the fields of a complete choice."""

    prefix, object, part_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts, with_logprobs: bool):
        self._texts, self._with_logprobs = texts, with_logprobs

    def choice(self, delta: Delta, characters: int = 0) -> dict[str, Any]:
        """characters: of the tokens in earlier parts of the choice."""
        logprobs = of_completion(self._texts, delta.logprobs, characters) if self._with_logprobs else None
        return {"text": delta.text, "logprobs": logprobs}

    part = choice

    def first_part(self) -> dict[str, Any] | None:
        """Precedes the parts of a choice; there is none."""
        return None

    def characters(self, delta: Delta) -> int:
        """The sum of the lengths of its tokens, which `text_offset` counts."""
        return sum(len(self._texts[entry.token]) for entry in delta.logprobs) if self._with_logprobs else 0


class ChatFormat:
    """Choices of /v1/chat/completions: a message, or in a stream its increments."""

    prefix, object, part_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, with_logprobs: bool):
        self._texts, self._with_logprobs = texts, with_logprobs

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A complete one."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(delta)}

    def part(self, delta: Delta, characters: int) -> dict[str, Any]:
        """An increment."""
        return {"delta": {"content": delta.text} if delta.text else {}, "logprobs": self._logprobs(delta)}

    def first_part(self) -> dict[str, Any] | None:
        """The role precedes the text."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def characters(self, delta: Delta) -> int:
        """Chat has no offsets."""
        return 0

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return of_chat(self._texts, delta.logprobs) if self._with_logprobs and delta.tokens else None


Format = CompletionFormat | ChatFormat


@dataclass
class Response:
    """A response in the making."""

    format: Format
    model: str
    prompt_tokens: int
    choices: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970
    completion_tokens: int = 0
    loops: int = 0  # of all generated tokens together

    async def complete(self, parts: Parts) -> dict[str, Any]:
        """The response when all parts have come."""
        received: list[list[Delta]] = [[] for _ in range(self.choices)]
        async for index, delta in parts:
            received[index].append(delta)
            self._count(delta)
        choices = []
        for index, deltas in enumerate(received):
            delta = _joined(deltas)
            choices.append({"index": index, **self.format.choice(delta), **_ending(delta)})
        return {**self._head(self.format.object), "choices": choices, "usage": self._usage()}

    async def events(self, parts: Parts, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, one per part; the last but one has the usage if that was asked for."""
        characters = [0] * self.choices
        usage = {"usage": None} if include_usage else {}
        try:
            for index in range(self.choices):
                if first := self.format.first_part():
                    yield self._event([{"index": index, **first, "finish_reason": None}], usage)
            async for index, delta in parts:
                self._count(delta)
                part = self.format.part(delta, characters[index])
                characters[index] += self.format.characters(delta)
                yield self._event([{"index": index, **part, **_ending(delta)}], usage)
            if include_usage:
                yield self._event([], {"usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status has been sent already
            yield f"data: {json.dumps(error.body)}\n\n"

    def _event(self, choices: Sequence[Any], usage: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self._head(self.format.part_object), 'choices': choices, **usage})}\n\n"

    def _head(self, object: str) -> dict[str, Any]:
        return {
            "id": self.format.prefix + self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _count(self, delta: Delta) -> None:
        self.completion_tokens += len(delta.tokens)
        self.loops += sum(delta.loops)

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "loops": self.loops,
        }


def _joined(deltas: Sequence[Delta]) -> Delta:
    """One delta of all."""
    return Delta(
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.tokens],
        [entry for delta in deltas for entry in delta.logprobs],
        [loops for delta in deltas for loops in delta.loops],
        next((delta.finish_reason for delta in deltas if delta.finish_reason), None),
    )


def _ending(delta: Delta) -> dict[str, Any]:
    """`loops`: used per new token, not OpenAI's."""
    return {"finish_reason": delta.finish_reason, "loops": delta.loops}


class EventStream(StreamingResponse):
    """Server-sent events of a generation, which is cancelled when its client is gone."""

    def __init__(self, events: AsyncIterator[str], generation: Generation):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # a proxy must not collect the events
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As of StreamingResponse."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()
