"""Limits of one connection to a store: its time-outs, and the speed below which it is closed."""

import time
from typing import Any

CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0  # READ_SECONDS: without a byte
CHUNK_BYTES = 1 << 20
# A connection that is slower for SLOW_SECONDS is closed, and the attempt repeated: others may be fast.
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 30.0, 10_000


class TooSlow(Exception):
    """The connection is slower than SLOW_BYTES_PER_SECOND."""


class SpeedCheck:
    """Counts the bytes of a connection."""

    def __init__(self) -> None:
        self._since, self._bytes = time.monotonic(), 0

    def add(self, size: int) -> None:
        """Count `size` bytes that have arrived. Raises TooSlow."""
        self._bytes += size
        if (seconds := time.monotonic() - self._since) > SLOW_SECONDS:
            if self._bytes < SLOW_BYTES_PER_SECOND * seconds:
                raise TooSlow(f"only {self._bytes / seconds / 1000:.1f} kB/s for {seconds:.0f} s")
            self._since, self._bytes = time.monotonic(), 0


def http_options() -> dict[str, Any]:
    """Options of fsspec's file system for http and https."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}
