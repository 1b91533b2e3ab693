"""The watchdog server's port and its connections: one per rank.

Anyone who reaches the port may connect. Until a connection has authenticated itself as a rank of this run
(`authentication.py`), it may send one short line within a few seconds, and the number of such connections is limited:
a new one closes the oldest. Once all ranks are connected, the port is closed. An error on one connection closes only
that connection.
"""

import contextlib
import errno
import logging
import resource
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from mythos_dist.errors import UserError, first_line
from mythos_dist.ops.cluster.authentication import LINE_BYTES, Channel, challenge, read_hello, welcome
from mythos_dist.ops.cluster.watchdog_protocol import CollectiveState, ServerMessage

log = logging.getLogger(__name__)

AUTHENTICATE_WITHIN = 5.0  # seconds from connecting
MAX_UNAUTHENTICATED = 64  # connections, in addition to one for each rank that has not connected yet
_OTHER_FILES = 1024  # file descriptors that rank 0 needs for everything else
_EXITED = "exited unexpectedly: it was killed, ran out of memory or crashed"


@dataclass(eq=False)
class RankConnection:
    """A connection, and what its rank last sent."""

    socket: socket.socket
    last_received: float  # time.monotonic()
    challenge: str
    rank: int = -1  # until it is authenticated
    channel: Channel | None = None
    unparsed: bytes = b""  # the beginning of the line by which it authenticates itself
    closed: bool = False
    phase: str = "start"
    age: float = 0.0  # seconds since the phase began, when `phase` was received
    done: bool = False  # the rank is done, failed, closed its connection or does not respond; no longer monitored
    collectives: CollectiveState | None = None


class RankConnections:
    """Accepts, authenticates, reads and closes connections. All methods run in the server's thread."""

    def __init__(
        self,
        world_size: int,
        key: bytes,
        address: str,
        on_message: Callable[[RankConnection, str], None],
        on_closed: Callable[[RankConnection, str], None],
    ):
        """Listen at `address` (empty: on all interfaces).

        on_message: gets each authenticated line. on_closed: gets the reason, after a rank's connection was closed.
        """
        _raise_file_limit(world_size + MAX_UNAUTHENTICATED + _OTHER_FILES)
        self.ranks: dict[int, RankConnection] = {}
        self.unauthenticated: dict[socket.socket, RankConnection] = {}  # oldest first
        self._world_size, self._key = world_size, key
        self._on_message, self._on_closed = on_message, on_closed
        self._listener = _listen(address)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._accept_again_at: float | None = None  # set while there are no file descriptors left

    def poll(self) -> None:
        """Handle new connections and data; wait up to 0.2 s for them."""
        for key, _ in self._selector.select(0.2):
            if key.fileobj is self._listener:
                self._accept()
            else:
                try:
                    self._receive(key.data)
                except Exception as error:  # must not affect other connections
                    self.close(key.data, f"sent invalid data ({type(error).__name__}: {first_line(error)})")

    def expire(self, now: float) -> None:
        """Close connections that did not authenticate themselves in time; accept again after a pause."""
        for connection in list(self.unauthenticated.values()):
            if now - connection.last_received > AUTHENTICATE_WITHIN:
                self.close(connection)
        if self._accept_again_at is not None and now >= self._accept_again_at:
            self._accept_again_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def send(self, connection: RankConnection, message: ServerMessage) -> None:
        """To an authenticated rank. Never blocks: a connection whose buffer is full is closed."""
        assert connection.channel
        if connection.closed:
            return
        line = connection.channel.line(message.model_dump_json(exclude_defaults=True))
        try:
            sent = connection.socket.send(line)
        except OSError:  # the next `poll` sees it closed, or the rank stops responding
            return
        connection.channel.count_sent()
        if sent < len(line):
            self.close(connection, "does not read its connection: the process is suspended")

    def close(self, connection: RankConnection, reason: str = _EXITED) -> None:
        self.unauthenticated.pop(connection.socket, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()
        connection.closed = True
        if connection.rank >= 0:
            self._on_closed(connection, reason)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # `select` would return at once for the pending connection. Pause, and free a file descriptor.
                self._close_oldest_unauthenticated()
                self._selector.unregister(self._listener)
                self._accept_again_at = time.monotonic() + 0.5
            return
        accepted.setblocking(False)
        if len(self.unauthenticated) >= MAX_UNAUTHENTICATED + self._world_size - len(self.ranks):
            self._close_oldest_unauthenticated()
        connection = RankConnection(accepted, time.monotonic(), challenge())
        self.unauthenticated[accepted] = connection
        try:
            self._selector.register(accepted, selectors.EVENT_READ, connection)
            accepted.send(f"{connection.challenge}\n".encode())
        except OSError:
            self.close(connection)

    def _close_oldest_unauthenticated(self) -> None:
        if self.unauthenticated:
            self.close(next(iter(self.unauthenticated.values())))

    def _receive(self, connection: RankConnection) -> None:
        """Raises ValueError for data that no rank sends."""
        try:
            data = connection.socket.recv(1 << 16 if connection.channel else LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self.close(connection)
        if not connection.channel:
            connection.unparsed += data
            line, newline, data = connection.unparsed.partition(b"\n")
            if len(line) > LINE_BYTES:
                raise ValueError(f"a line of more than {LINE_BYTES} bytes")
            if not newline:
                return
            self._authenticate(connection, line)
        assert connection.channel
        for text in connection.channel.feed(data):
            self._on_message(connection, text)

    def _authenticate(self, connection: RankConnection, line: bytes) -> None:
        """Raises ValueError unless `line` proves that this is a rank of this run which has not connected before."""
        rank, rank_challenge = read_hello(self._key, line, connection.challenge)
        if rank >= self._world_size or rank in self.ranks:
            log.warning("refused a connection for rank %d: it is connected already, or there is no such rank", rank)
            raise ValueError("not a rank that is still to connect")
        del self.unauthenticated[connection.socket]
        connection.rank, connection.unparsed, connection.last_received = rank, b"", time.monotonic()
        connection.channel = Channel(self._key, rank, connection.challenge, rank_challenge, is_rank_0=True)
        self.ranks[rank] = connection
        connection.socket.send(welcome(self._key, rank, connection.challenge, rank_challenge) + b"\n")
        if len(self.ranks) == self._world_size:
            self._close_port()

    def _close_port(self) -> None:
        """All ranks are connected: no other connection is legitimate."""
        if self._accept_again_at is None:
            self._selector.unregister(self._listener)
        self._accept_again_at = None
        self._listener.close()
        for connection in list(self.unauthenticated.values()):
            self.close(connection)


def _listen(address: str) -> socket.socket:
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):  # this host does not have the address
            return socket.create_server((address, 0), family=family, backlog=4096)
    try:
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    except (OSError, ValueError):  # this host has no IPv6
        return socket.create_server(("", 0), backlog=4096)


def _raise_file_limit(number: int) -> None:
    """Raise the limit on open files to `number` if it is lower. Raises UserError if the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return
    if hard != resource.RLIM_INFINITY and hard < number - _OTHER_FILES // 2:
        raise UserError(
            f"rank 0 needs about {number} open files for the connections of all ranks, but the limit is {hard}; raise "
            f"it (`ulimit -Hn {number}`, or LimitNOFILE of slurmd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (number if hard == resource.RLIM_INFINITY else min(number, hard), hard))
