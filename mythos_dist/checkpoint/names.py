"""Names in `checkpoints/`, and the removal of what a run itself wrote there.

    step-00000010/                    a checkpoint
    step-00000010.tmp-3/              being written by start 3 of the run (start 0: by a tool)
    step-00000010.replaced-by-3/      the checkpoint of the same step that start 3 replaced
    latest, latest.tmp-3              the name of the newest checkpoint

The trap: users keep copies here, such as step-00000010.bak or step-best. So every pattern is exact, and a folder is
removed only if all files in it have names that a run writes.
"""

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from mythos_dist.units import is_multiple

MANIFEST_FILE = "checkpoint.json"
LATEST = "latest"
DATA_FILE = re.compile(r"(rank-[0-9]{5,9}|tensors-[0-9]{5,9}-of-[0-9]{5,9})\.safetensors")
_CHECKPOINT = re.compile(r"step-[0-9]{8,15}")
_UNFINISHED = re.compile(r"(step-[0-9]{8,15})\.(tmp|replaced-by)-([0-9]{1,9})(-[0-9a-f]{8})?")
_UNFINISHED_LATEST = re.compile(r"latest\.tmp-([0-9]{1,9})")
_NFS = re.compile(r"\.nfs[0-9a-f]+")  # NFS keeps a deleted file under such a name while a process has it open


def folder_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def temporary_name(step: int, start: int) -> str:
    """The name of a step's checkpoint while start `start` writes or deletes it."""
    return f"{folder_name(step)}.tmp-{start}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's folder name; None for other names."""
    if not _CHECKPOINT.fullmatch(name):
        return None
    step = int(name.removeprefix("step-"))
    return step if folder_name(step) == name else None


def is_pinned(step: int, pin: Collection[int], pin_every: int) -> bool:
    """Whether a step's checkpoint is saved, and never deleted: `checkpoint.pin` and `checkpoint.pin_every`."""
    return step in pin or is_multiple(step, pin_every)


class Unfinished(NamedTuple):
    """The parts of the name of a folder that an interrupted start leaves."""

    checkpoint: str  # step-00000010
    state: str  # tmp or replaced-by
    start: int


def parse_unfinished(name: str) -> Unfinished | None:
    """None for other names."""
    match = _UNFINISHED.fullmatch(name)
    if match is None or step_of(match[1]) is None:
        return None
    return Unfinished(match[1], match[2], int(match[3]))


def start_of_unfinished_latest(name: str) -> int | None:
    """The N of a file `latest.tmp-N`; None for other names."""
    match = _UNFINISHED_LATEST.fullmatch(name)
    return int(match[1]) if match else None


def foreign_files(folder: Path) -> list[str]:
    """Names in a checkpoint's folder that no run writes. OSError if it cannot be listed."""
    foreign = []
    with os.scandir(folder) as entries:
        for entry in entries:
            known = entry.name == MANIFEST_FILE or DATA_FILE.fullmatch(entry.name) or _NFS.fullmatch(entry.name)
            if not known or entry.is_dir(follow_symlinks=False):
                foreign.append(entry.name)
    return sorted(foreign)


def is_folder_without_link(path: Path) -> bool:
    """Whether it is a folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def remove_checkpoint(folder: Path) -> bool:
    """Remove a checkpoint's folder, finished or not, if all files in it are a run's. OSError if the system refuses.

    Returns False, and removes nothing, for a link or a folder with files that no run writes.
    """
    if not is_folder_without_link(folder) or foreign_files(folder):
        return False
    for name in os.listdir(folder):
        if not _NFS.fullmatch(name):
            os.unlink(folder / name)
    folder.rmdir()
    return True
