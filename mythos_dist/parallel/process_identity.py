"""Identifies the process of a run's rank 0, so that another process on the machine can check whether it still runs.

A pid is not enough: pids are reused, every container counts its own, and host names repeat. So a process
is known by host name, boot of the kernel, pid namespace, pid, and the moment it was started (all from Linux's /proc).
"""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """This process: what `is_running` needs. Without /proc only host and pid."""
    about: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    with suppress(OSError, ValueError):
        about |= {"pid_started": _state_and_start(os.getpid())[1], **_machine()}
    return about


def is_running(about: dict[str, Any]) -> bool | None:
    """Whether the process of an `identity()` still runs; None if that cannot be known from here.

    It cannot on another host, in another container, after a reboot (which a machine of the same name looks like), or
    without /proc.
    """
    pid, started = about.get("pid"), about.get("pid_started")
    if not isinstance(pid, int) or pid <= 0 or not isinstance(started, int):
        return None
    try:
        machine = _machine()
    except OSError:
        return None
    if about.get("host") != socket.gethostname() or any(about.get(key) != value for key, value in machine.items()):
        return None
    try:
        state, now = _state_and_start(pid)
    except FileNotFoundError:
        # Another user's process may be hidden (the mount option hidepid of /proc).
        return None if _exists(pid) else False
    except (OSError, ValueError):
        return None
    return now == started and state not in "ZX"  # a zombie or dead: not reaped yet


def _machine() -> dict[str, str]:
    """The boot of this machine's kernel, and the namespace in which its pids are counted."""
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": os.readlink("/proc/self/ns/pid"),
    }


def _state_and_start(pid: int) -> tuple[str, int]:
    """A process's state (R, S, T, Z, ...) and its start, in clock ticks since the boot."""
    text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold blanks and parentheses
    return fields[0], int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
