"""Every start of a run has a number, and only the newest may write.

A node that loses its network goes on running; the scheduler starts the run anew elsewhere, and locks of a file system
that gave the node up are free again. So each start writes the next number into the run folder, and a writer looks
before it puts anything under a name that others read. What it writes until then lies under names of its own.
The same file says how the newest start is doing: its time of change is a sign of life.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_dist.cluster.place import launch_of
from mythos_dist.errors import UserError

FILE = "writer.json"
_ABOUT = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")  # of the job that this start is part of


@dataclass(frozen=True)
class Fence:
    """One start of a run."""

    run_dir: Path
    start: int  # from 1; unlike SLURM_RESTART_COUNT it also counts starts by hand

    @staticmethod
    def take(run_dir: Path) -> "Fence":
        """Make this the newest start; by rank 0, which holds the folder's lock."""
        fence = Fence(run_dir, newest_start(run_dir).get("start", 0) + 1)
        fence._write("running", "", None)
        return fence

    def check(self) -> None:
        """Raise UserError if the run was started again since."""
        newest = newest_start(self.run_dir)
        if newest.get("start", self.start) != self.start:
            raise UserError(
                f"run.dir={self.run_dir} was taken over by start {newest['start']} of this run, on "
                f"{newest.get('host')} (pid {newest.get('pid')}); this is start {self.start}, and it ends here"
            )

    def note(self, state: str, why: str, step: int | None) -> None:
        """Write down how this start is doing: running, stopped, failed or completed. By rank 0.

        Raises UserError if the run was started again since, OSError if it cannot be written.
        """
        self.check()
        self._write(state, why, step)

    def show_life(self) -> None:
        """Change the file's time, unless the run was started again since."""
        with suppress(OSError, UserError):
            self.check()
            os.utime(self.run_dir / FILE)

    def _write(self, state: str, why: str, step: int | None) -> None:
        about: dict[str, Any] = {"start": self.start, "host": socket.gethostname(), "pid": os.getpid()}
        about |= {name.lower(): os.environ[name] for name in _ABOUT if name in os.environ}
        about |= {"launch": launch_of(), "state": state, "why": why, "step": step, "time": time.time()}
        temporary = self.run_dir / f"{FILE}.tmp-{os.getpid()}"
        temporary.write_text(json.dumps(about) + "\n")
        temporary.replace(self.run_dir / FILE)


def newest_start(run_dir: Path) -> dict[str, Any]:
    """What the newest start has written of itself; empty if there was none."""
    try:
        about = json.loads((run_dir / FILE).read_text())
        return about if isinstance(about.get("start"), int) else {}
    except (OSError, ValueError, AttributeError):
        return {}
