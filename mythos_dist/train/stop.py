"""Requests to stop early: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, the end of `run.max_seconds`, a file STOP in run.dir.
And the request for a profile: a file PROFILE in run.dir.

A request that reaches one rank stops all ranks after the same step: each step begins with an all-reduce of two flags.
Signal handlers only set a variable, so a signal that comes twice, or during a collective, does no harm.

Ctrl-C is different in two ways. While there is nothing to save (imports, rendezvous, checks) it ends the process at
once, and so does a second one later. The trap: Python runs handlers between two bytecodes of the main thread, and a
rank that waits in a collective executes none. So a thread receives the number of each signal through a socket pair.

Decisions: CLUSTER-6, CLUSTER-10.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mythos_dist.errors import EXIT_INTERRUPTED

log = logging.getLogger(__name__)

FILE = "STOP"
PROFILE = "PROFILE"
# A terminal signals every process of a job, and launchers forward signals: one Ctrl-C may arrive twice.
_ONE_KEYSTROKE = 1.0  # seconds
_SIGNAL_NAMES = {signal.SIGINT: "Ctrl-C (SIGINT)"}


class AgreedRequests(NamedTuple):
    """What all ranks have agreed to do before a step."""

    stop: str = ""  # why they stop; empty: they do not
    profile: bool = False  # record a profile of the next steps


class StopHandler:
    """Whether and why this rank was asked to stop."""

    def __init__(self) -> None:
        self.reason = ""  # empty: no request
        self.on_exit: Callable[[str], None] = lambda reason: None  # called before a second Ctrl-C ends the process
        self._run_dir: Path | None = None  # None: there is nothing to save yet
        self._began = time.monotonic()
        self._first_interrupt: float | None = None
        self._pipe: tuple[socket.socket, socket.socket] | None = None
        self._parent = os.getppid()
        self._keeps_profile_file = False  # PROFILE could not be removed, and must not count again

    def handle(self, *signals: signal.Signals) -> None:
        """From now on these signals are requests to stop. Before, they end the process.

        SIGUSR1 is handled from the first moment. SIGTERM is not handled while a rank waits for other ranks, because it
        means that they will not come. A signal that is ignored already (nohup: SIGHUP; a script's background job:
        SIGINT) stays ignored.
        """
        for number in signals:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
                if number == signal.SIGINT:
                    self._start_thread()

    def stop_after_step(self, run_dir: Path) -> None:
        """From now on Ctrl-C and SIGHUP, too, stop the run after its step, because there is a run to save."""
        self._run_dir = run_dir
        self.handle(signal.SIGHUP)

    def agree(self, run_dir: Path, max_seconds: float | None) -> AgreedRequests:
        """What all ranks do now. Every rank calls this before the same step."""
        import torch.distributed as dist  # not above: signals are handled before torch is imported, which takes seconds

        from mythos_dist.parallel.process import any_ranks

        if not self.reason and max_seconds is not None and time.monotonic() - self._began > max_seconds:
            self.reason = f"run.max_seconds={max_seconds:g} elapsed"
        wants_profile = False
        if dist.get_rank() == 0:
            if not self.reason and (run_dir / FILE).exists():
                self.reason = f"found {run_dir / FILE}"
            wants_profile = not self._keeps_profile_file and (run_dir / PROFILE).exists()
        stops, profile = any_ranks(bool(self.reason), wants_profile)
        if wants_profile:
            self._keeps_profile_file = not remove_request(run_dir / PROFILE, "the next start records a profile, too")
        if not stops:
            return AgreedRequests(profile=profile)
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, self.reason)
        return AgreedRequests(stop=next(reason for reason in reasons if reason))

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._run_dir is None:
            return  # the thread ends this process
        if not self.reason:
            name = _SIGNAL_NAMES.get(signal.Signals(number), signal.Signals(number).name)
            self.reason = f"rank {_rank()} received {name}"

    def _start_thread(self) -> None:
        """A thread that receives the number of every signal, whatever the main thread does."""
        if self._pipe is None:
            receiver, sender = self._pipe = socket.socketpair()
            sender.setblocking(False)
            signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._receive_signals, args=(receiver,), name="Ctrl-C", daemon=True).start()

    def _receive_signals(self, receiver: socket.socket) -> None:
        """The thread. torchrun starts ranks in sessions of their own, which a second Ctrl-C does not reach: there the
        end of torchrun counts as one."""
        while True:
            try:
                numbers = receiver.recv(64)
            except TimeoutError:
                if os.getppid() != self._parent:
                    self._exit("the launcher was ended by a second Ctrl-C")
                continue
            if signal.SIGINT in numbers:
                self._interrupted()
                if "TORCHELASTIC_RUN_ID" in os.environ:
                    receiver.settimeout(0.5)

    def _interrupted(self) -> None:
        now = time.monotonic()
        if self._run_dir is None:
            self._exit("")
        elif self._first_interrupt is None:
            self._first_interrupt = now
            _print("Ctrl-C: stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")
        elif now - self._first_interrupt > _ONE_KEYSTROKE:
            self._exit("a second Ctrl-C, before the checkpoint of the last step")

    def _exit(self, reason: str) -> None:
        """End this process without a clean-up that could wait for other ranks. Unpublished checkpoints are lost."""
        if self._run_dir is None:
            _print("stopped by Ctrl-C before the first step; nothing was lost")
        else:
            callback = threading.Thread(target=self.on_exit, args=(reason,), daemon=True)
            callback.start()
            callback.join(3.0)  # not longer: the file system may hang
            from mythos_dist.checkpoint.reader import latest_of  # not above: handlers are installed before slow imports

            newest = latest_of(self._run_dir / "checkpoints")
            resume = f"resume from {newest}" if newest else "start over: no checkpoint was saved yet"
            _print(f"stopped at once; run the same command to {resume}")
        os._exit(EXIT_INTERRUPTED)


def remove_stop_file(run_dir: Path) -> None:
    """On rank 0, when the run has stopped."""
    remove_request(run_dir / FILE, "the next start stops, too")


def remove_request(file: Path, otherwise: str) -> bool:
    """On rank 0. Returns whether the file is gone; a warning says what happens `otherwise`."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed (%s); remove it, or %s", file, error.strerror, otherwise)
        return False
    return True


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def _print(text: str) -> None:
    """On rank 0. Not with `print`: the main thread may hold the stream's lock."""
    if _rank() == "0":
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
