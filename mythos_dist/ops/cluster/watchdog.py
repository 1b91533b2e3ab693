"""Notices ranks that hang, stop or vanish, and ends the run on all ranks within seconds, stacks in their logs.

Every rank tells rank 0 each second where it is; rank 0 answers. Whose connection closes without a goodbye has died, who
says nothing for `lost_after` seconds is stopped or cut off, and who stays in one phase (a step, a save) for longer than
`hang_after` hangs: then all ranks report what they wait for, and rank 0 says which of them did not arrive.
A rank that hears nothing from rank 0 ends by itself, because the run will be started again without it.

Threads and sockets of our own, because a store of torch answers no faster than its slowest key, waits without a limit
when a cable is pulled, and does not tell when a client dies. The trap: a thread cannot speak while another holds the
interpreter's lock, so `lost_after` must be longer than any such stretch; imports are behind us when this starts.
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
from mythos_dist.ops.cluster.recorder import CollectiveRecorder, where
from mythos_dist.ops.cluster.watchdog_server import (
    SETTLE_SECONDS,
    Message,
    Order,
    Report,
    WatchdogLimits,
    WatchdogServer,
)
from mythos_dist.parallel.launcher import RankInfo

log = logging.getLogger(__name__)
_CONNECTION_WORDS = ("onnection", "ocket", "NCCL", "imed out", "gloo", "roken pipe", "eset by peer")


class Watchdog:
    """One rank's side of it; on rank 0 the other side too."""

    def __init__(self, rank_info: RankInfo, limits: WatchdogLimits, recorder: CollectiveRecorder):
        # Rank 0 hears 500 ranks a second, whose words cost it a hundredth of a core.
        self._interval = max(1.0, rank_info.world_size / 500)
        limits = replace(limits, lost_after=max(limits.lost_after, 3 * self._interval))
        self.rank_info, self.limits, self.recorder = rank_info, limits, recorder
        self.on_failure: Callable[[str], None] = lambda why: None  # rank 0: write down why the run ends
        self.keepalive: Callable[[], None] = lambda: None  # rank 0: called every ten seconds
        self._phase, self._since = "start", time.monotonic()
        self._leaving = self._failed = False
        self._leaves = threading.Event()  # the main thread is on its way out: `leave` or `fail`
        self._rank_0_ended = False
        self._socket: socket.socket | None = None
        self._channel: Channel | None = None
        self._hub: WatchdogServer | None = None
        self._send_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def serve(self, nodes: list[str], address: str = "") -> str:
        """On rank 0: listen at `address` for ranks on `nodes`. Returns what the others need to connect: host, port and
        a number of this start, which is no secret."""
        number = secrets.token_hex(8)
        keepalive = lambda: self.keepalive()  # noqa: E731 - whatever it is by then
        self._hub = WatchdogServer(nodes, self.limits, self._key(number), keepalive, address)
        return f"{address or self.rank_info.master_addr or '127.0.0.1'} {self._hub.port} {number}"

    def start(self, address: str) -> None:
        """Connect to rank 0, which has given `address`, and watch from here on. Raises LostRankError if that fails."""
        end, why = time.monotonic() + self.limits.lost_after, ""
        while time.monotonic() < end:
            try:
                host, port, number = address.split()
                self._socket = socket.create_connection((host, int(port)), timeout=min(5, self.limits.lost_after))
                self._channel = self._prove(self._socket, self._key(number))
                break
            except (OSError, ValueError, OverflowError) as error:
                why = first_line(error)
                time.sleep(0.2)
        if self._socket is None or self._channel is None:
            raise LostRankError(
                f"{self.rank_info} cannot connect to rank 0 on {self.rank_info.master_addr} at {address!r}: {why}"
            )
        self._send(Message(phase=self._phase))
        self._thread.start()

    @staticmethod
    def _key(number: str) -> bytes:
        return derive(launch_secret(), "watchdog", number)

    def _prove(self, connection: socket.socket, key: bytes) -> Channel:
        """The handshake. Raises OSError or ValueError if rank 0 does not prove that it is of this run."""
        with connection.makefile("rb", buffering=0) as lines:  # what comes behind the two lines is left for `_watch`
            theirs, ours = lines.readline(LINE_BYTES).strip().decode(), challenge()
            connection.sendall(hello(key, self.rank_info.rank, theirs, ours))
            if lines.readline(LINE_BYTES).strip() != welcome(key, self.rank_info.rank, theirs, ours):
                raise ValueError("it refused this rank, or is not rank 0 of this launch (MYTHOS_SECRET differs?)")
        return Channel(key, self.rank_info.rank, theirs, ours, serves=False)

    def enter_phase(self, phase: str) -> None:
        """A new phase begins: it may take `hang_after` seconds from now."""
        self._phase, self._since = phase, time.monotonic()

    def heartbeat(self) -> None:
        """The present phase is a long one and has got on: it may take so long again."""
        self._since = time.monotonic()

    def leave(self) -> None:
        """This rank is done: that its peers end does not matter any more. Rank 0 waits for their goodbyes."""
        self._leaving = True
        self._leaves.set()
        self._send(Message(bye=True))
        if self._hub:
            self._hub.all_left.wait(SETTLE_SECONDS + 3)

    def fail(self, error: BaseException) -> None:
        """This rank ends with an error: let the others know, and wait until they do. Does not return if another rank
        was the cause: this process then ends as the others do."""
        if self._socket is None or self._leaving:
            return
        consequence = self._is_consequence(error)  # the verdict says of what
        self._failed = not consequence
        text = f"{type(error).__name__}: {first_line(error)}"[:2000]
        if self._failed and self.rank_info.rank == 0:
            self.on_failure(f"{self.rank_info} failed: {text}")
        self._leaves.set()
        self._send(Message(failed=text, cause=self._failed))
        # The verdict, the end of rank 0 or its silence: one of them comes.
        limit = self.limits.lost_after + 30
        if self._hub:
            self._hub.finished.wait(limit)
        self._thread.join(limit)
        if consequence:
            self._end(f"the other ranks cannot be reached: {text}")

    def _is_consequence(self, error: BaseException) -> bool:
        """Of the end of another rank: a connection broke."""
        if isinstance(error, (dist.DistError, ConnectionError, TimeoutError)):
            return True
        words = str(error)
        return isinstance(error, RuntimeError) and (
            self._rank_0_ended or any(word in words for word in _CONNECTION_WORDS)
        )

    def _send(self, message: Message) -> None:
        if self._socket is None or self._channel is None:
            return
        with contextlib.suppress(OSError), self._send_lock:  # the reading side notices
            line = self._channel.line(message.model_dump_json(exclude_defaults=True))
            self._channel.count_sent()
            self._socket.sendall(line)

    def _run(self) -> None:
        """In the thread: watch until the run ends, then end this process."""
        assert self._socket is not None and self._channel is not None
        why, of_rank_0 = self._watch(self._socket, self._channel)
        if of_rank_0:
            self._rank_0_ended = True
            self._leaves.wait(
                SETTLE_SECONDS + 3
            )  # this rank may be on its way out by itself, and say more than we could
        if not self._failed:
            self._end(why)

    def _watch(self, connection: socket.socket, channel: Channel) -> tuple[str, bool]:
        """Returns why this rank has to end, and whether that is because rank 0 has ended or is silent."""
        told, heard = 0.0, time.monotonic()
        connection.settimeout(self.limits.lost_after)  # for what is sent
        reading = selectors.DefaultSelector()
        reading.register(connection, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            if now - told >= self._interval:
                told = now
                self._send(Message(phase=self._phase, age=now - self._since))
            try:
                data = connection.recv(1 << 16) if reading.select(0.2) else None
                if data == b"":
                    return f"rank 0 on {self.rank_info.master_addr} ended", True
                texts = channel.feed(data or b"")
            except (ConnectionResetError, BrokenPipeError):  # it was killed before it had read all that we sent
                return f"rank 0 on {self.rank_info.master_addr} ended", True
            except OSError as error:
                return f"the connection to rank 0 on {self.rank_info.master_addr} broke ({error.strerror})", True
            except ValueError as error:
                return f"the connection to rank 0 on {self.rank_info.master_addr} brought {first_line(error)}", True
            for text in texts:
                order = self._read(text)
                heard = time.monotonic() if order else heard
                if order and order.report:
                    self._dump(order.report)
                    self._send(Message(report=Report(**self.recorder.report())))
                if order and order.end:
                    return order.end, False
            if now - heard > self.limits.lost_after:
                return (
                    f"rank 0 on {self.rank_info.master_addr} has not answered for {self.limits.lost_after:g} s: it is "
                    f"stopped, or the network between it and {self.rank_info.node} is cut"
                ), False

    def _read(self, text: str) -> Order | None:
        try:
            return Order.model_validate_json(text)
        except ValueError as error:
            log.warning("rank 0 sent what is no message: %s", " ".join(str(error).split())[:500])
            return None

    def _end(self, why: str) -> None:
        """End this process, unless it is done."""
        if self._leaving:
            return
        self._dump(why)
        log.info("this rank ends: %s; it was in %s", why, self._phase)
        if self.rank_info.local_rank == 0:
            print(f"error: {self.rank_info} ends: {why}", file=sys.stderr, flush=True)
        if self.rank_info.rank == 0:
            report_to_launcher(EXIT_LOST_RANK)
            try:
                self.on_failure(why)
            except Exception:
                log.exception("why the run ends could not be written down")
            if self._hub:
                self._hub.finished.wait(SETTLE_SECONDS + 10)  # the others still have to hear of it
        logging.shutdown()
        os._exit(EXIT_LOST_RANK)

    def _dump(self, why: str) -> None:
        """The stacks of all threads into this rank's log."""
        log.info("%s. What every thread of this rank is doing:", why)  # not for the console, which gets one line
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream:
                handler.flush()
                faulthandler.dump_traceback(handler.stream, all_threads=True)
                handler.stream.write(f"last collective: {self.recorder.describe()}, at {where()}\n")
                handler.flush()
