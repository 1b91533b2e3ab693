"""Decoding of many requests at once: they join and leave the batch between tokens (continuous batching, Orca 2022).

A request takes a row of the cache when one is free. Its prompt is prefilled together with other waiting prompts of the
same length, in chunks between the tokens of other rows, so that a long prompt does not hold them up (chunked prefill,
Sarathi-Serve 2024); then its tokens go through the loops beside those of other rows, which may be at other loops
(generate/depth_batch.py). What a request gets does not depend on the other rows, beyond the rounding of products.

The trap: rows that are decoded are the first of the cache, and the last of them takes the place of one that leaves. So
prompts are prefilled in the last rows of the cache, and are moved next to the others when they are complete.

Decisions: DECODE-4, DECODE-8.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.generate.depth_batch import DepthBatch, RowLoops
from mythos_dist.generate.sampling import (
    Sampling,
    TokenLogprob,
    check_finite,
    choose_token,
    request_errors,
    token_logprob,
)
from mythos_dist.generate.text import TextStream
from mythos_dist.model.decode import prefill
from mythos_dist.model.kv_cache import KVCache
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.transposed import TransposedWeights

# Tokens of prompts that are prefilled together.
PREFILL_TOKENS = 4096


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it so far."""

    prompt: list[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)  # with the stop token, if one ended it
    text: str = ""  # whole characters, without stop strings and their beginnings; "" without a tokenizer
    finish_reason: str | None = None  # stop, length or cancelled
    logprobs: list[TokenLogprob] = field(default_factory=list)  # per token, if asked for
    loops: list[int] = field(default_factory=list)  # that each token's logits took


class RunningRequest:
    """A request that is being decoded."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self.request = request
        self.draw = random.Random(request.sampling.seed)
        self._stream = None
        if tokenizer is not None:
            self._stream = TextStream(tokenizer.decode, request.prompt, request.sampling.stop)

    def add(self, token: int, loops: int) -> None:
        """Append a token, and decide whether the request is finished."""
        request, sampling, stream = self.request, self.request.sampling, self._stream
        request.tokens.append(token)
        request.loops.append(loops)
        if token in sampling.stop_tokens:
            request.finish_reason = "stop"
        elif stream is not None:
            stream.add(token)
            if stream.stopped:
                request.finish_reason = "stop"
        if request.finish_reason is None and len(request.tokens) == sampling.max_new_tokens:
            request.finish_reason = "length"
        if stream is not None:
            request.text = stream.text if request.finish_reason is None else stream.full_text


@dataclass
class PrefillBatch:
    """Prompts of one length that are being prefilled, in the last rows of the cache."""

    requests: list[Request]
    ids: Tensor  # (B, S)
    n_loops: int
    done: int = 0  # tokens of each that are in the cache

    def next_chunk(self, tokens: int) -> Tensor:
        """The next up to `tokens` tokens of each prompt (B, <= tokens)."""
        return self.ids[:, self.done : self.done + tokens]


class DecodingEngine:
    """Decodes submitted requests, `max_batch` at a time, on one process. Not thread-safe.

    >>> from mythos_dist import DecodingEngine, Sampling, load_trained
    >>> trained = load_trained("runs/first")
    >>> engine = DecodingEngine(trained.model, trained.tokenizer, n_loops=2, max_batch=8)
    >>> prompt = trained.tokenizer.encode("The").tolist()
    >>> request = engine.submit(prompt, Sampling(max_new_tokens=5, temperature=0))
    >>> engine.run()  # or step by step: request.text grows
    >>> len(request.tokens), request.finish_reason
    (5, 'length')
    """

    def __init__(
        self,
        model: Mythos,
        tokenizer: Tokenizer | None,
        *,
        n_loops: int,
        max_batch: int,
        cache: str = "all",
        prefill_chunk: int = 512,
        copy_weights: bool = True,
    ):
        """Puts the model into eval mode. n_loops: of requests that do not set it. cache: see model/kv_cache.py.
        prefill_chunk: prompt tokens per pass of each prompt, and in all between two tokens of other requests.
        copy_weights: on a CPU in fp32, keep transposed copies of a third of the experts' weights (model/transposed.py),
        which are faster; the weights must then not change while the engine is used. Raises UserError for an unknown
        cache."""
        self._model, self._tokenizer = model.eval(), tokenizer
        self._n_loops, self._max_batch, self._prefill_chunk = n_loops, max_batch, prefill_chunk
        self._cache = KVCache(rows=max_batch, mode=cache)
        self._transposed = TransposedWeights(model, copy_weights)
        self._batch = DepthBatch(model, self._cache)
        self._rows: list[RunningRequest] = []  # by cache row
        self._waiting: deque[Request] = deque()
        self._prefilling: PrefillBatch | None = None
        self._empty: list[Request] = []  # finished without a token

    @property
    def max_seq_len(self) -> int:
        """The most tokens that a prompt and what is generated can have together."""
        return self._model.config.max_seq_len

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Add a request; `step` works on it. Raises UserError with all problems."""
        request = Request(list(prompt), sampling)
        mode = self._model.recurrent.act.mode
        if errors := request_errors(self._model.config, mode, self._tokenizer, request.prompt, sampling):
            raise UserError(errors)
        if sampling.max_new_tokens == 0:
            request.finish_reason = "length"
            self._empty.append(request)
        else:
            self._waiting.append(request)
        return request

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """End a request; of a finished one, does nothing."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "cancelled"
        if request in self._waiting:
            self._waiting.remove(request)
        elif self._prefilling is not None and request in self._prefilling.requests:
            if all(one.finish_reason is not None for one in self._prefilling.requests):
                self._free_prefill_rows()
        else:
            self._remove([next(i for i, row in enumerate(self._rows) if row.request is request)])

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Prefill a chunk of waiting prompts, then run loops until a token of some request is complete.

        Returns the requests with new tokens, or finished without any; [] if there is nothing to do. Raises UserError if
        logits are not finite.
        """
        updated, self._empty = {id(request): request for request in self._empty}, []
        with self._transposed.use():
            updated |= {id(request): request for request in self._prefill()}
            if self._rows:
                updated |= {id(request): request for request in self._decode()}
        return list(updated.values())

    def run(self) -> None:
        """Until all requests are finished."""
        while self.step():
            pass

    def _prefill(self) -> list[Request]:
        """Prefill up to `prefill_chunk` tokens of prompts; while no row is decoded, until a prompt is complete. Returns
        the requests whose first tokens were chosen."""
        new, tokens = [], 0
        while self._prefilling is not None or (self._waiting and len(self._rows) < self._max_batch):
            prompts = self._prefilling = self._prefilling or self._begin_prefill()
            rows, limit = len(prompts.requests), self._prefill_chunk
            chunk = prompts.next_chunk(limit)
            if tokens and tokens + chunk.numel() > limit and self._rows:
                break
            tokens += chunk.numel()
            cache = self._cache.select(range(self._max_batch - rows, self._max_batch))
            seeds = [noise_seed(request, 0) for request in prompts.requests]
            logits = prefill(self._model, chunk, prompts.n_loops, cache, chunk.shape[1], seeds)
            prompts.done += chunk.shape[1]
            if prompts.done == prompts.ids.shape[1]:
                new += self._finish_prefill(prompts, logits)
        return new

    def _begin_prefill(self) -> PrefillBatch:
        """The first waiting prompt, and those after it of the same length and loops: beside rows that are decoded, so
        many that a chunk of all has at most `prefill_chunk` tokens."""
        first = self._waiting[0]
        length = len(first.prompt)
        # Chunks end at multiples of prefill_chunk whatever else is decoded: with loops that share cache entries, a
        # prompt's entries depend on where its chunks end.
        most = self._prefill_chunk // min(length, self._prefill_chunk) if self._rows else PREFILL_TOKENS // length
        most = min(self._max_batch - len(self._rows), max(1, most))
        n_loops, new = self._loops_of(first), []
        while self._waiting and len(new) < most and len(self._waiting[0].prompt) == length:
            if self._loops_of(self._waiting[0]) != n_loops:
                break
            new.append(self._waiting.popleft())
        ids = torch.tensor([request.prompt for request in new], device=self._model.embed.weight.device)
        return PrefillBatch(new, ids, n_loops)

    def _finish_prefill(self, prompts: PrefillBatch, logits: Tensor) -> list[Request]:
        """Move complete prompts after the rows that are decoded, and choose their first tokens from logits (B, V)."""
        first = self._max_batch - len(prompts.requests)
        kept = [i for i, request in enumerate(prompts.requests) if request.finish_reason is None]
        rows = range(len(self._rows), len(self._rows) + len(kept))
        for i, row in zip(kept, rows, strict=True):
            if first + i != row:  # never a row that is still to be moved: they are in order, and row <= first + i
                self._cache.move_row(first + i, row)
            self._rows.append(RunningRequest(prompts.requests[i], self._tokenizer))
            self._batch.rows.append(RowLoops(prompts.n_loops, prompts.requests[i].sampling))
        self._free_prefill_rows()
        self._accept(rows, logits[kept], [prompts.n_loops] * len(kept))
        return [prompts.requests[i] for i in kept]

    def _free_prefill_rows(self) -> None:
        """Free the rows of prompts that are not decoded."""
        lengths = self._cache.lengths
        self._cache.lengths = lengths[: len(self._rows)] + [0] * (len(lengths) - len(self._rows))
        self._prefilling = None

    def _decode(self) -> list[Request]:
        entering = [i for i, row in enumerate(self._batch.rows) if row.index is None]
        if entering:
            requests = [self._rows[i].request for i in entering]
            seeds = [noise_seed(request, len(request.tokens)) for request in requests]
            self._batch.enter(entering, [request.tokens[-1] for request in requests], seeds)
        while not (done := self._batch.advance()):
            pass
        rows = [i for i, _ in done]
        requests = [self._rows[i].request for i in rows]
        logits, loops = self._batch.leave(done)
        self._accept(rows, logits, loops)
        return requests

    def _accept(self, rows: Sequence[int], logits: Tensor, loops: Sequence[int]) -> None:
        """Choose the next token of each of `rows` from logits (rows, V), and free the rows that are finished."""
        check_finite(logits)
        likeliest = logits.argmax(-1).tolist()
        for i, values, best, used in zip(rows, logits, likeliest, loops, strict=True):
            row, request = self._rows[i], self._rows[i].request
            sampling, token = request.sampling, best
            if sampling.temperature > 0 or sampling.repetition_penalty != 1:
                token = choose_token(values, sampling, [*request.prompt, *request.tokens], row.draw)
            row.add(token, used)
            if sampling.logprobs:
                request.logprobs.append(token_logprob(values, token, sampling.logprobs))
        self._remove([i for i in rows if self._rows[i].request.finish_reason is not None])

    def _remove(self, rows: Sequence[int]) -> None:
        for i in sorted(rows, reverse=True):  # the last row takes a freed place: later ones first
            self._batch.remove(i)
            self._rows[i] = self._rows[-1]
            self._rows.pop()

    def _loops_of(self, request: Request) -> int:
        return request.sampling.n_loops or self._n_loops


def noise_seed(request: Request, token: int) -> int:
    """The seed of a token's random initial hidden state (`model.initial_state=random`)."""
    return random.Random(f"{request.sampling.seed} {token}").getrandbits(62)
