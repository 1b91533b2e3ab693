"""Memory that a process may use on this node: the machine's, or less in a container or a SLURM job.

The trap: a cgroup's limit applies to all processes in it and in its children, so every parent of ours counts.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# File with the limit, and the key in memory.stat of memory that cannot be reclaimed, in versions 2 and 1.
_VERSIONS = {"memory.max": "anon", "memory.limit_in_bytes": "total_rss"}


def node_memory(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> tuple[int, int]:
    """(total, available) in bytes. cgroups: the kernel's folder. membership: its list of this process's cgroups."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in _limits(cgroups, membership):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _limits(cgroups: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each cgroup that this process is in."""
    for folder in _folders(cgroups, membership):
        for name, key in _VERSIONS.items():
            if (limit := _text(folder / name)).isdecimal():  # else "max", or the file does not exist
                used = dict(line.split() for line in _text(folder / "memory.stat").splitlines()).get(key, "0")
                yield int(limit), int(used)


def _folders(cgroups: Path, membership: Path) -> set[Path]:
    """The folders of these cgroups and their parents. In a container the list may have paths of the host, which do not
    exist there; the top folder is then the container's own cgroup."""
    folders = {cgroups, cgroups / "memory"}
    for line in _text(membership).splitlines():  # 4:memory:/a/b in version 1, 0::/a/b in version 2
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = cgroups / "memory" if controllers else cgroups
            inner = Path(path.lstrip("/"))
            folders |= {top / folder for folder in (inner, *inner.parents)}
    return folders


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
