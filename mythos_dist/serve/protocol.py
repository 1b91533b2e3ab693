"""uvicorn's HTTP protocol with time limits for clients that are slow to send a request's head, or to read.

uvicorn itself limits only how long an idle connection stays open. A client that sends half a head, or never reads what
it asked for, would hold its connection forever.

Decisions: SERVE-5.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # from the first byte of a request to the end of its head; or from connecting
READ_SECONDS = 60.0  # in which a client has to read something of what is ready for it


class TimedProtocol(H11Protocol):
    """Closes connections whose client exceeds a limit."""

    head_seconds, read_seconds = HEAD_SECONDS, READ_SECONDS
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancel(self._head_timer)
        self._read_timer = _cancel(self._read_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self.read_seconds, self._abort)

    def resume_writing(self) -> None:
        self._read_timer = _cancel(self._read_timer)
        super().resume_writing()

    def _watch_head(self) -> None:
        """The timer runs while a head is incomplete; more bytes of it do not extend the time."""
        has_request: Any = self.cycle is not None and not self.cycle.response_complete
        if has_request or self.timeout_keep_alive_task is not None:
            self._head_timer = _cancel(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._abort)

    def _abort(self) -> None:
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
