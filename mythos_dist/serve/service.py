"""A model as the API sees it: names, limits, and requests turned into prompts and sampling settings."""

import asyncio
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mythos_dist.data.chat import ChatRenderer, Message
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.generate.chat import prompt_tokens
from mythos_dist.generate.sampling import Sampling, request_errors
from mythos_dist.model.mythos import Mythos
from mythos_dist.serve.engine_thread import EngineThread
from mythos_dist.serve.errors import ApiError, context_exceeded, invalid, model_not_found
from mythos_dist.serve.logprobs import TokenTexts
from mythos_dist.serve.metrics import ServerMetrics
from mythos_dist.serve.requests import ChatBody, CompletionBody, GenerationBody

_SEEDS = 1 << 63


@dataclass(frozen=True)
class Limits:
    """What one client may ask for."""

    body_bytes: int = 4 << 20
    body_seconds: float = 30  # to send a request's body


@dataclass(frozen=True)
class Service:
    """A served model.

    `tokenizer` must not be the engine's: the engine decodes in another thread, and a Hugging Face tokenizer cannot be
    used by two threads while its treatment of special tokens is switched (SERVE-2).
    """

    name: str
    created: int  # seconds since 1970
    model: Mythos
    n_loops: int  # where a request names none
    tokenizer: Tokenizer
    renderer: ChatRenderer | None  # None: the model has no chat template
    engine: EngineThread
    metrics: ServerMetrics
    limits: Limits = Limits()
    key: str | None = None  # None: no authentication
    hosts: tuple[str, ...] = ()  # accepted Host headers, without port; (): any
    texts: TokenTexts = field(init=False)
    # One thread: the tokenizer is not thread-safe, and long texts must not block the event loop.
    _encoder: ThreadPoolExecutor = field(init=False, default_factory=lambda: ThreadPoolExecutor(1, "encoder"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", TokenTexts(self.tokenizer))

    @property
    def max_seq_len(self) -> int:
        """The most tokens that a prompt and what is generated can have together."""
        return self.model.config.max_seq_len

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) for another name than this model's."""
        if name != self.name:
            raise model_not_found(name)

    async def completion_prompts(self, body: CompletionBody) -> list[list[int]]:
        """Token ids of each prompt. Raises ApiError."""
        return await self._in_encoder(self._completion_prompts, body)

    async def chat_prompt(self, body: ChatBody) -> list[int]:
        """Token ids of the conversation, up to the beginning of an answer. Raises ApiError."""
        return await self._in_encoder(self._chat_prompt, body)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of a prompt that was given as token ids."""
        return await self._in_encoder(self.tokenizer.decode, tokens)

    async def _in_encoder(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function, *arguments)

    def _completion_prompts(self, body: CompletionBody) -> list[list[int]]:
        prompts = []
        for prompt in body.prompt:
            tokens = self.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
            tokens = tokens or [self.tokenizer.eos_id]  # a document begins after the end of another
            if len(tokens) + body.max_tokens > self.max_seq_len:
                raise context_exceeded(len(tokens), body.max_tokens, self.max_seq_len, "prompt")
            prompts.append(tokens)
        return prompts

    def _chat_prompt(self, body: ChatBody) -> list[int]:
        if self.renderer is None:
            raise ApiError("this model has no chat template; start the server with --template, or use /v1/completions")
        roles = {"developer": "system"}
        messages: list[Message] = [
            {"role": roles.get(one.role, one.role), "content": one.content} for one in body.messages
        ]
        try:
            prompt = prompt_tokens(self.tokenizer, self.renderer, messages)
        except UserError as error:
            raise ApiError(str(error), param="messages") from None
        new = self._chat_limit(body) or 1
        if len(prompt) + new > self.max_seq_len:
            raise context_exceeded(len(prompt), new, self.max_seq_len, "messages")
        return prompt

    def choices(self, body: GenerationBody, prompts: Sequence[Sequence[int]]) -> list[tuple[Sequence[int], Sampling]]:
        """`n` for each prompt. Raises ApiError for settings that this model cannot have."""
        choices = [(prompt, self._sampling(body, prompt, i)) for prompt in prompts for i in range(body.n)]
        mode = self.model.recurrent.act.mode
        errors = [request_errors(self.model.config, mode, self.tokenizer, *choice) for choice in choices]
        if problems := list(dict.fromkeys(problem for one in errors for problem in one)):
            raise invalid([(None, problem) for problem in problems])
        return choices

    def _sampling(self, body: GenerationBody, prompt: Sequence[int], choice: int) -> Sampling:
        """The settings for choice number `choice` of a prompt. Each choice has a seed of its own."""
        seed = secrets.randbelow(_SEEDS) if body.seed is None else (body.seed + choice) % _SEEDS
        if isinstance(body, ChatBody):
            assert self.renderer is not None
            new = self._chat_limit(body) or self.max_seq_len - len(prompt)
            ends = {self.tokenizer.special_tokens[self.renderer.end_of_turn()], self.tokenizer.eos_id}
            logprobs = max(1, body.top_logprobs) if body.logprobs else 0
        else:
            assert isinstance(body, CompletionBody)
            new, ends, logprobs = body.max_tokens, {self.tokenizer.eos_id}, requested_logprobs(body) or 0
        return Sampling(
            max_new_tokens=new,
            n_loops=body.loops or self.n_loops,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            seed=seed,
            stop=tuple(body.stop),
            stop_tokens=tuple(sorted(ends)),
            exit=body.exit,
            exit_threshold=body.exit_threshold,
            logprobs=logprobs,
        )

    def _chat_limit(self, body: ChatBody) -> int | None:
        """Tokens of an answer at most; None: as many as the context has."""
        return body.max_completion_tokens or body.max_tokens


def requested_logprobs(body: CompletionBody) -> int | None:
    """How many alternatives the engine has to return; None: no log-probabilities. `logprobs: 0` asks for the chosen
    tokens' alone, for which the engine needs one alternative."""
    return None if body.logprobs is None else max(1, body.logprobs)
