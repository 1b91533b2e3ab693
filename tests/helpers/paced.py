"""An interpreter for drills: training waits before each late step of a new run, so a fault comes while it is under way.

A run that is too short ends before the fault reaches it, a long one computes for nothing; a run that sleeps does
neither. `paced(folder, step, seconds)` writes the interpreter. It runs `-m mythos_dist.train` as Python does, but for
`time.sleep(seconds)` before each step from `step` on; if the run folder has a run already, and for all other modules,
it is Python and no more.
"""

import os
import runpy
import shlex
import sys
import time
from pathlib import Path

MODULE = "mythos_dist.train"


def paced(folder: Path, step: int, seconds: float) -> Path:
    """The path of the interpreter, a script in `folder`."""
    script, python = folder / "python", shlex.quote(sys.executable)
    here = shlex.quote(str(Path(__file__).resolve()))
    script.write_text(
        f'#!/bin/sh\n[ "$1 $2" != "-m {MODULE}" ] || exec {python} {here} {step} {seconds} "$@"\nexec {python} "$@"\n'
    )
    script.chmod(0o755)
    return script


def main() -> None:
    step, seconds = int(sys.argv[1]), float(sys.argv[2])
    sys.argv[:] = sys.argv[4:]  # the module, as its own name, and its arguments
    sys.path[0] = os.getcwd()  # as -m has it
    folders = [text.removeprefix("run.dir=") for text in sys.argv if text.startswith("run.dir=")]
    # Asked before the roll call, which no rank passes alone: rank 0 has not claimed the folder yet.
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
