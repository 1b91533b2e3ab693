"""`mythos serve`: load a model, listen, and serve until a signal."""

import argparse
import contextlib
import ipaddress
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from mythos_dist.checkpoint.signature import read_secret
from mythos_dist.data.chat import ChatRenderer
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.trained import Trained, load_trained
from mythos_dist.serve.app import build_app
from mythos_dist.serve.engine_thread import EngineThread
from mythos_dist.serve.metrics import ServerMetrics
from mythos_dist.serve.protocol import TimedProtocol
from mythos_dist.serve.service import Limits, Service
from mythos_dist.urls import AnyPath

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises UserError."""
    key = None
    if arguments.api_key_file is not None:
        try:
            key = read_secret(arguments.api_key_file, "--api-key-file").decode("ascii")
        except UnicodeDecodeError:
            raise UserError("--api-key-file: a key consists of ASCII characters, since a header carries it") from None
    with _listen(arguments.host, arguments.port) as listener:  # before the model is read, which takes longer
        trained = load_trained(arguments.run_dir, arguments.tokenizer, quiet=False)
        service = _build_service(arguments, trained, key)
        if key is None and not _is_loopback(arguments.host):
            print(
                f"warning: --host {arguments.host} lets other machines use this server without authentication; "
                "pass --api-key-file, or keep the default host 127.0.0.1",
                file=sys.stderr,
            )
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        greeting = (
            f"serving {service.name} (step {trained.step}, {service.n_loops} loops, context {service.max_seq_len} "
            f"tokens) at {url}/v1; Ctrl-C ends"
        )
        serve(service, listener, arguments.shutdown_seconds, greeting)
    print("stopped", flush=True)


def serve(service: Service, listener: socket.socket, shutdown_seconds: float, greeting: str) -> None:
    """Print `greeting` and respond to requests until a signal; then finish those in progress, for at most
    `shutdown_seconds`."""
    config = uvicorn.Config(
        build_app(service),
        http=TimedProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=int(shutdown_seconds),
    )
    Server(config, greeting).run(sockets=[listener])


class Server(uvicorn.Server):
    """Ends in order after SIGTERM or SIGINT; a second SIGINT does not wait for requests."""

    def __init__(self, config: uvicorn.Config, greeting: str):
        """greeting: printed when the server accepts connections and handles signals."""
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As of uvicorn.Server."""
        await super().startup(sockets)
        print(self._greeting, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """uvicorn's own raises the signal again after an orderly end, so the exit status would be a failure."""
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _build_service(arguments: argparse.Namespace, trained: Trained, key: str | None) -> Service:
    metrics = ServerMetrics()
    n_loops = arguments.n_loops or trained.n_loops
    # The engine has a tokenizer of its own: see Service.
    engine_tokenizer = Tokenizer.load(trained.tokenizer.path, trained.tokenizer.eos)
    engine = DecodingEngine(
        trained.model, engine_tokenizer, n_loops=n_loops, max_batch=arguments.max_batch, cache=arguments.cache
    )
    return Service(
        name=arguments.model_name or _name_of(arguments.run_dir),
        created=int(time.time()),
        model=trained.model,
        n_loops=n_loops,
        tokenizer=trained.tokenizer,
        renderer=_renderer(trained, arguments.template),
        engine=EngineThread(engine, metrics, arguments.max_sequences),
        metrics=metrics,
        limits=Limits(body_bytes=arguments.max_body_mib << 20),
        key=key,
        hosts=(*LOOPBACK_NAMES, arguments.host) if _is_loopback(arguments.host) else (),
    )


def _renderer(trained: Trained, template: str | None) -> ChatRenderer | None:
    """None if the model has no chat template: completions work without."""
    try:
        return trained.renderer(template)
    except UserError as error:
        if template is not None:
            raise
        print(f"note: /v1/chat/completions is not available: {error}", file=sys.stderr)
        return None


def _name_of(path: AnyPath) -> str:
    """The name of a run or an export."""
    return path.expanduser().resolve().name if isinstance(path, Path) else path.name


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises UserError."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on --host {host} --port {port} ({reason}); choose another port (0: a free one) or host"
        ) from None
    return listener


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
