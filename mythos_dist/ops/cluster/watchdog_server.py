"""Rank 0's side of the watchdog: a thread that hears all ranks and comes to a verdict.

Anyone who reaches its port may connect. Until a connection has authenticated itself as a rank of this run
(`authentication.py`), it may send one short line within a few seconds, and the number of such connections is limited:
a new one closes the oldest. Once all ranks are connected, the port is closed. An error on one connection ends only that
connection, and whatever a rank sends is validated before it is used.
"""

import contextlib
import errno
import logging
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from mythos_dist.errors import UserError, first_line
from mythos_dist.ops.cluster.authentication import LINE_BYTES, Channel, challenge, read_hello, welcome
from mythos_dist.ops.cluster.recorder import find_blocking_ranks

log = logging.getLogger(__name__)

SETTLE_SECONDS = (
    1.0  # seconds from the first sign of an end to the verdict: the rank that died first may be heard of last
)
PROVE_WITHIN = 5.0  # seconds from connecting
MAX_UNAUTHENTICATED = (
    64  # connections that may be unproved at the same time, besides one for each rank that is still to come
)
_OTHER_FILES = 1024  # that rank 0 keeps open for all else
_CONNECT_MORE = 5.0  # seconds more than `lost_after`, in which ranks themselves give up, that they may take to connect
_GONE_WITHIN = 2.0  # seconds in which ranks have read the verdict and end
_DIED = "ended without a word: it was killed, ran out of memory or crashed"
_Text = Annotated[str, Field(max_length=20_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Report(_Strict):
    """What a rank waits for, as its recorder says."""

    begun: dict[str, int]
    last: _Text
    group: _Text
    members: list[int]
    at: _Text

    def check(self, ranks: int) -> None:
        """Raises ValueError if `find_blocking_ranks` could not work on it."""
        if not all(0 <= rank < ranks for rank in self.members):
            raise ValueError(f"members {self.members[:8]} of {ranks} ranks")
        if self.members and self.group not in self.begun:
            raise ValueError(f"a collective of {self.group[:80]!r} that was not begun")


class Message(_Strict):
    """What a rank sends."""

    phase: _Text | None = None
    age: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # seconds since the phase began
    bye: bool = False
    failed: _Text | None = None
    cause: bool = False  # of `failed`: no consequence of another rank's end
    report: Report | None = None


class Order(_Strict):
    """What rank 0 sends."""

    ok: int = 0
    report: _Text = ""  # say what you wait for, because of this
    end: _Text = ""  # the verdict


@dataclass(frozen=True)
class WatchdogLimits:
    """Seconds."""

    hang_after: float
    lost_after: float


@dataclass(eq=False)
class _Peer:
    """A connection as rank 0 knows it; `rank` is -1 until it has proved itself."""

    connection: socket.socket
    heard: float
    challenge: str
    rank: int = -1
    channel: Channel | None = None
    phase: str = "start"
    age: float = 0.0
    left: bool = False
    ended: bool = False
    received: bytes = b""
    report: dict[str, Any] | None = None


@dataclass
class WatchdogServer:
    nodes: list[str]  # of all ranks
    limits: WatchdogLimits
    key: bytes
    keepalive: Callable[[], Any]
    address: str = ""  # where to listen; empty: everywhere
    peers: dict[int, _Peer] = field(default_factory=dict)
    strangers: dict[socket.socket, _Peer] = field(default_factory=dict)  # in the order in which they came
    signs: list[tuple[int, str]] = field(default_factory=list)  # (how little it explains, what was seen)
    decide_at: float | None = None
    hang: str = ""  # what hangs, once reports were asked for

    def __post_init__(self):
        _allow_files(len(self.nodes) + MAX_UNAUTHENTICATED + _OTHER_FILES)
        self._listener = _listen(self.address)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._accept_again: float | None = None  # when, if no file descriptor was left
        self._alive = self._open_since = time.monotonic()
        self.all_left = threading.Event()  # every rank but 0 has said goodbye, or ended
        self.finished = threading.Event()  # the verdict is out, and the others have read it
        threading.Thread(target=self._run, name="watchdog of all ranks", daemon=True).start()

    def _run(self) -> None:
        while self.decide_at is None or time.monotonic() < self.decide_at:
            try:
                self._turn()
            except Exception:
                log.exception("the watchdog of all ranks goes on after an error of its own")
                time.sleep(0.2)
        try:
            self._decide()
            self._await_ends(time.monotonic() + _GONE_WITHIN)
        finally:
            self.finished.set()

    def _turn(self) -> None:
        self._hear_all()
        now = time.monotonic()
        for stranger in [peer for peer in self.strangers.values() if now - peer.heard > PROVE_WITHIN]:
            self._drop(stranger)
        if self._accept_again is not None and now >= self._accept_again:
            self._accept_again = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        if now - self._alive > 10:
            self._alive = now
            try:
                self.keepalive()
            except Exception as error:  # a file system that is away for a moment
                log.warning("the sign of life could not be written: %s", error)
        self._look(now)

    # ---- connections

    def _hear_all(self) -> None:
        for key, _ in self._selector.select(0.2):
            if key.fileobj is self._listener:
                self._accept()
            else:
                try:
                    self._hear(key.data)
                except Exception as error:  # whatever it was, it is this connection's
                    self._drop(key.data, f"sent what cannot be used ({type(error).__name__}: {first_line(error)})")

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # It would be reported again at once. What waits is served when one of the others has ended.
                self._drop_oldest_stranger()
                self._selector.unregister(self._listener)
                self._accept_again = time.monotonic() + 0.5
            return
        connection.setblocking(False)
        if len(self.strangers) >= MAX_UNAUTHENTICATED + len(self.nodes) - len(self.peers):
            self._drop_oldest_stranger()
        peer = _Peer(connection, time.monotonic(), challenge())
        self.strangers[connection] = peer
        try:
            self._selector.register(connection, selectors.EVENT_READ, peer)
            connection.send(f"{peer.challenge}\n".encode())
        except OSError:
            self._drop(peer)

    def _drop_oldest_stranger(self) -> None:
        if self.strangers:
            self._drop(next(iter(self.strangers.values())))

    def _drop(self, peer: _Peer, why: str = _DIED) -> None:
        """Close a connection; if it was a rank's, that is the sign of an end."""
        self.strangers.pop(peer.connection, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.connection)
        peer.connection.close()
        peer.ended = True
        if peer.rank >= 0 and not peer.left:
            peer.left = True
            self._sign(0, f"{self._name(peer.rank)} {why}")
        self._note_left()

    def _hear(self, peer: _Peer) -> None:
        """Raises ValueError for what no rank sends."""
        try:
            data = peer.connection.recv(1 << 16 if peer.channel else LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self._drop(peer)
        if not peer.channel:
            peer.received += data
            line, found, data = peer.received.partition(b"\n")
            if len(line) > LINE_BYTES:
                raise ValueError("a line that is too long")
            if not found:
                return
            self._prove(peer, line)
        assert peer.channel
        for text in peer.channel.feed(data):
            self._understand(peer, text)

    def _prove(self, peer: _Peer, line: bytes) -> None:
        """Raises ValueError unless the line shows that this is a rank of this run that was not here before."""
        rank, theirs = read_hello(self.key, line, peer.challenge)
        if rank >= len(self.nodes) or rank in self.peers:
            log.warning("a second connection for rank %d, or one of a rank that is none, was refused", rank)
            raise ValueError("no rank that is still to come")
        del self.strangers[peer.connection]
        peer.rank, peer.received, peer.heard = rank, b"", time.monotonic()
        peer.channel = Channel(self.key, rank, peer.challenge, theirs, serves=True)
        self.peers[rank] = peer
        peer.connection.send(welcome(self.key, rank, peer.challenge, theirs) + b"\n")
        if len(self.peers) == len(self.nodes):
            self._close_port()

    def _close_port(self) -> None:
        """All ranks are here: nobody else has a reason to connect."""
        if self._accept_again is None:
            self._selector.unregister(self._listener)
        self._accept_again = None
        self._listener.close()
        for stranger in list(self.strangers.values()):
            self._drop(stranger)

    def _understand(self, peer: _Peer, text: str) -> None:
        try:
            message = Message.model_validate_json(text)
            if message.report is not None:
                message.report.check(len(self.nodes))
        except ValueError as error:  # it is not believed, and does not count as a sign of life either
            log.warning("%s sent what is no message: %s", self._name(peer.rank), " ".join(str(error).split())[:500])
            return
        peer.heard = time.monotonic()
        if message.phase is not None:
            peer.phase, peer.age = message.phase, message.age
            self._tell(peer, {"ok": 1})
        if message.bye:
            peer.left = True
        if message.failed is not None:
            peer.left = True
            self._sign(1 if message.cause else 2, f"{self._name(peer.rank)} failed: {message.failed}")
        if message.report is not None:
            peer.report = message.report.model_dump()
        self._note_left()

    def _note_left(self) -> None:
        others = [peer for rank, peer in self.peers.items() if rank]
        if len(others) == len(self.nodes) - 1 and all(peer.left for peer in others):
            self.all_left.set()

    def _tell(self, peer: _Peer, message: dict[str, Any]) -> None:
        assert peer.channel
        if peer.ended:
            return
        line = peer.channel.line(Order(**message).model_dump_json(exclude_defaults=True))
        try:
            sent = peer.connection.send(line)
        except OSError:  # its silence or its end is noticed where we listen
            return
        peer.channel.count_sent()
        if sent < len(line):
            self._drop(peer, "does not read what it is sent: it is stopped")

    # ---- the verdict

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
        missing = set(range(len(self.nodes))) - self.peers.keys()
        if missing and now - self._open_since > self.limits.lost_after + _CONNECT_MORE and self.decide_at is None:
            for rank in sorted(missing)[:8]:
                self._sign(0, f"{self._name(rank)} came to the roll call and did not connect after it: it was killed?")
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
            self.decide_at = time.monotonic() + SETTLE_SECONDS
            for peer in list(self.peers.values()):
                if not peer.left:
                    self._tell(peer, {"report": text})

    def _decide(self) -> None:
        best = min((number for number, _ in self.signs), default=None)
        texts = [text for number, text in self.signs if number == best]
        why = "; ".join(texts[:8])
        if self.hang:
            reports = {peer.rank: peer.report for peer in self.peers.values() if peer.report}
            guilty, waits_at = find_blocking_ranks(reports, len(self.nodes))
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
        for peer in list(self.peers.values()):
            self._tell(peer, {"end": why[:20_000]})

    def _await_ends(self, until: float) -> None:
        """Until the other ranks have closed their connections: if rank 0 ended before they have read the verdict, what
        is under way to them could be lost."""
        while time.monotonic() < until and any(rank and not peer.ended for rank, peer in self.peers.items()):
            self._hear_all()

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.nodes[rank]}"


def _listen(address: str) -> socket.socket:
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):  # no such address here
            return socket.create_server((address, 0), family=family, backlog=4096)
    try:
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    except (OSError, ValueError):  # no IPv6 here
        return socket.create_server(("", 0), backlog=4096)


def _allow_files(number: int) -> None:
    """Raise the limit of open files, if it is lower; UserError if that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return
    if hard != resource.RLIM_INFINITY and hard < number - _OTHER_FILES // 2:
        raise UserError(
            f"rank 0 needs about {number} open files for connections of all ranks, and the limit is {hard}; raise it "
            f"(`ulimit -Hn {number}`, or LimitNOFILE of slurmd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (number if hard == resource.RLIM_INFINITY else min(number, hard), hard))
