"""A Python wrapper for drills: training sleeps before each late step of a new run, so that the fault occurs in time.

A short run could end before the fault, and a long one would waste compute. `paced(folder, step, seconds)` writes the
wrapper. It runs `-m mythos_dist.train` as Python does, but calls `time.sleep(seconds)` before each step from `step` on.
For other modules, and if the run folder already contains a run, it is plain Python.

Decisions: PROJECT-4.
"""

import os
import runpy
import shlex
import sys
import time
from pathlib import Path

MODULE = "mythos_dist.train"


def paced(folder: Path, step: int, seconds: float) -> Path:
    """Write the wrapper, a script in `folder`, and return its path."""
    script, python = folder / "python", shlex.quote(sys.executable)
    this = shlex.quote(str(Path(__file__).resolve()))
    script.write_text(
        f'#!/bin/sh\n[ "$1 $2" != "-m {MODULE}" ] || exec {python} {this} {step} {seconds} "$@"\nexec {python} "$@"\n'
    )
    script.chmod(0o755)
    return script


def main() -> None:
    step, seconds = int(sys.argv[1]), float(sys.argv[2])
    sys.argv[:] = sys.argv[4:]  # the module name and its arguments
    sys.path[0] = os.getcwd()  # as `python -m` sets it
    folders = [text.removeprefix("run.dir=") for text in sys.argv if text.startswith("run.dir=")]
    # All ranks check this before the rendezvous, so before rank 0 writes writer.json.
    if folders and not Path(folders[-1], "writer.json").exists():
        from mythos_dist.ops.cluster.inject import FaultInjector

        before = FaultInjector.before_step

        def wait(self: FaultInjector, number: int) -> None:
            before(self, number)
            time.sleep(seconds if number >= step else 0)

        FaultInjector.before_step = wait
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
