"""A probe: what may hang, crash or print runs in a forked process of its own.

Forked because importing torch again takes seconds. The trap: CUDA does not survive a fork, so it starts before this
process initializes CUDA.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

SECONDS = 20  # timeout of a probe: imports from a cold file system, the start of NCCL
_FORK = multiprocessing.get_context("fork")


class Outcome(NamedTuple):
    """What a probe returned, or why it returned nothing."""

    value: Any = None
    seconds: float = 0.0
    error: str = ""
    timed_out: bool = False


class Probe:
    """`function()`, running in a forked process, which ends with this one at the latest."""

    def __init__(self, function: Callable[[], Any]):
        self._reader, writer = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_send_outcome, args=(function, writer), daemon=True)
        self._process.start()
        writer.close()  # the child has the only one now, so that the pipe ends if the child is killed

    def outcome(self, seconds: float | None = None) -> Outcome:
        """Wait for at most `seconds` (None: SECONDS), then kill the process. Call it once."""
        seconds = SECONDS if seconds is None else seconds
        if not self._reader.poll(seconds):
            self._process.kill()
            return Outcome(error=f"no answer in {seconds:g} s", timed_out=True)
        try:
            return self._reader.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Outcome(error=f"the process was killed by {by}")


def _send_outcome(function: Callable[[], Any], writer: Connection) -> None:
    """In the child: send what `function` returns, or its error; discard what libraries print."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    begin = time.perf_counter()
    try:
        outcome = Outcome(function(), time.perf_counter() - begin)
    except Exception as error:
        message = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        outcome = Outcome(error=f"{type(error).__name__}: {message[-1]}")  # NCCL gives the cause last
    writer.send(outcome)


def join_group() -> None:
    """Join a process group of one on loopback, with training's backend, and run one all-reduce."""
    import torch
    import torch.distributed as dist

    backend, timeout = "nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=SECONDS)
    # A store of our own: `init_method` would use a launcher's variables and connect to the store of its job.
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    ones = torch.ones(2, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(ones)
    if ones.tolist() != [1, 1]:
        raise RuntimeError(f"an all-reduce of ones over one rank returned {ones.tolist()}")
    dist.destroy_process_group()
