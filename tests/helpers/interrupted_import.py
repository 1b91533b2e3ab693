"""A program that gets SIGINT at one point of its imports, whatever the speed of the machine."""

import subprocess
import sys
from pathlib import Path

# Import asks this finder first; it finds no module, so the next one does.
_PROGRAM = """
import os, runpy, signal, sys
_, wanted, program, *sys.argv[1:] = sys.argv
sys.argv[0] = program
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def interrupted_import(module: str, program: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `program`, a file or the name of a module; it gets SIGINT when it begins to import `module`."""
    command = [sys.executable, "-c", _PROGRAM, module, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)
