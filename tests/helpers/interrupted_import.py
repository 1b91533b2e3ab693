"""Run a program that gets SIGINT at a chosen import, independent of the speed of the machine."""

import subprocess
import sys
from pathlib import Path

# This finder comes first in sys.meta_path. It returns None, so the import continues with the next finder.
_PROGRAM = """
import os, runpy, signal, sys
_, module, program, *sys.argv[1:] = sys.argv
sys.argv[0] = program
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def interrupted_import(module: str, program: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `program`, a file or a module name; it gets SIGINT when it starts to import `module`."""
    command = [sys.executable, "-c", _PROGRAM, module, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)
