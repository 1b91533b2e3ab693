"""Every start of a run has a number, and only the newest may write.

A node that loses its network goes on running; the scheduler starts the run anew elsewhere, and locks of a file system
that gave the node up are free again. So each start writes the next number into the run folder, and a writer looks
before it puts anything under a name that others read. What it writes until then lies under names of its own.
The same file says how the newest start is doing: its time of change is a sign of life.

Between a look and the rename after it a new start must not come: both hold a lock (`Fence.guard`). What remains is a
process that is stopped (SIGSTOP, a frozen node) between the two: a new start waits for it for `_PATIENCE` seconds and
then takes over, and the old one, when it wakes up, does the one rename it was about to do. `check` repairs
`writer.json` after that, and `train/line_file.py` its files of lines.
"""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_dist.errors import UserError
from mythos_dist.files import read_json_lines, write_atomically
from mythos_dist.parallel.launcher import read_job_id
from mythos_dist.parallel.process_identity import identity

FILE, GUARD = "writer.json", "writer.guard"
_ABOUT = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")  # of the job that this start is part of
_PATIENCE = 5.0  # seconds to wait for another process that is between a look and a rename


@dataclass(frozen=True)
class Fence:
    """One start of a run."""

    run_dir: Path
    start: int  # from 1; unlike SLURM_RESTART_COUNT it also counts starts by hand
    token: str = ""  # on rank 0: two starts may have had the same number after `writer.json` was lost

    @staticmethod
    def take(run_dir: Path) -> "Fence":
        """Make this the newest start; by rank 0, which holds the folder's lock. Raises OSError."""
        with _locked(run_dir / GUARD, force=True):
            newest = newest_start(run_dir).get("start")
            if newest is None:  # the first start, or its file was lost
                starts = [line.get("start") for line in read_json_lines(run_dir / "restarts.jsonl")]
                newest = max((number for number in starts if isinstance(number, int)), default=0)
            fence = Fence(run_dir, newest + 1, secrets.token_hex(8))
            fence._write("running", "", None)
        return fence

    def check(self) -> None:
        """Raise UserError if the run was started again since."""
        newest = newest_start(self.run_dir)
        number, token = newest.get("start", self.start), newest.get("token")
        if number < self.start and self.token:
            # An earlier start was stopped between its look and its rename, and has just woken up.
            with suppress(OSError):
                self._write("running", "", None)
        elif number > self.start or (number == self.start and self.token and token not in (None, self.token)):
            raise UserError(
                f"run.dir={self.run_dir} was taken over by start {number} of this run, on "
                f"{newest.get('host')} (pid {newest.get('pid')}); this is start {self.start}, and it ends here"
            )

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around a write under a name that others read: no other start begins meanwhile.

        Raises UserError if one has begun before; nothing is to be written then.
        """
        with _locked(self.run_dir / GUARD):
            self.check()
            yield

    def note(self, state: str, why: str, step: int | None, published: int | None = None) -> None:
        """Write down how this start is doing: running, stopped, failed or completed. By rank 0.

        published: the step of the newest checkpoint; None: as noted before. Raises UserError if the run was started
        again since, OSError if it cannot be written.
        """
        with self.guard():
            self._write(state, why, step, published)

    def show_life(self) -> None:
        """Change the file's time, unless the run was started again since."""
        with suppress(OSError, UserError):
            self.check()
            os.utime(self.run_dir / FILE)

    def _write(self, state: str, why: str, step: int | None, published: int | None = None) -> None:
        about: dict[str, Any] = {"start": self.start, "token": self.token, **identity()}
        about |= {name.lower(): os.environ[name] for name in _ABOUT if name in os.environ}
        before, now = newest_start(self.run_dir), time.time()
        began = before.get("began") if before.get("start") == self.start else now
        published = before.get("published") if published is None else published
        about |= {"launch": read_job_id(), "state": state, "why": why, "step": step, "published": published}
        write_atomically(self.run_dir / FILE, json.dumps(about | {"began": began, "time": now}) + "\n")


def newest_start(run_dir: Path) -> dict[str, Any]:
    """What the newest start has written of itself; empty if there was none, or if its file is damaged."""
    try:
        about = json.loads((run_dir / FILE).read_bytes())
        return about if isinstance(about.get("start"), int) else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


@contextmanager
def _locked(file: Path, force: bool = False) -> Iterator[None]:
    """Hold a lock on `file`. Where there are no locks, and after `_PATIENCE` seconds, without.

    force: a process that holds it for longer keeps a file without a name, and the lock is free for all others.
    """
    handle = None
    with suppress(OSError):
        handle = _lock(file)
        if handle is None and force:
            file.unlink(missing_ok=True)
            handle = _lock(file)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(file: Path) -> int | None:
    """A descriptor of `file`, locked; None if another process keeps the lock. Raises OSError where there are none."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(file)):  # else another process has just replaced it
                return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                return None
            time.sleep(0.005)
        except FileNotFoundError:
            pass
        except OSError:
            os.close(handle)
            raise
        os.close(handle)
