"""The API in this process, on a port of its own, with an engine whose text is known in advance."""

import contextlib
import socket
import threading
from types import SimpleNamespace

from mythos_dist.generate.text import TextStream
from mythos_dist.serve.app import build_app
from mythos_dist.serve.command import LOOPBACK_NAMES, Server
from mythos_dist.serve.engine_thread import EngineThread
from mythos_dist.serve.metrics import ServerMetrics
from mythos_dist.serve.protocol import TimedProtocol
from mythos_dist.serve.service import Service

CONTEXT = 64
LOOPS = 3  # where a request names none


class Parrot:
    """An engine that repeats the prompt, token by token, until max_new_tokens or a stop string.

    `pace`: a semaphore of which each step takes one; None: as fast as possible. `failures`: exceptions that the next
    calls of `step` raise.
    """

    def __init__(self, tokenizer, max_batch=4):
        self.tokenizer, self.max_batch = tokenizer, max_batch
        self.pace, self.failures, self.requests = None, [], []
        self.submitted, self.cancelled, self.batch_sizes = [], [], []

    def submit(self, prompt, sampling):
        request = SimpleNamespace(
            prompt=list(prompt), sampling=sampling, tokens=[], text="", finish_reason=None, logprobs=[], loops=[],
            stream=TextStream(self.tokenizer.decode, prompt, sampling.stop),
        )  # fmt: skip
        self.requests.append(request)
        self.submitted.append(request)
        return request

    def cancel(self, request):
        self.requests.remove(request)
        self.cancelled.append(request)
        request.finish_reason = "cancelled"

    def step(self):
        if self.failures:
            raise self.failures.pop()
        if self.pace is not None and not self.pace.acquire(timeout=0.05):
            return []
        batch = self.requests[: self.max_batch]
        self.batch_sizes.append(len(batch))
        for request in batch:
            self._extend(request)
        self.requests = [request for request in self.requests if request.finish_reason is None]
        return batch

    def _extend(self, request):
        sampling = request.sampling
        request.tokens.append(request.prompt[len(request.tokens) % len(request.prompt)])
        request.loops.append(sampling.n_loops)
        request.stream.add(request.tokens[-1])
        if len(request.tokens) == sampling.max_new_tokens:
            request.finish_reason = "length"
        if request.stream.stopped:
            request.finish_reason = "stop"
        request.text = request.stream.full_text if request.finish_reason else request.stream.text


def parrot_service(tokenizer, renderer=None, *, context=CONTEXT, max_batch=4, max_sequences=8, **changes):
    """A service whose engine is a Parrot; also the Parrot."""
    parrot, metrics = Parrot(tokenizer, max_batch), ServerMetrics()
    model = SimpleNamespace(
        config=SimpleNamespace(max_seq_len=context, vocab_size=tokenizer.vocab_size),
        recurrent=SimpleNamespace(act=SimpleNamespace(mode="off")),
    )
    fields = dict(
        name="parrot", created=1, model=model, n_loops=LOOPS, tokenizer=tokenizer, renderer=renderer,
        engine=EngineThread(parrot, metrics, max_sequences), metrics=metrics, hosts=LOOPBACK_NAMES,
    )  # fmt: skip
    return Service(**{**fields, **changes}), parrot


@contextlib.contextmanager
def serving(service, protocol=TimedProtocol):
    """Yield the URL of a server that ends with the context."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        build_app(service), http=protocol, lifespan="on", log_level="critical", timeout_graceful_shutdown=1
    )
    server = Server(config, "")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
