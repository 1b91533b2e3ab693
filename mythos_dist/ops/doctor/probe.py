"""Looks that may hang, crash or print: each in a forked process of its own, so that nothing takes the report along.

Forked and not started anew, because torch is imported for seconds. The trap: CUDA does not survive a fork, so probes
start before this process has asked torch for GPUs.
"""

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

SECONDS = 20  # that a probe may take: imports from a cold file system, the start of NCCL
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    """What a probe found, or why it did not."""

    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    timed_out: bool = False


class Probe:
    """`look()`, running in a process of its own; what it returns must go into JSON."""

    def __init__(self, look: Callable[[], dict[str, Any]]):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the outcome is read
        # A daemon: it ends with this process.
        self._process = _FORK.Process(target=_write_outcome, args=(look, self._file.fileno()), daemon=True)
        self._process.start()

    def outcome(self, seconds: float | None = None) -> Outcome:
        """Wait for it, at most so long (None: SECONDS), and kill it then. To be called once."""
        seconds = SECONDS if seconds is None else seconds
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            return Outcome(error=f"no answer in {seconds:g} s", timed_out=True)
        if code < 0:
            return Outcome(error=f"the process died of {signal.Signals(-code).name}")
        with self._file:
            self._file.seek(0)
            return Outcome(**json.loads(self._file.read()))


def _write_outcome(look: Callable[[], dict[str, Any]], file: int) -> None:
    """In the child: `look()` or its error, as JSON into `file`; what libraries print goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        told: dict[str, Any] = {"values": look()}
    except Exception as error:
        said = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        told = {"error": f"{type(error).__name__}: {said[-1]}"}  # NCCL gives the cause last
    os.write(file, json.dumps(told).encode())


def join_group() -> dict[str, Any]:
    """Join a process group of one on loopback, with the backend that training would take, and pass a collective."""
    import torch
    import torch.distributed as dist

    begin = time.perf_counter()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # A store of our own: `init_method` would follow a launcher's variables to the store of its job.
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=SECONDS))
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=SECONDS))
    numbers = torch.ones(2, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(numbers)
    if numbers.tolist() != [1, 1]:
        raise RuntimeError(f"an all-reduce over one rank made {numbers.tolist()} of ones")
    dist.destroy_process_group()
    return {"seconds": time.perf_counter() - begin}


def import_reader() -> dict[str, Any]:
    """Import streaming's reader of shards, as training does."""
    from mythos_dist.data.windows import import_reader

    begin = time.perf_counter()
    import_reader()
    return {"seconds": time.perf_counter() - begin}


def look_up() -> dict[str, Any]:
    """{name: address or None} of this host's own name and of MASTER_ADDR. A sick DNS takes a minute to say no."""
    addresses: dict[str, Any] = {}
    for name in {socket.gethostname(), os.environ.get("MASTER_ADDR", "")} - {""}:
        try:
            addresses[name] = socket.getaddrinfo(name, None)[0][4][0]
        except OSError:
            addresses[name] = None
    return addresses
