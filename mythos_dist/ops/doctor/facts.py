"""What checks know about this machine. They read nothing else of it, so tests describe machines that do not exist."""

import contextlib
import functools
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mythos_dist.ops.doctor.probe import Outcome, Probe
from mythos_dist.parallel.launcher import read_number

SMI_SECONDS = 8
PROGRAMS = ("torchrun", "deepspeed", "srun", "sbatch", "pdsh", "ssh")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    capability: tuple[int, int]
    bytes: int


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver reports; GPUs by name."""

    version: str | None = None
    gpus: tuple[str, ...] = ()
    hangs: bool = False


@dataclass(frozen=True)
class Torch:
    """How torch was built, and the GPUs that it can use."""

    version: str
    cuda: str | None  # None: built for CPUs only
    nccl: str | None = None  # None: built without
    gpus: tuple[Gpu, ...] = ()
    warning: str = ""  # about the GPUs, or why there is none


@dataclass(frozen=True)
class Machine:
    """This machine, as this process sees it."""

    env: Mapping[str, str]
    driver: Driver
    torch: Torch
    unavailable: Mapping[str, str | None]  # GPU package -> why it cannot be imported
    versions: Mapping[str, str]  # installed Python packages
    group: Outcome  # of probe.join_group
    host: str
    addresses: Outcome  # of probe.resolve_names: {name: address or None} of this host and of MASTER_ADDR
    interfaces: tuple[str, ...]
    ports: Mapping[str, str]  # InfiniBand and RoCE: "mlx5_0:1" -> "ACTIVE, 400 Gb/sec (4X NDR), InfiniBand"
    programs: tuple[str, ...]  # those of PROGRAMS that are installed
    memory: tuple[int, int]  # bytes, total and available; of the container where that is less
    shared_memory: tuple[int, int] | None  # bytes of /dev/shm, total and free; None: there is none
    open_files: int  # soft limit; -1: unlimited
    locked_memory: int  # soft limit in bytes; -1: unlimited

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return self.torch.gpus

    @property
    def capability(self) -> tuple[int, int]:
        """The lowest compute capability, as every rank runs the same code; (0, 0) without a GPU."""
        return min((gpu.capability for gpu in self.gpus), default=(0, 0))

    @property
    def node_count(self) -> int:
        """Nodes of the job that this process is in; 1 without a launcher."""
        world, local = read_number(self.env, "WORLD_SIZE") or 1, read_number(self.env, "LOCAL_WORLD_SIZE")
        slurm = read_number(self.env, "SLURM_JOB_NUM_NODES") or read_number(self.env, "SLURM_NNODES") or 1
        return -(-world // local) if local else slurm


def read_machine(env: Mapping[str, str], group: Probe, names: Probe) -> Machine:
    """This machine. `group`, `names`: running probes of probe.join_group and probe.resolve_names."""
    from mythos_dist.gpu_packages import DISTRIBUTIONS, unavailable
    from mythos_dist.ops.cluster.fabric import infiniband_ports
    from mythos_dist.ops.cluster.memory import node_memory

    driver = read_driver()
    # Launchers are on PATH or beside this Python, where an environment that is not activated has them.
    path = os.pathsep.join([env.get("PATH", os.defpath), os.fspath(Path(sys.executable).parent)])
    shared = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return Machine(
        env=env,
        driver=driver,
        torch=read_torch(use_gpus=not driver.hangs),  # torch would hang as well
        unavailable={package: unavailable(package) for package in DISTRIBUTIONS},
        versions=read_versions(),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        ports=infiniband_ports(),
        programs=tuple(name for name in PROGRAMS if shutil.which(name, path=path)),
        memory=node_memory(),
        shared_memory=(shared.total, shared.free) if shared else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        host=socket.gethostname(),
        addresses=names.outcome(),  # last: they may take many seconds
        group=group.outcome(),
    )


@functools.cache
def read_versions() -> dict[str, str]:
    """{distribution: version} of all installed Python packages, names in lower case with hyphens."""
    return {re.sub(r"[-_.]+", "-", one.name).lower(): one.version for one in metadata.distributions() if one.name}


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
    gpus = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if use_gpus and torch.cuda.is_available():
            for i in range(torch.cuda.device_count()):
                one = torch.cuda.get_device_properties(i)  # warns of a GPU that this torch has no kernels for
                gpus.append(Gpu(one.name, (one.major, one.minor), one.total_memory))
    messages = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]  # none of deprecations
    warning = " ".join(" ".join(messages).split())
    return Torch(torch.__version__, torch.version.cuda, nccl, tuple(gpus), warning)
