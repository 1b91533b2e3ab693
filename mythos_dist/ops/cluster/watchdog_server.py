"""Rank 0's side of the watchdog: a thread that monitors all ranks and, when one fails, sends all the reason to exit.

It ends the run when a connection closes unexpectedly, when a rank sends nothing for `lost_after` seconds, when a rank
reports an error, or when a phase takes longer than `hang_after`. In the last case it first asks every rank for the
collectives that it has called, to name the ranks that block the others.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from mythos_dist.ops.cluster.rank_connections import RankConnection, RankConnections
from mythos_dist.ops.cluster.recorder import find_blocking_ranks
from mythos_dist.ops.cluster.watchdog_protocol import RankMessage, ServerMessage, WatchdogLimits

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0  # from the first failure to the decision: the rank that failed first may be detected last
_CONNECT_MORE = 5.0  # seconds to connect beyond `lost_after`, the time after which ranks themselves stop trying
_EXIT_WITHIN = 2.0  # seconds that ranks get to read the reason and exit
_KEEPALIVE_EVERY = 10.0  # seconds

# Priorities of failures: those with the lowest number are reported as the reason.
_LOST, _ERROR, _CONSEQUENCE = 0, 1, 2


class WatchdogServer:
    def __init__(
        self, nodes: list[str], limits: WatchdogLimits, key: bytes, keepalive: Callable[[], Any], address: str = ""
    ):
        """Listen at `address` (empty: on all interfaces) and start the thread.

        nodes: of each rank. keepalive: called every ten seconds, for as long as the server is running.
        """
        self.nodes, self.limits = nodes, limits
        self.connections = RankConnections(len(nodes), key, address, self._handle_message, self._handle_closed)
        self.failures: list[tuple[int, str]] = []  # (priority, what failed)
        self.decide_at: float | None = None  # time.monotonic(); set by the first failure
        self.hang = ""  # the phase that hangs, once collectives were asked for
        self.all_done = threading.Event()  # every rank but 0 is done
        self.finished = threading.Event()  # the reason was sent, and the other ranks have exited
        self._keepalive = keepalive
        self._last_keepalive = self._started = time.monotonic()
        threading.Thread(target=self._run, name="watchdog server", daemon=True).start()

    def _run(self) -> None:
        while self.decide_at is None or time.monotonic() < self.decide_at:
            try:
                self._monitor()
            except Exception:
                log.exception("internal error of the watchdog server; it continues")
                time.sleep(0.2)
        try:
            self._end_run()
            self._wait_until_closed(time.monotonic() + _EXIT_WITHIN)
        finally:
            self.finished.set()

    def _monitor(self) -> None:
        """One iteration: handle messages, then check all ranks."""
        self.connections.poll()
        now = time.monotonic()
        self.connections.expire(now)
        if now - self._last_keepalive > _KEEPALIVE_EVERY:
            self._last_keepalive = now
            try:
                self._keepalive()
            except Exception as error:  # the file system may be unavailable for a moment
                log.warning("cannot update the run's liveness file: %s", error)
        monitored = [connection for connection in self.connections.ranks.values() if not connection.done]
        self._check_responding(monitored, now)
        self._check_connected(now)
        self._check_progress(monitored, now)

    # ---- messages

    def _handle_message(self, connection: RankConnection, text: str) -> None:
        try:
            message = RankMessage.model_validate_json(text)
            if message.report is not None:
                message.report.check(len(self.nodes))
        except ValueError as error:  # ignored; it does not count as a response either
            log.warning("invalid message from %s: %s", self._name(connection.rank), " ".join(str(error).split())[:500])
            return
        connection.last_received = time.monotonic()
        if message.phase is not None:
            connection.phase, connection.age = message.phase, message.age
            self.connections.send(connection, ServerMessage(ok=1))
        if message.bye:
            connection.done = True
        if message.failed is not None:
            connection.done = True
            priority = _ERROR if message.cause else _CONSEQUENCE
            self._add_failure(priority, f"{self._name(connection.rank)} failed: {message.failed}")
        if message.report is not None:
            connection.collectives = message.report
        self._update_all_done()

    def _handle_closed(self, connection: RankConnection, reason: str) -> None:
        if not connection.done:
            connection.done = True
            self._add_failure(_LOST, f"{self._name(connection.rank)} {reason}")
        self._update_all_done()

    def _update_all_done(self) -> None:
        others = [connection for rank, connection in self.connections.ranks.items() if rank != 0]
        if len(others) == len(self.nodes) - 1 and all(connection.done for connection in others):
            self.all_done.set()

    # ---- checks

    def _check_responding(self, monitored: list[RankConnection], now: float) -> None:
        for connection in monitored:
            if now - connection.last_received > self.limits.lost_after:
                connection.done = True
                self._add_failure(
                    _LOST,
                    f"{self._name(connection.rank)} has not responded for {self.limits.lost_after:g} s: the process is "
                    "suspended, or its node is down or unreachable",
                )

    def _check_connected(self, now: float) -> None:
        missing = set(range(len(self.nodes))) - self.connections.ranks.keys()
        if missing and now - self._started > self.limits.lost_after + _CONNECT_MORE and self.decide_at is None:
            for rank in sorted(missing)[:8]:
                self._add_failure(
                    _LOST, f"{self._name(rank)} did not connect to the watchdog after the rendezvous: was it killed?"
                )

    def _check_progress(self, monitored: list[RankConnection], now: float) -> None:
        """If a phase hangs, ask all ranks for the collectives that they have called."""
        hanging = [c for c in monitored if c.age + now - c.last_received > self.limits.hang_after]
        if not hanging or self.hang:
            return
        # A rank that still responds knows which phase the run is in.
        reference = max(hanging, key=lambda c: (now - c.last_received < 3, c.age))
        self.hang = f"{reference.phase} exceeded faults.hang_after={self.limits.hang_after:g} s"
        for connection in monitored:
            self.connections.send(connection, ServerMessage(send_state=self.hang))
        self.decide_at = now + min(5.0, self.limits.lost_after)

    # ---- the end of the run

    def _add_failure(self, priority: int, text: str) -> None:
        self.failures.append((priority, text))
        if self.decide_at is None:
            # The other ranks write their stacks while later failures are awaited.
            self.decide_at = time.monotonic() + SETTLE_SECONDS
            for connection in list(self.connections.ranks.values()):
                if not connection.done:
                    self.connections.send(connection, ServerMessage(send_state=text))

    def _end_run(self) -> None:
        """Send all ranks the reason to exit."""
        reason = self._describe_hang() if self.hang else self._describe_failures()
        for connection in list(self.connections.ranks.values()):
            self.connections.send(connection, ServerMessage(end=reason[:20_000]))

    def _describe_failures(self) -> str:
        highest = min((priority for priority, _ in self.failures), default=None)
        texts = [text for priority, text in self.failures if priority == highest]
        return "; ".join(texts[:8])

    def _describe_hang(self) -> str:
        states = {rank: c.collectives for rank, c in self.connections.ranks.items() if c.collectives}
        blocking, collective = find_blocking_ranks(states)
        if not blocking:
            last = sorted({state.last for state in states.values()})
            return f"{self.hang}: all ranks have called the same collectives, the last one is {'; '.join(last[:4])}"
        names = []
        for rank in blocking[:8]:
            position = f"at {states[rank].at}" if rank in states else "no response"
            names.append(f"{self._name(rank)} ({position})")
        return f"{self.hang}: {', '.join(names)} did not call {collective}"

    def _wait_until_closed(self, until: float) -> None:
        """Wait until the other ranks have closed their connections: if rank 0 exited before they have read the reason,
        data in transit could be lost."""
        while time.monotonic() < until and any(rank and not c.closed for rank, c in self.connections.ranks.items()):
            self.connections.poll()

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.nodes[rank]}"
