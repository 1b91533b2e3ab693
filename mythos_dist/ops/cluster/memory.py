"""Memory of this node as a process may use it: the machine's, or less in a container or in a SLURM job.

The trap: a cgroup's limit is for all processes in it and in the cgroups inside it, so each one above ours counts.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS, _OURS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# File with the limit, and what its memory.stat calls the memory that cannot be dropped: versions 2 and 1.
_VERSIONS = {"memory.max": "anon", "memory.limit_in_bytes": "total_rss"}


def node_memory(cgroups: Path = _CGROUPS, ours: Path = _OURS) -> tuple[int, int]:
    """(all, available) in bytes; `cgroups` and `ours` are the kernel's folder and its list of this process's."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, held in _limits(cgroups, ours):
        total, available = min(total, limit), min(available, max(0, limit - held))
    return total, available


def _limits(cgroups: Path, ours: Path) -> Iterator[tuple[int, int]]:
    """(limit, held) in bytes of each cgroup that this process is in."""
    for folder in _folders(cgroups, ours):
        for name, key in _VERSIONS.items():
            if (limit := _text(folder / name)).isdecimal():  # else "max", or there is none
                held = dict(line.split() for line in _text(folder / "memory.stat").splitlines()).get(key, "0")
                yield int(limit), int(held)


def _folders(cgroups: Path, ours: Path) -> set[Path]:
    """In a container the list may hold the host's names, which are not there: the topmost is then the container's."""
    found = {cgroups, cgroups / "memory"}
    for line in _text(ours).splitlines():  # 4:memory:/a/b in version 1, 0::/a/b in version 2
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = cgroups / "memory" if controllers else cgroups
            inner = Path(path.lstrip("/"))
            found |= {top / folder for folder in (inner, *inner.parents)}
    return found


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
