"""Every start of a run has a number, and only the newest may write.

A node that loses its network goes on running; the scheduler starts the run anew elsewhere, and locks of a file system
that gave the node up are free again. So each start writes the next number into the run folder, and a writer looks
before it puts anything under a name that others read. What it writes until then lies under names of its own.
"""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from mythos_dist.errors import UserError

FILE = "writer.json"


@dataclass(frozen=True)
class Fence:
    """One start of a run."""

    run_dir: Path
    start: int  # from 1; unlike SLURM_RESTART_COUNT it also counts starts by hand

    @staticmethod
    def take(run_dir: Path) -> "Fence":
        """Make this the newest start; by rank 0, which holds the folder's lock."""
        start = _read(run_dir).get("start", 0) + 1
        about = {"start": start, "host": socket.gethostname(), "pid": os.getpid()}
        about |= {
            name.lower(): os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if name in os.environ
        }
        temporary = run_dir / f"{FILE}.tmp-{os.getpid()}"
        temporary.write_text(json.dumps(about) + "\n")
        temporary.replace(run_dir / FILE)
        return Fence(run_dir, start)

    def check(self) -> None:
        """Raise UserError if the run was started again since."""
        newest = _read(self.run_dir)
        if newest.get("start", self.start) != self.start:
            raise UserError(
                f"run.dir={self.run_dir} was taken over by start {newest['start']} of this run, on "
                f"{newest.get('host')} (pid {newest.get('pid')}); this is start {self.start}, and it ends here"
            )


def _read(run_dir: Path) -> dict:
    try:
        about = json.loads((run_dir / FILE).read_text())
        return about if isinstance(about.get("start"), int) else {}
    except (OSError, ValueError, AttributeError):
        return {}
