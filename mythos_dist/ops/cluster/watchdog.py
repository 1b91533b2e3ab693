"""Detects ranks that hang, stop or exit, and ends the run on all ranks within seconds, with stacks in their logs.

Each rank sends its phase (a step, a checkpoint) to rank 0 every second, and rank 0 replies. From these messages
`watchdog_server.py` decides when the run has failed, and why; every rank then writes its stacks and exits. A rank that
gets no reply from rank 0 exits as well, because the run will be restarted without it.

It uses its own threads and sockets, because a TCPStore of torch is as slow as its slowest key, waits without a limit
when a cable is pulled, and does not notice when a client exits. The trap: a thread cannot send while another one holds
the interpreter lock, so `lost_after` must exceed the longest time that happens; imports are done before this starts.

Decisions: CLUSTER-2, CLUSTER-11.
"""

import contextlib
import faulthandler
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from mythos_dist.errors import EXIT_LOST_RANK, LostRankError, first_line, report_to_launcher
from mythos_dist.ops.cluster.authentication import LINE_BYTES, Channel, challenge, derive, hello, launch_secret, welcome
from mythos_dist.ops.cluster.recorder import CollectiveRecorder, main_thread_location
from mythos_dist.ops.cluster.watchdog_protocol import RankMessage, ServerMessage, WatchdogLimits
from mythos_dist.ops.cluster.watchdog_server import SETTLE_SECONDS, WatchdogServer
from mythos_dist.parallel.launcher import RankInfo

log = logging.getLogger(__name__)
# Parts of the messages of RuntimeErrors that gloo and NCCL raise when a connection breaks.
_CONNECTION_ERRORS = ("onnection", "ocket", "NCCL", "imed out", "gloo", "roken pipe", "eset by peer")


class Watchdog:
    """The watchdog of one rank; rank 0 also runs the server."""

    def __init__(self, rank_info: RankInfo, limits: WatchdogLimits, recorder: CollectiveRecorder):
        # Rank 0 gets 500 messages a second at most, which cost it a hundredth of a core.
        self._interval = max(1.0, rank_info.world_size / 500)
        limits = replace(limits, lost_after=max(limits.lost_after, 3 * self._interval))
        self.rank_info, self.limits, self.recorder = rank_info, limits, recorder
        self.on_failure: Callable[[str], None] = lambda reason: None  # on rank 0: records why the run ends
        self.keepalive: Callable[[], None] = lambda: None  # on rank 0: called every ten seconds
        self._phase, self._phase_started = "start", time.monotonic()
        self._done = self._failed = False
        self._exiting = threading.Event()  # the main thread has called `leave` or `fail`
        self._rank_0_exited = False
        self._socket: socket.socket | None = None
        self._channel: Channel | None = None
        self._server: WatchdogServer | None = None
        self._send_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def serve(self, nodes: list[str], address: str = "") -> str:
        """On rank 0: start the server at `address` for ranks on `nodes`. Returns what `start` needs on all ranks: host,
        port and a nonce of this start, which is not secret."""
        nonce = secrets.token_hex(8)
        keepalive = lambda: self.keepalive()  # noqa: E731 - `self.keepalive` is set later
        self._server = WatchdogServer(nodes, self.limits, self._key(nonce), keepalive, address)
        return f"{address or self.rank_info.master_addr or '127.0.0.1'} {self._server.connections.port} {nonce}"

    def start(self, address: str) -> None:
        """Connect to rank 0 at `address`, which `serve` returned, and start. Raises LostRankError if that fails."""
        deadline, problem = time.monotonic() + self.limits.lost_after, ""
        while time.monotonic() < deadline:
            try:
                host, port, nonce = address.split()
                self._socket = socket.create_connection((host, int(port)), timeout=min(5, self.limits.lost_after))
                self._channel = self._handshake(self._socket, self._key(nonce))
                break
            except (OSError, ValueError, OverflowError) as error:
                problem = first_line(error)
                time.sleep(0.2)
        if self._socket is None or self._channel is None:
            raise LostRankError(
                f"{self.rank_info} cannot connect to rank 0 on {self.rank_info.master_addr} at {address!r}: {problem}"
            )
        self._send(RankMessage(phase=self._phase))
        self._thread.start()

    @staticmethod
    def _key(nonce: str) -> bytes:
        return derive(launch_secret(), "watchdog", nonce)

    def _handshake(self, connection: socket.socket, key: bytes) -> Channel:
        """Raises OSError or ValueError if rank 0 does not prove that it belongs to this run."""
        rank = self.rank_info.rank
        with connection.makefile("rb", buffering=0) as lines:  # unbuffered: later lines are for `_monitor`
            server_challenge, rank_challenge = lines.readline(LINE_BYTES).strip().decode(), challenge()
            connection.sendall(hello(key, rank, server_challenge, rank_challenge))
            if lines.readline(LINE_BYTES).strip() != welcome(key, rank, server_challenge, rank_challenge):
                raise ValueError("it refused this rank, or is not rank 0 of this launch (MYTHOS_SECRET differs?)")
        return Channel(key, rank, server_challenge, rank_challenge, is_rank_0=False)

    def enter_phase(self, phase: str) -> None:
        """A new phase begins: it may take `hang_after` seconds."""
        self._phase, self._phase_started = phase, time.monotonic()

    def heartbeat(self) -> None:
        """A long phase makes progress: it may take `hang_after` seconds from now."""
        self._phase_started = time.monotonic()

    def leave(self) -> None:
        """This rank is done: it ignores the exit of others. Rank 0 waits until all ranks are done."""
        self._done = True
        self._exiting.set()
        self._send(RankMessage(bye=True))
        if self._server:
            self._server.all_done.wait(SETTLE_SECONDS + 3)

    def fail(self, error: BaseException) -> None:
        """This rank ends with an error: report it, and wait until the run ends. If the error is a consequence of
        another rank's exit, this does not return: the process exits as the other ranks do."""
        if self._socket is None or self._done:
            return
        is_consequence = self._is_consequence(error)
        self._failed = not is_consequence
        text = f"{type(error).__name__}: {first_line(error)}"[:2000]
        if self._failed and self.rank_info.rank == 0:
            self.on_failure(f"{self.rank_info} failed: {text}")
        self._exiting.set()
        self._send(RankMessage(failed=text, cause=self._failed))
        # The thread ends when rank 0 sends the reason, exits or stops responding.
        timeout = self.limits.lost_after + 30
        if self._server:
            self._server.finished.wait(timeout)
        self._thread.join(timeout)
        if is_consequence:
            self._exit(f"the other ranks cannot be reached: {text}")

    def _is_consequence(self, error: BaseException) -> bool:
        """Whether the error is a broken connection to another rank."""
        if isinstance(error, (dist.DistError, ConnectionError, TimeoutError)):
            return True
        if not isinstance(error, RuntimeError):
            return False
        message = str(error)
        return self._rank_0_exited or any(part in message for part in _CONNECTION_ERRORS)

    def _send(self, message: RankMessage) -> None:
        if self._socket is None or self._channel is None:
            return
        with contextlib.suppress(OSError), self._send_lock:  # `_monitor` notices that the connection is broken
            line = self._channel.line(message.model_dump_json(exclude_defaults=True))
            self._channel.count_sent()
            self._socket.sendall(line)

    def _run(self) -> None:
        """The thread: monitor until the run ends, then exit this process."""
        assert self._socket is not None and self._channel is not None
        reason, rank_0_exited = self._monitor(self._socket, self._channel)
        if rank_0_exited:
            self._rank_0_exited = True
            self._exiting.wait(SETTLE_SECONDS + 3)  # the main thread may fail too, with a more specific error
        if not self._failed:
            self._exit(reason)

    def _monitor(self, connection: socket.socket, channel: Channel) -> tuple[str, bool]:
        """Returns why this rank must exit, and whether the reason is that rank 0 exited or its connection broke."""
        rank_0 = f"rank 0 on {self.rank_info.master_addr}"
        last_sent, last_received = 0.0, time.monotonic()
        connection.settimeout(self.limits.lost_after)  # for sending
        readable = selectors.DefaultSelector()
        readable.register(connection, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            if now - last_sent >= self._interval:
                last_sent = now
                self._send(RankMessage(phase=self._phase, age=now - self._phase_started))
            try:
                data = connection.recv(1 << 16) if readable.select(0.2) else None
                if data == b"":
                    return f"{rank_0} exited", True
                texts = channel.feed(data or b"")
            except (ConnectionResetError, BrokenPipeError):  # it was killed before it had read all that we sent
                return f"{rank_0} exited", True
            except OSError as error:
                return f"the connection to {rank_0} broke ({error.strerror})", True
            except ValueError as error:
                return f"received invalid data from {rank_0}: {first_line(error)}", True
            for text in texts:
                message = self._parse(text)
                if message is None:
                    continue
                last_received = time.monotonic()
                if message.send_state:
                    self._dump_stacks(message.send_state)
                    self._send(RankMessage(report=self.recorder.state()))
                if message.end:
                    return message.end, False
            if now - last_received > self.limits.lost_after:
                return (
                    f"{rank_0} has not responded for {self.limits.lost_after:g} s: the process is suspended, or the "
                    f"network between it and {self.rank_info.node} is down",
                    False,
                )

    def _parse(self, text: str) -> ServerMessage | None:
        try:
            return ServerMessage.model_validate_json(text)
        except ValueError as error:
            log.warning("invalid message from rank 0: %s", " ".join(str(error).split())[:500])
            return None

    def _exit(self, reason: str) -> None:
        """Exit this process, unless its work is done."""
        if self._done:
            return
        self._dump_stacks(reason)
        log.info("this rank exits in phase %r: %s", self._phase, reason)
        if self.rank_info.local_rank == 0:
            print(f"error: {self.rank_info} exits: {reason}", file=sys.stderr, flush=True)
        if self.rank_info.rank == 0:
            report_to_launcher(EXIT_LOST_RANK)
            try:
                self.on_failure(reason)
            except Exception:
                log.exception("cannot record why the run ends")
            if self._server:
                self._server.finished.wait(SETTLE_SECONDS + 10)  # until the other ranks have read the reason
        logging.shutdown()
        os._exit(EXIT_LOST_RANK)

    def _dump_stacks(self, reason: str) -> None:
        """Write the stacks of all threads to this rank's log file, not to the console."""
        log.info("%s. Stacks of all threads of this rank:", reason)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream:
                handler.flush()
                faulthandler.dump_traceback(handler.stream, all_threads=True)
                location = main_thread_location()
                handler.stream.write(f"last collective: {self.recorder.describe()}, at {location}\n")
                handler.flush()
