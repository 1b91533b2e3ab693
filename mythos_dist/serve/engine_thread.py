"""The decoding engine in a thread of its own: sequences of all HTTP requests share its batch.

The event loop puts commands into a queue; the thread carries them out between two steps of the engine and sends what
is new back by `call_soon_threadsafe`. Nothing else touches the engine, which is not thread-safe. Counts of sequences
belong to the event loop, so they need no lock.

Decisions: SERVE-1.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from mythos_dist.errors import UserError
from mythos_dist.generate.engine import DecodingEngine, Request
from mythos_dist.generate.sampling import Sampling, TokenLogprob
from mythos_dist.serve.errors import ApiError, server_error, too_many_requests
from mythos_dist.serve.metrics import ServerMetrics

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Delta(NamedTuple):
    """What a step has added to a sequence."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]  # per token; empty unless asked for
    loops: list[int]  # used per token
    finish_reason: str | None


@dataclass(eq=False)
class _Sequence:
    """A prompt of a generation, and how much of its result has been sent."""

    generation: "Generation"
    index: int
    prompt: Sequence[int]
    sampling: Sampling
    accepted: float  # time.monotonic()
    request: Request | None = None  # of the engine
    tokens: int = 0
    characters: int = 0

    def take_delta(self) -> Delta:
        """What the request has and was not sent yet."""
        request = self.request
        assert request is not None
        text = request.text[self.characters :]
        new = slice(self.tokens, None)
        self.characters += len(text)
        self.tokens = len(request.tokens)
        return Delta(text, request.tokens[new], request.logprobs[new], request.loops[new], request.finish_reason)


def _unavailable() -> ApiError:
    return server_error("the server is stopping, or its engine has failed", 503)


class Generation:
    """The sequences of one HTTP request. Iterate it for (index, Delta); cancel it when its client is gone."""

    def __init__(self, thread: "EngineThread", prompts: Sequence[tuple[Sequence[int], Sampling]]):
        self._thread = thread
        self._arrived: asyncio.Queue[tuple[int, Delta] | ApiError] = asyncio.Queue()
        self._unfinished = len(prompts)
        self._cancelled = False
        accepted = time.monotonic()
        self.sequences = [_Sequence(self, i, *prompt, accepted) for i, prompt in enumerate(prompts)]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Until all sequences are finished. Raises ApiError if one of them fails."""
        while self._unfinished:
            item = await self._arrived.get()
            if isinstance(item, ApiError):
                raise item
            yield item
            self._unfinished -= item[1].finish_reason is not None

    def put(self, item: tuple[int, Delta] | ApiError) -> None:
        """In the event loop: what a step has added, or why there will be nothing more."""
        self._arrived.put_nowait(item)

    def cancel(self) -> None:
        """Free the rows of unfinished sequences. Of a finished generation, and a second time, it does nothing."""
        if self._unfinished and not self._cancelled:
            self._thread.cancel(self)
        self._cancelled = True


class EngineThread:
    """Runs an engine from `start` to `stop`; all methods belong to the event loop that called `start`."""

    def __init__(self, engine: DecodingEngine, metrics: ServerMetrics, max_sequences: int):
        """max_sequences: accepted at a time, those that wait for a row of the batch included."""
        self._engine, self._metrics, self.max_sequences = engine, metrics, max_sequences
        self._accepted = 0
        self._failed = False
        self._stopping = threading.Event()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # The rest belongs to the thread.
        self._running: dict[int, _Sequence] = {}  # by id of the engine's request
        self._functions: deque[Callable[[], None]] = deque()  # of `run`
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def healthy(self) -> bool:
        """Whether the engine takes work."""
        return self._thread.is_alive() and not self._failed

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End after the current step; what is unfinished gets an error."""
        self._stopping.set()
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, prompts: Sequence[tuple[Sequence[int], Sampling]]) -> Generation:
        """Begin to generate. Raises ApiError (429) if there are too many sequences; for no prompts, if one were."""
        self._accept(len(prompts))
        generation = Generation(self, prompts)
        self._commands.put(lambda: self._submit(generation.sequences))
        return generation

    async def run(self, function: Callable[[], Result]) -> Result:
        """The result of a function that uses the model, called between two steps.

        It counts as a sequence but is not refused: its request has been accepted.
        """
        self._accepted += 1
        result: Future[Result] = Future()

        def call() -> None:
            if result.set_running_or_notify_cancel():
                try:
                    if self._failed or self._stopping.is_set():
                        raise _unavailable()
                    result.set_result(function())
                except Exception as error:
                    result.set_exception(error)

        self._commands.put(lambda: self._functions.append(call))
        try:
            return await asyncio.wrap_future(result)
        except UserError as error:
            raise ApiError(str(error)) from None
        finally:
            self._release(1)

    def cancel(self, generation: Generation) -> None:
        """Free the rows of a generation; its unfinished sequences finish as "cancelled"."""
        self._commands.put(lambda: self._cancel(generation))

    def _accept(self, count: int) -> None:
        if count > self.max_sequences:
            raise ApiError(f"the request is for {count} sequences; this server takes at most {self.max_sequences}")
        if not self.healthy or self._stopping.is_set():
            raise _unavailable()
        if self._accepted + max(1, count) > self.max_sequences:
            raise too_many_requests(self.max_sequences)
        self._accepted += count

    def _release(self, count: int) -> None:
        self._accepted -= count

    def _deliver(self, items: Sequence[tuple[_Sequence, Delta | ApiError]]) -> None:
        """In the event loop."""
        for sequence, item in items:
            if isinstance(item, ApiError):
                sequence.generation.put(item)
                self._release(1)
            else:
                sequence.generation.put((sequence.index, item))
                self._release(item.finish_reason is not None)

    # --- in the thread

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._take_commands(wait=not self._running and not self._functions)
                if self._functions:
                    self._functions.popleft()()
                if self._running:
                    self._step()
            except Exception:  # of the engine, outside a step: its state is unknown
                log.exception("the engine has failed; this server generates nothing more")
                self._failed = True
                self._fail_all(_unavailable())
        self._take_commands(wait=False)
        while self._functions:
            self._functions.popleft()()
        self._fail_all(_unavailable())

    def _take_commands(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            command = self._commands.get(block=wait)
            while True:
                command()
                command = self._commands.get_nowait()

    def _submit(self, sequences: Sequence[_Sequence]) -> None:
        for sequence in sequences:
            try:
                if self._failed:
                    raise _unavailable()
                sequence.request = self._engine.submit(sequence.prompt, sequence.sampling)
            except ApiError as error:
                self._send([(sequence, error)])
            except UserError as error:
                self._send([(sequence, ApiError(str(error)))])
            else:
                self._running[id(sequence.request)] = sequence
        self._update_gauges()

    def _cancel(self, generation: Generation) -> None:
        items: list[tuple[_Sequence, Delta | ApiError]] = []
        for sequence in generation.sequences:
            if sequence.request is not None and self._running.pop(id(sequence.request), None):
                self._engine.cancel(sequence.request)
                self._metrics.finished.labels("cancelled").inc()
                items.append((sequence, Delta("", [], [], [], "cancelled")))
        self._send(items)
        self._update_gauges()

    def _step(self) -> None:
        begin = time.monotonic()
        try:
            updated = self._engine.step()
        except Exception as error:  # one bad step must not end the server
            log.exception("a step of the engine has failed")
            message = str(error) if isinstance(error, UserError) else "the engine has failed; the server's log says why"
            self._cancel_all()
            self._fail_all(server_error(message))
            return
        now = time.monotonic()
        self._metrics.step_seconds.observe(now - begin)
        self._metrics.batch_size.observe(len(updated))
        items: list[tuple[_Sequence, Delta | ApiError]] = []
        for request in updated:
            sequence = self._running.get(id(request))
            if sequence is None:
                continue
            if sequence.tokens == 0:
                self._metrics.first_token_seconds.observe(now - sequence.accepted)
            delta = sequence.take_delta()
            items.append((sequence, delta))
            self._count(delta)
            if delta.finish_reason is not None:
                del self._running[id(request)]
        self._send(items)
        self._update_gauges()

    def _count(self, delta: Delta) -> None:
        self._metrics.generated_tokens.inc(len(delta.tokens))
        for loops in delta.loops:
            self._metrics.loops_per_token.observe(loops)
        if delta.finish_reason is not None:
            self._metrics.finished.labels(delta.finish_reason).inc()

    def _update_gauges(self) -> None:
        waiting = sum(sequence.tokens == 0 for sequence in self._running.values())
        self._metrics.queue_length.set(waiting)
        self._metrics.running.set(len(self._running) - waiting)

    def _cancel_all(self) -> None:
        """Empty the engine after a failed step."""
        for sequence in self._running.values():
            assert sequence.request is not None
            self._engine.cancel(sequence.request)

    def _fail_all(self, error: ApiError) -> None:
        self._send([(sequence, error) for sequence in self._running.values()])
        self._running.clear()
        self._update_gauges()

    def _send(self, items: Sequence[tuple[_Sequence, Delta | ApiError]]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: no client is connected
            self._loop.call_soon_threadsafe(self._deliver, items)
