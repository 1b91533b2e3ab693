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
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mythos_dist.cluster.place import Place
from mythos_dist.cluster.recorder import Recorder, blame, where
from mythos_dist.errors import EXIT_LOST, first_line, tell_launcher

log = logging.getLogger(__name__)
_SETTLE = 1.0  # seconds from the first sign of an end to the verdict: the rank that died first may be heard of last


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    hang_after: float
    lost_after: float


class Watchdog:
    """One rank's side of it; on rank 0 the other side too."""

    def __init__(self, place: Place, limits: Limits, recorder: Recorder):
        # Rank 0 hears 500 ranks a second, whose words cost it a hundredth of a core.
        self._interval = max(1.0, place.world / 500)
        limits = replace(limits, lost_after=max(limits.lost_after, 3 * self._interval))
        self.place, self.limits, self.recorder = place, limits, recorder
        self.on_end: Callable[[str], None] = lambda why: None  # rank 0: write down why the run ends
        self.on_alive: Callable[[], None] = lambda: None  # rank 0: called every ten seconds
        self._phase, self._since = "start", time.monotonic()
        self._leaving = self._failed = False
        self._socket: socket.socket | None = None
        self._hub: _Hub | None = None
        self._send_lock = threading.Lock()

    def serve(self, nodes: list[str]) -> str:
        """On rank 0: listen, for ranks on `nodes`. Returns what the others need to connect."""
        self._hub = _Hub(nodes, self.limits, lambda: self.on_alive())  # whatever it is by then
        return f"{self._hub.port} {self._hub.token}"

    def start(self, host: str, address: str) -> None:
        """Connect to rank 0, which has given `address`, and watch from here on."""
        port, token = address.split()
        self._socket = socket.create_connection((host, int(port)), timeout=self.limits.lost_after)
        self._send({"rank": self.place.rank, "token": token, "phase": self._phase, "age": 0.0})
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def enter(self, phase: str) -> None:
        """A new phase begins: it may take `hang_after` seconds from now."""
        self._phase, self._since = phase, time.monotonic()

    def get_on(self) -> None:
        """The present phase is a long one and has got on: it may take so long again."""
        self._since = time.monotonic()

    def leave(self) -> None:
        """This rank is done: that its peers end does not matter any more."""
        self._leaving = True
        self._send({"bye": True})

    def fail(self, error: BaseException) -> None:
        """This rank ends with an error: let the others know. Does not return if another rank was the cause."""
        if self._socket is None or self._leaving:
            return
        connection = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("onnection", "socket", "NCCL", "Timed out", "gloo")
        )
        self._failed = not connection  # a lost connection is a consequence: the verdict says of what
        text = f"{type(error).__name__}: {first_line(error)}"
        if self._failed and self.place.rank == 0:
            self.on_end(f"{self.place} failed: {text}")
        self._send({"failed": text, "cause": self._failed})
        time.sleep(_SETTLE + 3)

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is None:
            return
        with contextlib.suppress(OSError), self._send_lock:  # the reading side notices
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def _run(self) -> None:
        assert self._socket is not None
        received, told, heard = b"", 0.0, time.monotonic()
        self._socket.settimeout(0.2)
        while True:
            now = time.monotonic()
            if now - told >= self._interval:
                told = now
                self._send({"phase": self._phase, "age": now - self._since})
            try:
                data = self._socket.recv(1 << 16)
                if not data:
                    return self._end(f"rank 0 on {self.place.master} ended", late=True)
                heard, received = time.monotonic(), received + data
            except TimeoutError:
                pass
            except OSError as error:
                return self._end(f"the connection to rank 0 on {self.place.master} broke ({error.strerror})", late=True)
            if now - heard > self.limits.lost_after:
                return self._end(
                    f"rank 0 on {self.place.master} has not answered for {self.limits.lost_after:g} s: it is stopped, "
                    f"or the network between it and {self.place.node} is cut"
                )
            *lines, received = received.split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "report" in message:
                    self._dump(message["report"])
                    self._send({"report": self.recorder.report()})
                if "end" in message:
                    return self._end(message["end"])

    def _end(self, why: str, late: bool = False) -> None:
        """In the thread: end this process. `late`: it may be on its way out by itself, and say more than we could."""
        if self._leaving:
            return
        if late:
            time.sleep(_SETTLE + 3)
        if self._leaving or self._failed:
            return
        self._dump(why)
        log.info("this rank ends: %s; it was in %s", why, self._phase)
        if self.place.local_rank == 0:
            print(f"error: {self.place} ends: {why}", file=sys.stderr, flush=True)
        if self.place.rank == 0:
            tell_launcher(EXIT_LOST)
            try:
                self.on_end(why)
            except Exception:
                log.exception("why the run ends could not be written down")
            time.sleep(0.5)  # the others still have to hear of it
        logging.shutdown()
        os._exit(EXIT_LOST)

    def _dump(self, why: str) -> None:
        """The stacks of all threads into this rank's log."""
        log.info("%s. What every thread of this rank is doing:", why)  # not for the console, which gets one line
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream:
                handler.flush()
                faulthandler.dump_traceback(handler.stream, all_threads=True)
                handler.stream.write(f"last collective: {self.recorder.describe()}, at {where()}\n")
                handler.flush()


@dataclass
class _Peer:
    """A rank as rank 0 knows it."""

    rank: int
    connection: socket.socket
    heard: float
    phase: str = "start"
    age: float = 0.0
    left: bool = False
    received: bytes = b""
    report: dict[str, Any] | None = None


@dataclass
class _Hub:
    """Rank 0's side: a thread that hears all ranks and comes to a verdict."""

    nodes: list[str]
    limits: Limits
    on_alive: Callable[[], Any]
    peers: dict[int, _Peer] = field(default_factory=dict)
    signs: list[tuple[int, str]] = field(default_factory=list)  # (how little it explains, what was seen)
    decide_at: float | None = None
    hang: str = ""  # what hangs, once reports were asked for

    def __post_init__(self):
        try:
            self._listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        except (OSError, ValueError):  # no IPv6 here
            self._listener = socket.create_server(("", 0), backlog=4096)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(8)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._alive = time.monotonic()
        threading.Thread(target=self._run, name="watchdog of all ranks", daemon=True).start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(0.2):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._hear(key)
            now = time.monotonic()
            if now - self._alive > 10:
                self._alive = now
                self.on_alive()
            self._look(now)
            if self.decide_at is not None and now >= self.decide_at:
                return self._decide()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, _Peer(-1, connection, time.monotonic()))

    def _hear(self, key: selectors.SelectorKey) -> None:
        peer: _Peer = key.data
        try:
            data = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.connection)
            if peer.rank >= 0 and not peer.left:
                peer.left = True
                self._sign(
                    0, f"{self._name(peer.rank)} ended without a word: it was killed, ran out of memory or crashed"
                )
            return
        peer.heard = time.monotonic()
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            self._understand(peer, line)

    def _understand(self, peer: _Peer, line: bytes) -> None:
        try:
            message = json.loads(line)
            if message.get("token") == self.token:
                peer.rank = int(message["rank"])
                self.peers[peer.rank] = peer
        except (ValueError, AttributeError):
            return
        if peer.rank < 0:
            return  # a stranger on our port
        if "age" in message:
            peer.phase, peer.age = message["phase"], message["age"]
            self._tell(peer, {"ok": 1})
        if "bye" in message:
            peer.left = True
        if "failed" in message:
            peer.left = True
            self._sign(1 if message["cause"] else 2, f"{self._name(peer.rank)} failed: {message['failed']}")
        if "report" in message:
            peer.report = message["report"]

    def _look(self, now: float) -> None:
        """Is one silent, does one hang?"""
        here = [peer for peer in self.peers.values() if not peer.left]
        for peer in here:
            if now - peer.heard > self.limits.lost_after:
                peer.left = True
                self._sign(
                    0,
                    f"{self._name(peer.rank)} has said nothing for {self.limits.lost_after:g} s: it is stopped, or its "
                    "node is cut off or off",
                )
        hanging = [peer for peer in here if peer.age + now - peer.heard > self.limits.hang_after]
        if hanging and not self.hang:
            # A rank that answers knows where the run is.
            first = max(hanging, key=lambda peer: (now - peer.heard < 3, peer.age))
            self.hang = f"{first.phase} takes longer than {self.limits.hang_after:g} s"
            for peer in here:
                self._tell(peer, {"report": self.hang})
            self.decide_at = now + min(5.0, self.limits.lost_after)

    def _sign(self, rank_of_sign: int, text: str) -> None:
        self.signs.append((rank_of_sign, text))
        if self.decide_at is None:
            # Of a rank that says nothing others ask first what they wait for.
            self.decide_at = time.monotonic() + _SETTLE
            for peer in self.peers.values():
                if not peer.left:
                    self._tell(peer, {"report": text})

    def _decide(self) -> None:
        best = min((number for number, _ in self.signs), default=None)
        texts = [text for number, text in self.signs if number == best]
        why = "; ".join(texts[:8])
        if self.hang:
            reports = {peer.rank: peer.report for peer in self.peers.values() if peer.report}
            guilty, waits_at = blame(reports, len(self.nodes))
            why = self.hang
            if guilty:
                named = [
                    f"{self._name(rank)} ({'at ' + reports[rank]['at'] if rank in reports else 'no answer'})"
                    for rank in guilty[:8]
                ]
                why += f": {', '.join(named)} did not arrive at {waits_at}"
            else:
                last = sorted({report["last"] for report in reports.values()})
                why += f": all ranks have begun the same, the last {'; '.join(last[:4])}"
        for peer in self.peers.values():
            self._tell(peer, {"end": why})

    def _tell(self, peer: _Peer, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its silence or its end is noticed where we listen
            peer.connection.send((json.dumps(message) + "\n").encode())

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.nodes[rank]}"
