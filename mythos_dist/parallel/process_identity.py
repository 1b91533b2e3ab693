"""Identifies the process of a run's rank 0, so that another process on the machine can check whether it still runs.

A pid is not enough: pids are reused, each container has its own, and host names repeat. A process is therefore
identified by host name, boot id, pid namespace, pid and start time (all but host name and pid from Linux's /proc).
"""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """The identity of this process, as `is_running` needs it; without /proc only host and pid."""
    process: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    with suppress(OSError, ValueError):
        process |= {"pid_started": _state_and_start(os.getpid())[1], **_machine()}
    return process


def is_running(process: dict[str, Any]) -> bool | None:
    """Whether the process with an `identity()` still runs; None if this process cannot determine it.

    It cannot on another host or in another container, after a reboot, or without /proc.
    """
    pid, started = process.get("pid"), process.get("pid_started")
    if not isinstance(pid, int) or pid <= 0 or not isinstance(started, int):
        return None
    try:
        machine = _machine()
    except OSError:
        return None
    if process.get("host") != socket.gethostname() or any(process.get(key) != value for key, value in machine.items()):
        return None
    try:
        state, now = _state_and_start(pid)
    except FileNotFoundError:
        # Another user's process may be hidden (the mount option hidepid of /proc).
        return None if _exists(pid) else False
    except (OSError, ValueError):
        return None
    return now == started and state not in "ZX"  # Z, X: dead, but not reaped yet


def _machine() -> dict[str, str]:
    """The boot id of this machine and the namespace of this process's pids."""
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": os.readlink("/proc/self/ns/pid"),
    }


def _state_and_start(pid: int) -> tuple[str, int]:
    """A process's state (R, S, T, Z, ...) and its start, in clock ticks since the boot."""
    text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    fields = text.rpartition(")")[2].split()  # the name may contain spaces and parentheses
    return fields[0], int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
