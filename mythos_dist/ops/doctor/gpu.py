"""GPUs: those that the driver has, those that torch can use, and why these are not the same."""

import contextlib
import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mythos_dist.ops.doctor.lines import Line, note, ok, problem

# The oldest driver for each CUDA, by major versions: https://docs.nvidia.com/deploy/cuda-compatibility/.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
SMI_SECONDS = 8


@dataclass(frozen=True)
class Gpu:
    """One that torch can use."""

    name: str
    capability: tuple[int, int]
    bytes: int


@dataclass(frozen=True)
class Gpus:
    torch: str  # version
    cuda: str | None  # that torch was built for
    kernels: tuple[str, ...] = ()  # that torch was built with: "sm_90", "compute_90"
    usable: tuple[Gpu, ...] = ()
    refused: str = ""  # torch's own words about why there is none
    present: tuple[str, ...] = ()  # names, from the driver
    driver: str | None = None  # version
    driver_hangs: bool = False
    visible: str | None = None  # CUDA_VISIBLE_DEVICES

    @property
    def capability(self) -> tuple[int, int] | None:
        """Of the least of them: every rank runs the same code."""
        return min((gpu.capability for gpu in self.usable), default=None)


def find(visible: str | None) -> Gpus:
    """`visible`: CUDA_VISIBLE_DEVICES. Torch is not asked when the driver gives no answer: it would hang as well."""
    import torch

    driver, present, hangs = None, (), False
    with contextlib.suppress(OSError):
        driver = driver_version(Path("/proc/driver/nvidia/version").read_text())
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
        smi = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
        rows = [row.split(", ", 1) for row in smi.stdout.splitlines() if row.count(", ")] if smi.returncode == 0 else []
        driver, present = (rows[0][0] if rows else driver), tuple(name for _, name in rows)
    except subprocess.TimeoutExpired:
        hangs = True
    except OSError:
        pass  # no such program: no driver, or a container without its tools
    usable, refused, kernels = [], "", ()
    if not hangs:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                usable = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
                kernels = tuple(torch.cuda.get_arch_list())
        refused = str(said[0].message).splitlines()[0] if said and not usable else ""
    return Gpus(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        kernels=kernels,
        usable=tuple(Gpu(one.name, (one.major, one.minor), one.total_memory) for one in usable),
        refused=refused,
        present=present,
        driver=driver,
        driver_hangs=hangs,
        visible=visible,
    )


def driver_version(text: str) -> str | None:
    """Out of /proc/driver/nvidia/version: "… Kernel Module  535.104.05 …", "… Module for x86_64  580.65.06 …"."""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", text)
    return found[1] if found else None


def lines(found: Gpus) -> Iterator[Line]:
    """What torch was built for, the driver, the GPUs."""
    yield ok("torch", f"{found.torch}, built for {f'CUDA {found.cuda}' if found.cuda else 'CPUs only'}")
    if found.driver_hangs:
        yield problem(
            "GPU",
            f"nvidia-smi gives no answer in {SMI_SECONDS} s: the driver or a GPU hangs",
            "look for `Xid` in dmesg; drain this machine and restart it",
        )
    elif found.usable:
        yield from _usable(found)
    elif found.driver or found.present:
        yield _unusable(found)
    else:
        yield note(
            "GPU",
            "none: training runs on CPUs, over gloo",
            f"nothing for a trial; a machine with GPUs needs NVIDIA's driver{_oldest(found.cuda)}",
        )


def _usable(found: Gpus) -> Iterator[Line]:
    kinds = Counter((gpu.name, gpu.capability, round(gpu.bytes / 2**30)) for gpu in found.usable)
    text = "; ".join(
        f"{count} x {name}, compute capability {major}.{minor}, {size} GiB"
        for (name, (major, minor), size), count in kinds.items()
    )
    if len(found.present) > len(found.usable):
        text += f" (of {len(found.present)} in this machine"
        text += f"; CUDA_VISIBLE_DEVICES={found.visible})" if found.visible else ")"
    if len(kinds) == 1:
        yield ok("GPU", text)
    else:
        remedy = "run on equal GPUs: choose them with CUDA_VISIBLE_DEVICES or the scheduler's constraint"
        yield note("GPU", f"{text}: in every step all wait for the slowest", remedy)
    for name, (major, minor) in dict.fromkeys((gpu.name, gpu.capability) for gpu in found.usable):
        if not _has_kernels((major, minor), found.kernels):
            yield problem(
                "GPU",
                f"torch {found.torch} holds no kernels for {name} (compute capability {major}.{minor}), only "
                + ", ".join(found.kernels),
                "install a torch that was built for it (https://pytorch.org/get-started); an older CUDA has older GPUs",
            )
    if found.driver and _too_old(found):
        yield note(
            "driver",
            f"{found.driver} is older than CUDA {found.cuda} asks for{_oldest(found.cuda)}; torch starts all the same",
            "right if CUDA's compatibility package is installed; else update the driver",
        )
    elif found.driver:
        oldest = _oldest(found.cuda)
        yield ok("driver", found.driver + (f"; CUDA {found.cuda} needs{oldest}" if oldest else ""))


def _unusable(found: Gpus) -> Line:
    """Why torch sees no GPU on a machine that has them, the surest reason first."""
    has = f"this machine has {len(found.present) or 'some'} x {found.present[0] if found.present else 'NVIDIA GPU'}"
    if found.cuda is None:
        newest = max((cuda for cuda, oldest in OLDEST_DRIVER.items() if _major(found.driver) >= oldest), default=None)
        for_driver = f" for CUDA {newest} (driver {found.driver})" if newest else ""
        return problem(
            "GPU",
            f"{has}, but torch {found.torch} is built for CPUs only",
            f"install a torch{for_driver}: https://pytorch.org/get-started",
        )
    if found.visible is not None and found.visible.strip() in ("", "-1", "NoDevFiles"):
        return problem(
            "GPU",
            f"{has}, but CUDA_VISIBLE_DEVICES={found.visible!r} hides all",
            "unset CUDA_VISIBLE_DEVICES; under SLURM ask for GPUs (--gpus-per-node=8 or --gres=gpu:8)",
        )
    if _too_old(found):
        return problem(
            "GPU",
            f"{has}, but its driver {found.driver} is too old for torch {found.torch}: CUDA {found.cuda} needs"
            + _oldest(found.cuda),
            "update the driver, or install a torch for an older CUDA (https://pytorch.org/get-started)",
        )
    return problem(
        "GPU",
        f"{has}, but torch cannot use it: {found.refused or 'it gives no reason'}",
        "run nvidia-smi; in a container: start it with --gpus all; with NVSwitch: nvidia-fabricmanager must be running",
    )


def _has_kernels(capability: tuple[int, int], kernels: tuple[str, ...]) -> bool:
    """Machine code runs on later minor versions of its major one, PTX ("compute_90") on everything later."""
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(kernels)):
        built_for = (int(major), int(minor))
        if built_for <= capability and (kind == "compute" or built_for[0] == capability[0]):
            return True
    return not kernels


def _too_old(found: Gpus) -> bool:
    return 0 < _major(found.driver) < OLDEST_DRIVER.get(_major(found.cuda), 0)


def _oldest(cuda: str | None) -> str:
    """ " 580 or newer", or nothing where it is not known."""
    oldest = OLDEST_DRIVER.get(_major(cuda))
    return f" {oldest} or newer" if oldest else ""


def _major(version: str | None) -> int:
    return int(version.split(".")[0]) if version else 0
