"""Names below `checkpoints/`, and removal of what a run wrote there itself.

    step-00000010/                    a checkpoint
    step-00000010.tmp-3/              being written by start 3 of the run (start 0: by a tool)
    step-00000010.replaced-by-3/      the checkpoint of the same step that start 3 has replaced
    latest, latest.tmp-3              the name of the newest checkpoint

The trap: users keep copies here, such as step-00000010.bak or step-best. Every pattern is exact, and a folder is
removed only if all files in it have names that a run gives them.
"""

import os
import re
import stat
from pathlib import Path

MANIFEST = "checkpoint.json"
LATEST = "latest"
DATA_FILE = re.compile(r"(rank-[0-9]{5,9}|tensors-[0-9]{5,9}-of-[0-9]{5,9})\.safetensors")
_CHECKPOINT = re.compile(r"step-[0-9]{8,15}")
_UNFINISHED = re.compile(r"(step-[0-9]{8,15})\.(tmp|replaced-by)-([0-9]{1,9})(-[0-9a-f]{8})?")
_POINTER = re.compile(r"latest\.tmp-([0-9]{1,9})")
_NFS = re.compile(r"\.nfs[0-9a-f]+")  # NFS keeps a deleted file under such a name while a process has it open


def folder_name(step: int) -> str:
    """Name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name; None if it is no such name."""
    if not _CHECKPOINT.fullmatch(name):
        return None
    step = int(name.removeprefix("step-"))
    return step if folder_name(step) == name else None


def unfinished(name: str) -> tuple[str, str, int] | None:
    """Of a folder that a start has left: the checkpoint's name, `tmp` or `replaced-by`, the start; None for others."""
    match = _UNFINISHED.fullmatch(name)
    if match is None or step_of(match[1]) is None:
        return None
    return match[1], match[2], int(match[3])


def unfinished_pointer(name: str) -> int | None:
    """The start that has left a file `latest.tmp-N`; None if it is another name."""
    match = _POINTER.fullmatch(name)
    return int(match[1]) if match else None


def not_ours(folder: Path) -> list[str]:
    """Names in a checkpoint's folder that no run writes; OSError if it cannot be listed."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            known = entry.name == MANIFEST or DATA_FILE.fullmatch(entry.name) or _NFS.fullmatch(entry.name)
            if not known or entry.is_dir(follow_symlinks=False):
                found.append(entry.name)
    return sorted(found)


def is_plain_folder(path: Path) -> bool:
    """Whether it is a folder itself and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def remove(folder: Path) -> bool:
    """Remove a checkpoint's folder, finished or not, with the files of a run in it. OSError if the system refuses.

    A link, and a folder with files that no run writes, is left as it is; that returns False.
    """
    if not is_plain_folder(folder) or not_ours(folder):
        return False
    for name in os.listdir(folder):
        if not _NFS.fullmatch(name):
            os.unlink(folder / name)
    folder.rmdir()
    return True
