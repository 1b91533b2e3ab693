"""A small file system that can be filled completely."""

import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, kilobytes: int):
    """Mount a file system of `kilobytes` kB at `path`; skips the test if mounting is not permitted."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a file system is not permitted: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def enlarge(path: Path) -> None:
    """Enlarge the file system to 20 MB."""
    subprocess.run(["mount", "-o", "remount,size=20m", str(path)], check=True)
