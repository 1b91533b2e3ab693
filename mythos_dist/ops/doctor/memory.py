"""Memory, shared memory and the limits of a process, and what dead processes have left in /dev/shm.

NCCL passes data between ranks of one machine through /dev/shm, and loader processes take their locks from it; docker
gives 64 MB. Our own reading leaves nothing there; streaming's StreamingDataset and NCCL do when they are killed.
"""

import contextlib
import os
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mythos_dist.data.windows import OPEN_FILES
from mythos_dist.ops.doctor.lines import Line, gigabytes, note, ok, problem

SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED = 1 << 30  # bytes, for NCCL on a machine with 8 GPUs
FULL = 16 << 20  # bytes: what is left when it counts as full
NEEDED_FILES = 2 * OPEN_FILES + 256  # shards of both splits, and the libraries' own
# What streaming, NCCL and torch call theirs.
_NAMES = re.compile(
    r"\d{6}_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data)"
    r"|nccl-\w+|torch_\d+_\w+"
)


@dataclass(frozen=True)
class Memory:
    """In bytes; a limit of -1 is none."""

    total: int  # of this machine, or of the container where that is less
    available: int
    shared: tuple[int, int] | None  # size of /dev/shm and what is free; None: there is none
    left: dict[str, int]  # files of ours in /dev/shm that no process has open
    open_files: int
    locked: int
    infiniband: bool
    gpus: int


def find(infiniband: bool, gpus: int) -> Memory:
    """Of this machine."""
    from mythos_dist.ops.cluster.memory import node_memory

    total, available = node_memory()
    usage = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return Memory(
        total=total,
        available=available,
        shared=(usage.total, usage.free) if usage else None,
        left=left_behind(SHARED_MEMORY),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=infiniband,
        gpus=gpus,
    )


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def left_behind(folder: Path) -> dict[str, int]:
    """{name: bytes} of this user's segments in `folder`, by their names, that no process has mapped.

    Other users' processes cannot be looked into, so other users' files are not judged.
    """
    segments = {}
    with contextlib.suppress(OSError):
        for file in os.scandir(folder):
            with contextlib.suppress(OSError):  # it went away meanwhile
                if _NAMES.fullmatch(file.name) and file.stat().st_uid == os.getuid():
                    segments[file.name] = file.stat().st_size
    if segments:
        for maps in Path("/proc").glob("[0-9]*/maps"):
            mapped = _text(str(maps))
            segments = {name: size for name, size in segments.items() if f"{folder}/{name}" not in mapped}
    return segments


def lines(found: Memory) -> Iterator[Line]:
    """Memory, /dev/shm, limits."""
    yield ok("memory", f"{gigabytes(found.available)} of {gigabytes(found.total)} available")
    yield from _shared(found)
    if found.left:
        prefixes = sorted({re.match(r"\d{6}_|nccl-|torch_", name)[0] for name in found.left})  # type: ignore[index]
        yield note(
            "/dev/shm",
            f"{len(found.left)} segments that no process of yours has open, {gigabytes(sum(found.left.values()))}: "
            f"left by killed runs ({sorted(found.left)[0]}, …)",
            "when nothing of yours runs here, also in no container: rm "
            + " ".join(f"{SHARED_MEMORY}/{prefix}*" for prefix in prefixes),
        )
    if 0 <= found.open_files < NEEDED_FILES:
        text = f"at most {found.open_files} files may be open, and a rank may need {NEEDED_FILES}"
        yield note("limits", text, "ulimit -n 65536 before training")
    if found.infiniband and found.locked >= 0:
        yield note(
            "limits",
            f"at most {gigabytes(found.locked)} may be locked in memory, and InfiniBand locks NCCL's buffers",
            "ulimit -l unlimited; under SLURM PropagateResourceLimitsExcept=MEMLOCK, in docker --ulimit memlock=-1",
        )


def _shared(found: Memory) -> Iterator[Line]:
    if found.shared is None:
        yield problem(
            "/dev/shm",
            "there is none: NCCL's ranks and loader processes need it",
            "mount -t tmpfs -o size=1g tmpfs /dev/shm; in docker --shm-size=1g",
        )
        return
    total, free = found.shared
    text = f"{gigabytes(free)} of {gigabytes(total)} free"
    if free < FULL:
        yield problem("/dev/shm", f"full: {text}", "ls -l /dev/shm shows by what; remove what killed jobs have left")
    elif found.gpus and total < ENOUGH_SHARED:
        yield note("/dev/shm", f"{text}: NCCL may run out of it", "give the container --shm-size=1g or --ipc=host")
    else:
        yield ok("/dev/shm", text)
