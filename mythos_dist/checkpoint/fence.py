"""Fencing: every start of a run takes a number, and only the newest start may write in the run folder.

A node that loses its network keeps running while the scheduler restarts the run elsewhere, and the file system releases
the locks of a node that it cannot reach. So each start writes the next number into `writer.json`, and a writer
checks that file before it renames anything to its final name; until then its files have temporary names of their own.
`writer.json` also holds the status of the newest start, and its modification time is that start's heartbeat.

No start may begin between a writer's check and its rename, so both happen under a lock (`Fence.guard`). A process may
be suspended there (SIGSTOP, a paused VM), and may lose its lock. A new start waits `_LOCK_TIMEOUT` seconds for it and
then takes over. So a writer creates its temporary file or folder *before* it checks, and a new start removes those of
all earlier starts *after* it has written its number (`run_folder.take_over`): when the old process continues, there is
nothing left that it could rename. For appended lines see `train/line_file.py`.

Decisions: CHECKPOINT-4, CHECKPOINT-13.
"""

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
from mythos_dist.files import lock_file, read_json_lines, replacing, write_atomically
from mythos_dist.parallel.launcher import read_job_id
from mythos_dist.parallel.process_identity import identity

FILE, GUARD = "writer.json", "writer.guard"
_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
_LOCK_TIMEOUT = 5.0  # seconds to wait for a process that is between its check and its rename


@dataclass(frozen=True)
class Fence:
    """One start of a run."""

    run_dir: Path
    start: int  # from 1; unlike SLURM_RESTART_COUNT it also counts starts by hand
    token: str = ""  # on rank 0: after `writer.json` was lost, two starts may have the same number

    @staticmethod
    def take(run_dir: Path) -> "Fence":
        """Make this the newest start. Raises OSError.

        Earlier starts may still do the rename that they are about to do, until `run_folder.take_over` has removed
        their temporary files.
        """
        with _locked(run_dir / GUARD, force=True), replacing(run_dir / FILE) as stream:
            newest = newest_start(run_dir).get("start")
            if newest is None:  # the first start, or the file was lost
                starts = [line.get("start") for line in read_json_lines(run_dir / "restarts.jsonl")]
                newest = max((number for number in starts if isinstance(number, int)), default=0)
            fence = Fence(run_dir, newest + 1, secrets.token_hex(8))
            stream.write(fence._content("running", "", None).encode())
        return fence

    def replace(self, file: Path, content: str | bytes) -> None:
        """Replace a file of the run folder. Raises OSError, and UserError if the run was started again since."""
        try:
            write_atomically(file, content, f".tmp-{self.start}", before_rename=self.check)
        except FileNotFoundError:
            self.check()  # a newer start has removed the temporary file
            raise

    def check(self) -> None:
        """Raise UserError if the run was started again since."""
        newest = newest_start(self.run_dir)
        number, token = newest.get("start", self.start), newest.get("token")
        if number < self.start and self.token:
            # Another version's process, or a restored copy: ours has no temporary file to rename (`take_over`).
            with suppress(OSError):
                write_atomically(self.run_dir / FILE, self._content("running", "", None))
        elif number > self.start or (number == self.start and self.token and token not in (None, self.token)):
            raise UserError(
                f"run.dir={self.run_dir} was taken over by start {number} of this run, on "
                f"{newest.get('host')} (pid {newest.get('pid')}); this is start {self.start}, which ends here"
            )

    @contextmanager
    def guard(self) -> Iterator[None]:
        """A context for renaming files to their final names: no other start begins meanwhile.

        Raises UserError, before the block runs, if another start has begun.
        """
        with _locked(self.run_dir / GUARD):
            self.check()
            yield

    def record_status(self, status: str, why: str, step: int | None, published: int | None = None) -> None:
        """Write this start's status (running, stopped, failed or completed) to `writer.json`. Called by rank 0.

        published: step of the newest checkpoint; None: as recorded before. Raises UserError if the run was started
        again since, OSError if the file cannot be written.
        """
        with self.guard():
            self.replace(self.run_dir / FILE, self._content(status, why, step, published))

    def heartbeat(self) -> None:
        """Update the modification time of `writer.json`, unless the run was started again since."""
        with suppress(OSError, UserError):
            self.check()
            os.utime(self.run_dir / FILE)

    def _content(self, status: str, why: str, step: int | None, published: int | None = None) -> str:
        """The content of `writer.json`."""
        about: dict[str, Any] = {"start": self.start, "token": self.token, **identity()}
        about |= {name.lower(): os.environ[name] for name in _JOB_VARIABLES if name in os.environ}
        before, now = newest_start(self.run_dir), time.time()
        began = before.get("began") if before.get("start") == self.start else now
        published = before.get("published") if published is None else published
        about |= {"launch": read_job_id(), "state": status, "why": why, "step": step, "published": published}
        return json.dumps(about | {"began": began, "time": now}) + "\n"


def newest_start(run_dir: Path) -> dict[str, Any]:
    """What the newest start wrote to `writer.json`; empty if there was none, or if the file is damaged."""
    try:
        about = json.loads((run_dir / FILE).read_bytes())
        return about if isinstance(about.get("start"), int) else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


@contextmanager
def _locked(file: Path, force: bool = False) -> Iterator[None]:
    """Hold a lock on `file`; continue without it where locks are not supported, and after `_LOCK_TIMEOUT` seconds.

    force: after the timeout, replace the file: a suspended process keeps its lock, but on a file without a name.
    """
    handle = None
    with suppress(OSError):
        handle = lock_file(file, _LOCK_TIMEOUT)
        if handle is None and force:
            file.unlink(missing_ok=True)
            handle = lock_file(file, _LOCK_TIMEOUT)
    try:
        yield
    finally:
        if handle is not None:
            handle.close()
