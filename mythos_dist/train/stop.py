"""Requests to stop early: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, the end of `run.max_seconds`, a file STOP in run.dir.

A request that reaches one rank stops all of them after the same step: each step begins with an all-reduce of one
number. Handlers only take a note, so a signal that comes twice, or in the middle of a collective, does no harm.

Ctrl-C is different in two ways. While there is nothing to save (imports, roll call, checks) it ends the process at
once, and so does a second one later. The trap: Python runs handlers between two bytecodes of the main thread, and a
rank that waits in a collective executes none. So a thread receives the number of each signal through a pipe.
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
from typing import Any

from mythos_dist.errors import EXIT_INTERRUPTED

log = logging.getLogger(__name__)

FILE = "STOP"
# A terminal signals every process of a job, and launchers pass on what they get: one Ctrl-C may arrive twice.
_ONE_KEYSTROKE = 1.0  # seconds
_NAMES = {signal.SIGINT: "Ctrl-C (SIGINT)"}


class Stop:
    """What has asked this rank to stop."""

    def __init__(self) -> None:
        self.why = ""
        self.on_leave: Callable[[str], None] = lambda why: None  # called before a second Ctrl-C ends the process
        self._run_dir: Path | None = None  # set: a request is carried out after the next step
        self._begin = time.monotonic()
        self._first_interrupt: float | None = None
        self._pipe: tuple[socket.socket, socket.socket] | None = None
        self._parent = os.getppid()

    def listen(self, *numbers: signal.Signals) -> None:
        """From here on these signals are requests. Before that they end the process.

        SIGUSR1 is always one, from the first moment; SIGTERM while a rank waits for others means that none will come.
        One that is ignored already (nohup: SIGHUP; a script's background job: SIGINT) stays ignored.
        """
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
                if number == signal.SIGINT:
                    self._receive()

    def after_the_next_step(self, run_dir: Path) -> None:
        """From here on Ctrl-C and SIGHUP, too, are requests that `agreed` returns: there is a run to save."""
        self._run_dir = run_dir
        self.listen(signal.SIGHUP)

    def agreed(self, run_dir: Path, max_seconds: float | None) -> str:
        """Why all ranks stop now; empty: they go on. Every rank calls this at the same place."""
        import torch.distributed as dist  # not above: handlers are there before torch, which takes seconds

        from mythos_dist.parallel.process import any_rank

        if not self.why and max_seconds is not None and time.monotonic() - self._begin > max_seconds:
            self.why = f"run.max_seconds={max_seconds:g} are over"
        if not self.why and dist.get_rank() == 0 and (run_dir / FILE).exists():
            self.why = f"{run_dir / FILE} asked for it"
        if not any_rank(bool(self.why)):
            return ""
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, self.why)
        return next(why for why in reasons if why)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._run_dir is None:
            return  # the thread ends this process
        if not self.why:
            name = _NAMES.get(signal.Signals(number), signal.Signals(number).name)
            self.why = f"{name} to rank {_rank()}"

    def _receive(self) -> None:
        """Let a thread see every signal's number, whatever the main thread does."""
        if self._pipe is None:
            receiver, sender = self._pipe = socket.socketpair()
            sender.setblocking(False)
            signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._run, args=(receiver,), name="Ctrl-C", daemon=True).start()

    def _run(self, receiver: socket.socket) -> None:
        """In the thread. torchrun starts ranks in sessions of their own, where no second Ctrl-C arrives: then the end
        of torchrun is one."""
        while True:
            try:
                numbers = receiver.recv(64)
            except TimeoutError:
                if os.getppid() != self._parent:
                    self._leave("the launcher was ended by a second Ctrl-C")
                continue
            if signal.SIGINT in numbers:
                self._interrupted()
                if "TORCHELASTIC_RUN_ID" in os.environ:
                    receiver.settimeout(0.5)

    def _interrupted(self) -> None:
        now = time.monotonic()
        if self._run_dir is None:
            self._leave("")
        elif self._first_interrupt is None:
            self._first_interrupt = now
            _say("Ctrl-C: stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")
        elif now - self._first_interrupt > _ONE_KEYSTROKE:
            self._leave("ended by a second Ctrl-C, before a checkpoint of its last step")

    def _leave(self, why: str) -> None:
        """End this process. No clean-up that could wait for others: whatever is not published has no name yet."""
        if self._run_dir is None:
            _say("stopped by Ctrl-C before the first step; nothing was lost")
        else:
            noting = threading.Thread(target=self.on_leave, args=(why,), daemon=True)
            noting.start()
            noting.join(3.0)  # a file system that hangs must not keep it
            newest = newest_checkpoint(self._run_dir)
            resumes = f"resumes from {newest}" if newest else "starts from the beginning: no checkpoint was saved yet"
            _say(f"stopped at once; the same command {resumes}")
        os._exit(EXIT_INTERRUPTED)


def newest_checkpoint(run_dir: Path) -> str:
    """The name of the checkpoint that `latest` points to; empty: there is none."""
    try:
        name = (run_dir / "checkpoints" / "latest").read_text().strip()
        return name if name and (run_dir / "checkpoints" / name).is_dir() else ""
    except (OSError, ValueError):
        return ""


def forget(run_dir: Path) -> None:
    """The request was carried out; on rank 0."""
    try:
        (run_dir / FILE).unlink(missing_ok=True)
    except OSError as error:
        log.warning(
            "%s cannot be removed (%s); remove it, or the next start stops, too", run_dir / FILE, error.strerror
        )


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def _say(text: str) -> None:
    """On rank 0. Not through `print`: the main thread may hold the stream's lock."""
    if _rank() == "0":
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
