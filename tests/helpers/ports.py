"""A separate TCP port for each launch of ranks, also when several test sessions run on this machine.

A port assigned by the kernel (bind to 0, close, pass the number on) can be assigned again before the ranks listen. So
ports are taken from below the kernel's ephemeral range, and each is reserved by a file lock while its launch runs.
"""

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PORTS = range(20000, 32000)  # /proc/sys/net/ipv4/ip_local_port_range starts at 32768


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of 127.0.0.1 that no other test uses while the context is open."""
    folder = Path(tempfile.gettempdir(), f"mythos-test-ports-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with (folder / str(port)).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with socket.socket() as probe:
                    # Connections of an earlier launch may still be in TIME_WAIT.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            yield port
            return
    raise RuntimeError(f"no free port from {_PORTS.start} to {_PORTS.stop - 1}")
