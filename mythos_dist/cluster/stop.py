"""Requests to stop early: SIGUSR1 and SIGTERM, the end of `run.max_seconds`, a file STOP in the run folder.

A request that reaches one rank stops all of them behind the same step: each step begins with an all-reduce of one
number. Handlers only take a note, so a signal that comes twice, or in the middle of a collective, does no harm.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

FILE = "STOP"


class Stop:
    """What has asked this rank to stop."""

    def __init__(self) -> None:
        self.why = ""
        self._begin = time.monotonic()

    def listen(self, *numbers: signal.Signals) -> None:
        """From here on these signals are requests. Before that they end the process.

        SIGUSR1 is always one, from the first moment; SIGTERM while a rank waits for others means that none will come.
        """
        for number in numbers:
            signal.signal(number, self._note)

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
        if not self.why:
            self.why = f"{signal.Signals(number).name} to rank {os.environ.get('RANK', 0)}"


def forget(run_dir: Path) -> None:
    """The request was carried out; on rank 0."""
    (run_dir / FILE).unlink(missing_ok=True)
