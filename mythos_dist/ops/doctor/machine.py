"""What checks know about this machine. They read nothing else of it, so tests describe machines that do not exist."""

import contextlib
import os
import re
import resource
import shutil
import socket
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mythos_dist.files import existing_folder
from mythos_dist.gpu_packages import DISTRIBUTIONS, unavailable
from mythos_dist.ops.cluster.fabric import infiniband_ports
from mythos_dist.ops.cluster.memory import node_memory
from mythos_dist.ops.doctor.findings import FactError
from mythos_dist.ops.doctor.probe import Outcome, Probe
from mythos_dist.parallel.launcher import read_number

T = TypeVar("T")
SMI_SECONDS = 8


class Driver(NamedTuple):
    """What the NVIDIA driver reports; GPUs by name."""

    version: str | None = None
    gpus: tuple[str, ...] = ()
    hangs: bool = False


class Torch(NamedTuple):
    """How torch was built, and the GPUs that it can use."""

    version: str
    cuda: str | None  # None: built for CPUs only
    nccl: str | None = None  # None: built without
    gpus: tuple[Any, ...] = ()  # torch.cuda.get_device_properties of each
    warning: str = ""  # about the GPUs, or why there is none


def read_driver() -> Driver:
    """From nvidia-smi; where there is none (no driver, or a container without its tools), the version from /proc."""
    version = None
    with contextlib.suppress(OSError):
        version = driver_version(Path("/proc/driver/nvidia/version").read_text())
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        smi = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return Driver(version, hangs=True)
    except OSError:
        return Driver(version)
    rows = [line.split(", ", 1) for line in smi.stdout.splitlines() if ", " in line] if smi.returncode == 0 else []
    return Driver(rows[0][0] if rows else version, tuple(name for _, name in rows))


def driver_version(text: str) -> str | None:
    """From /proc/driver/nvidia/version: "… Kernel Module  535.104.05 …", "… Module for x86_64  580.65.06 …"."""
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", text)
    return match[1] if match else None


def read_torch(use_gpus: bool) -> Torch:
    """`use_gpus` False: CUDA is not initialized."""
    import torch
    import torch.cuda.nccl
    import torch.distributed as dist

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if use_gpus and torch.cuda.is_available() else 0
        gpus = tuple(map(torch.cuda.get_device_properties, range(count)))  # warns of GPUs that torch has no kernels for
    messages = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]  # none of deprecations
    return Torch(torch.__version__, torch.version.cuda, nccl, gpus, " ".join(" ".join(messages).split()))


def read_host_name() -> tuple[str, str]:
    """This machine's name, and why it has no address; "": it has one."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return name, error.strerror or str(error)
    return name, ""


class Fact(Generic[T]):
    """An attribute that is read once, when a check first needs it. If that fails, each such check gets a FactError."""

    def __init__(self, read: Callable[[Any], T]):
        """`read`: called with the Machine."""
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, machine: Any, owner: type) -> T:
        """Not called where the machine has a value of this name."""
        name = self._name
        if name not in machine.errors:
            try:
                return vars(machine).setdefault(name, self._read(machine))
            except Exception as error:  # remembered: importing torch a second time fails in another way
                machine.errors[name] = error if isinstance(error, FactError) else FactError(name, error)
        raise machine.errors[name]


class Machine:
    """This machine, as this process sees it."""

    env = Fact(lambda _: dict(os.environ))
    driver = Fact(lambda _: read_driver())
    torch = Fact(lambda machine: read_torch(use_gpus=not machine.driver.hangs))  # torch would hang as well
    unavailable = Fact(lambda _: {package: unavailable(package) for package in DISTRIBUTIONS})  # why
    ports = Fact(lambda _: infiniband_ports())  # "mlx5_0:1" -> "ACTIVE, 400 Gb/sec (4X NDR), InfiniBand"
    memory = Fact(lambda _: node_memory())  # bytes, total and available; of the container where that is less
    # Bytes of /dev/shm: total, used, free; None: there is none.
    shared_memory = Fact(lambda _: shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None)
    locked_memory = Fact(lambda _: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])  # bytes; -1: unlimited
    host_name = Fact(lambda _: read_host_name())
    group = Fact[Outcome](lambda machine: machine.probe.outcome())

    def __init__(self, probe: Probe | None = None, **facts: Any):
        """`probe`: `join_group`, running. `facts`: are not read."""
        self.probe, self.errors = probe, dict[str, FactError]()
        vars(self).update(facts)

    @property
    def capability(self) -> tuple[int, int]:
        """The lowest compute capability, as every rank runs the same code; (0, 0) without a GPU."""
        return min(((gpu.major, gpu.minor) for gpu in self.torch.gpus), default=(0, 0))

    @property
    def node_count(self) -> int:
        """Nodes of the job that this process is in; 1 without a launcher."""
        world, local = read_number(self.env, "WORLD_SIZE") or 1, read_number(self.env, "LOCAL_WORLD_SIZE")
        slurm = read_number(self.env, "SLURM_JOB_NUM_NODES") or read_number(self.env, "SLURM_NNODES") or 1
        return -(-world // local) if local else slurm

    def free_bytes(self, path: Path) -> int:
        """On the disk of a folder that may not exist yet."""
        return shutil.disk_usage(existing_folder(path)).free
