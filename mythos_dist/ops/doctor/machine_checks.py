"""Checks that need no config: packages, GPUs, kernels, network, launcher, memory."""

import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mythos_dist.data.windows import OPEN_FILES
from mythos_dist.errors import UserError
from mythos_dist.gpu_packages import DISTRIBUTIONS, INSTALL
from mythos_dist.ops.doctor.facts import PROGRAMS, SMI_SECONDS, Machine
from mythos_dist.ops.doctor.findings import Finding, gigabytes, note, ok, problem, split_remedy
from mythos_dist.ops.doctor.probe import Outcome
from mythos_dist.units import count

CHECKED = ("mythos-dist", "deepspeed", "mosaicml-streaming")
SHOWN = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "transformers")
# F.grouped_mm gives the right values everywhere, but it is one kernel per product only for bf16 on these major compute
# capabilities (torch, aten/src/ATen/native/cuda/GroupedBlas.cpp). Elsewhere it copies the experts' row counts to the
# CPU, waits for them, and runs one product per expert.
ONE_KERNEL = (9, 10)
HALF = (8, 0)  # lowest compute capability with bf16 units, which flash-attn and grouped_gemm need
SLOW_NCCL = {
    "NCCL_P2P_DISABLE": "NVLink and PCIe between GPUs of one node",
    "NCCL_SHM_DISABLE": "shared memory between ranks of one node",
    "NCCL_IB_DISABLE": "InfiniBand between nodes",
}
# NCCL passes data between ranks of one node through /dev/shm, and loader workers take their locks from it; docker
# gives 64 MB.
SHARED_FULL = 16 << 20  # bytes left
SHARED_ENOUGH = 1 << 30  # bytes in all, for NCCL on a node with 8 GPUs
NEEDED_FILES = 2 * OPEN_FILES + 256  # shards of both splits, and the libraries' own


def check_packages(versions: Mapping[str, str], reader: Outcome) -> Iterator[Finding]:
    """Unmet requirements, which otherwise fail when the first shard is read, and the outcome of probe.import_reader."""
    yield ok("python", platform.python_version())
    unmet = [finding for name in CHECKED if name in versions for finding in unmet_requirements(name, versions)]
    shown = ", ".join(f"{name} {versions.get(name, 'missing')}" for name in SHOWN)
    yield from unmet or [ok("packages", f"{shown}; all requirements met")]
    if reader.timed_out:
        remedy = "every rank waits for this import at startup: put the environment on a local disk, or try again"
        yield note("streaming", f"importing the shard reader is slow ({reader.error})", remedy)
    elif reader.error:
        yield problem("streaming", f"the shard reader cannot be imported ({reader.error})", "fix what the error names")
    else:
        yield ok("streaming", f"the shard reader can be imported ({reader.values['seconds']:.1f} s)")


def unmet_requirements(package: str, versions: Mapping[str, str]) -> Iterator[Finding]:
    """From the package's own metadata, so never out of date (mosaicml-streaming 0.13.0: numpy<2.2)."""
    for required in map(Requirement, metadata.requires(package) or []):
        if required.marker and not required.marker.evaluate({"extra": ""}):
            continue
        version = versions.get(canonicalize_name(required.name))
        if version is None or not required.specifier.contains(version, prereleases=True):
            wanted = f"{required.name}{required.specifier}"
            installed = f"{version} is installed" if version else "it is not installed"
            text = f"{package} {versions[package]} requires {wanted}, but {installed}"
            yield problem("packages", text, f"pip install '{wanted}'")


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """The build of torch, the driver, the GPUs; if torch finds none, the most certain reason."""
    torch, driver, visible = machine.torch, machine.driver, machine.env.get("CUDA_VISIBLE_DEVICES")
    present = f"{len(driver.gpus) or 'some'} x {driver.gpus[0] if driver.gpus else 'NVIDIA GPU'}"
    yield ok("torch", f"{torch.version}, built for {f'CUDA {torch.cuda}' if torch.cuda else 'CPUs only'}")
    if driver.version:
        yield ok("driver", driver.version)
    if driver.hangs:
        text = f"nvidia-smi does not answer within {SMI_SECONDS} s: the driver or a GPU hangs"
        yield problem("GPU", text, "look for `Xid` in dmesg; drain this node and reboot it")
    elif torch.gpus:
        yield from _usable_gpus(machine)
    elif not driver.version and not driver.gpus:
        remedy = "enough for a trial; a machine with GPUs needs NVIDIA's driver"
        yield note("GPU", "none: training runs on the CPU, with gloo", remedy)
    elif torch.cuda is None:
        text = f"this machine has {present}, but torch {torch.version} is built for CPUs only"
        yield problem("GPU", text, "install a torch built for CUDA: https://pytorch.org/get-started")
    elif visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        text = f"this machine has {present}, but CUDA_VISIBLE_DEVICES={visible!r} hides them"
        remedy = "unset CUDA_VISIBLE_DEVICES; under SLURM request GPUs (--gpus-per-node=8 or --gres=gpu:8)"
        yield problem("GPU", text, remedy)
    else:  # torch's warning names a driver that is too old
        text = f"this machine has {present}, but torch cannot use it: {torch.warning or 'torch gives no reason'}"
        remedy = (
            "run nvidia-smi; start a container with --gpus all; with NVSwitch, nvidia-fabricmanager must be running"
        )
        yield problem("GPU", text, remedy)


def _usable_gpus(machine: Machine) -> Iterator[Finding]:
    torch, present = machine.torch, len(machine.driver.gpus)
    counts = Counter((gpu.name, gpu.capability, round(gpu.bytes / 2**30)) for gpu in torch.gpus)
    text = "; ".join(
        f"{number} x {name}, compute capability {major}.{minor}, {size} GiB"
        for (name, (major, minor), size), number in counts.items()
    )
    if present > len(torch.gpus):
        visible = machine.env.get("CUDA_VISIBLE_DEVICES")
        text += f" (of {present} in this machine" + (f"; CUDA_VISIBLE_DEVICES={visible})" if visible else ")")
    if len(counts) > 1:
        remedy = "use GPUs of one kind: select them with CUDA_VISIBLE_DEVICES or the scheduler's constraint"
        yield note("GPU", f"{text}: every step runs at the speed of the slowest", remedy)
    else:
        yield ok("GPU", text)
    text = f"torch {torch.version} warns: {torch.warning}"
    if "NVML" in torch.warning:  # torch counts the GPUs in another way then
        yield note("GPU", text, "check the driver's libnvidia-ml.so; training does not need it")
    elif torch.warning:  # such as: this torch has no kernels for the GPU
        remedy = "install a torch built for these GPUs (https://pytorch.org/get-started)"
        yield problem("GPU", text, remedy)


def check_kernels(machine: Machine) -> Iterator[Finding]:
    """F.grouped_mm and the optional GPU packages, whatever a config asks for."""
    if not machine.gpus:
        yield ok("grouped_mm", "on the CPU a loop over experts inside torch")
    elif machine.capability[0] in ONE_KERNEL:
        yield ok("grouped_mm", "one kernel per product in bf16")
    else:
        text = "on compute capability {}.{} a loop over experts that synchronizes with the GPU".format(
            *machine.capability
        )
        # grouped_gemm is such a loop too, unless it was built with CUTLASS, the default on 8.x.
        cutlass = "" if machine.capability[0] == HALF[0] else "GROUPED_GEMM_CUTLASS=1 "
        remedy = f"compare with experts.backend=megablocks (bf16) after {cutlass}{INSTALL}"
        if machine.capability < HALF:
            remedy = "nothing on these GPUs; those with compute capability 9.x or 10.x have the kernel"
        yield note("grouped_mm", text, remedy)
    for package, distributions in DISTRIBUTIONS.items():
        versions = [(name, machine.versions.get(canonicalize_name(name))) for name in distributions]
        installed = [f"{name} {version}" for name, version in versions if version]
        error = machine.unavailable[package]
        if error is None:
            yield ok(package, ", ".join(installed) or "can be imported")
        elif installed or machine.gpus:
            yield note(package, "; ".join([error, *installed]), INSTALL)
        else:
            yield ok(package, "not installed; only GPUs use it")


def check_network(machine: Machine) -> Iterator[Finding]:
    """The backend, InfiniBand, and the environment variables that NCCL and gloo read."""
    env, name = machine.env, f"NCCL {machine.torch.nccl}" if machine.gpus else "gloo"
    if machine.group.error:
        text = f"{name}: one process cannot join a process group on loopback ({machine.group.error})"
        interfaces = ", ".join(machine.interfaces)
        remedy = f"fix what the error names; NCCL_DEBUG=INFO logs more; interfaces here: {interfaces}"
        yield problem("network", text, remedy)
    else:
        seconds = machine.group.values["seconds"]
        yield ok("network", f"{name}: one process joined a process group on loopback ({seconds:.1f} s)")
    yield from _interface_variables(machine)
    yield from _addresses(machine)
    up = [f"{port} {state}" for port, state in machine.ports.items() if state.startswith("ACTIVE")]
    down = [f"{port} {state}" for port, state in machine.ports.items() if not state.startswith("ACTIVE")]
    if not machine.ports and machine.gpus and machine.node_count > 1:
        remedy = "correct if the nodes have Ethernet only; in a container pass /dev/infiniband through"
        yield note("InfiniBand", "no device: NCCL uses TCP between nodes", remedy)
    else:
        yield ok("InfiniBand", "; ".join(up) or "no active port")
    if down:
        remedy = "check cable and subnet manager (ibstat), or exclude the port with NCCL_IB_HCA"
        yield note("InfiniBand", "not up: " + "; ".join(down), remedy)
    for variable, transport in SLOW_NCCL.items():
        if env.get(variable) == "1" and (variable != "NCCL_IB_DISABLE" or up):
            remedy = f"unset {variable}, unless it works around a fault"
            yield note("network", f"{variable}=1 disables {transport}", remedy)
    variables = [
        f"{variable}={env[variable]}" for variable in sorted(env) if re.match("(TORCH_)?NCCL_|GLOO_", variable)
    ]
    if variables:
        yield ok("network", "set: " + ", ".join(variables))


def _interface_variables(machine: Machine) -> Iterator[Finding]:
    """Interfaces that variables name: NCCL's rules (^ excludes, = is exact, otherwise a prefix), gloo's are exact."""
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = machine.env.get(variable, "")
        if not value or value.startswith("^"):
            continue
        names = [name.partition(":")[0] for name in value.lstrip("=").split(",")]
        is_gloo = variable.startswith("GLOO")
        exact = is_gloo or value.startswith("=")
        present = [
            name
            for name in names
            if any(one == name or (not exact and one.startswith(name)) for one in machine.interfaces)
        ]
        if not present or (is_gloo and len(present) < len(names)):  # gloo needs all of them, NCCL uses those that exist
            text = f"{variable}={value} names no interface of this machine"
            yield problem("network", text, f"unset it, or set it to one of {', '.join(machine.interfaces)}")


def _addresses(machine: Machine) -> Iterator[Finding]:
    """Whether other nodes can reach the addresses that host names resolve to."""
    master = machine.env.get("MASTER_ADDR")
    if machine.addresses.error:
        remedy = "check /etc/resolv.conf and /etc/hosts; until then give MASTER_ADDR as a number"
        yield note("network", f"host names cannot be resolved ({machine.addresses.error})", remedy)
        return
    addresses = machine.addresses.values
    if master and addresses.get(master) is None:
        text = f"MASTER_ADDR={master} cannot be resolved"
        yield problem("network", text, "set MASTER_ADDR to the first node's name or address")
    own = addresses.get(machine.host)
    is_loopback = own is None or own.startswith("127.") or own == "::1"
    if machine.node_count > 1 and not machine.gpus and "GLOO_SOCKET_IFNAME" not in machine.env and is_loopback:
        text = f"the host name {machine.host} resolves to {own or 'nothing'}: other nodes could not reach gloo there"
        remedy = f"set GLOO_SOCKET_IFNAME to the interface between nodes, one of {', '.join(machine.interfaces)}"
        yield note("network", text, remedy)


def check_launcher(machine: Machine) -> Iterator[Finding]:
    """The rank of this process, read as training reads it, its SLURM job, and the programs that start ranks."""
    from mythos_dist.parallel.launcher import read_rank_info

    env, local_rank, gpus = machine.env, 0, len(machine.gpus)
    try:
        rank_info = read_rank_info(env)
    except UserError as error:
        yield split_remedy("launcher", str(error))
    else:
        local_rank = rank_info.local_rank
        text = "none: this process would train alone; start several ranks with torchrun or a scheduler"
        if rank_info.launcher:
            text = f"{rank_info.launcher}: rank {rank_info.rank} of {rank_info.world_size}, local rank {local_rank}"
        yield ok("launcher", text)
    if gpus and local_rank >= gpus:
        text = f"local rank {local_rank} needs a GPU of its own, but this process sees {count(gpus, 'GPU')}"
        remedy = "make all GPUs of a node visible to every rank (SLURM: --gpus-per-node, not --gpus-per-task)"
        yield problem("launcher", text, f"{remedy}, or start fewer ranks")
    if "SLURM_JOB_ID" in env:
        nodes = f"{count(machine.node_count, 'node')} ({env.get('SLURM_JOB_NODELIST', 'names unknown')})"
        yield ok("launcher", f"SLURM job {env['SLURM_JOB_ID']}: {nodes}, {env.get('SLURM_NTASKS', '?')} tasks")
        if machine.node_count > 1 and "SLURM_NTASKS_PER_NODE" not in env:
            text = f"the job has {nodes} and no --ntasks-per-node: SLURM may place ranks unevenly, such as 3 + 1"
            yield note("launcher", text, "give sbatch --ntasks-per-node")
    missing = [name for name in PROGRAMS if name not in machine.programs]
    text = ", ".join(machine.programs) or "none"
    yield ok("programs", text + (f"; not installed: {', '.join(missing)}" if missing else ""))
    if "srun" in missing and {"pdsh", "ssh"} & set(missing):
        remedy = "not needed on one node; for several use a SLURM login node, or install pdsh and ssh for deepspeed"
        yield note("programs", "nothing here starts ranks on other nodes", remedy)


def check_memory(machine: Machine) -> Iterator[Finding]:
    """Memory, /dev/shm, limits of a process."""
    total, available = machine.memory
    yield ok("memory", f"{gigabytes(available)} of {gigabytes(total)} available")
    yield _shared_memory(machine)
    if 0 <= machine.open_files < NEEDED_FILES:
        text = f"a process may open {machine.open_files} files, and a rank may need {NEEDED_FILES}"
        yield note("limits", text, "ulimit -n 65536 before training")
    if machine.ports and machine.locked_memory >= 0:
        yield note(
            "limits",
            f"a process may lock {gigabytes(machine.locked_memory)} of memory, and InfiniBand locks NCCL's buffers",
            "ulimit -l unlimited; under SLURM PropagateResourceLimitsExcept=MEMLOCK, in docker --ulimit memlock=-1",
        )


def _shared_memory(machine: Machine) -> Finding:
    if machine.shared_memory is None:
        remedy = "mount -t tmpfs -o size=1g tmpfs /dev/shm; in docker --shm-size=1g"
        return problem("/dev/shm", "missing: NCCL's ranks and loader workers need it", remedy)
    total, free = machine.shared_memory
    text = f"{gigabytes(free)} of {gigabytes(total)} free"
    if free < SHARED_FULL:
        remedy = "ls -l /dev/shm lists its files; remove those that killed jobs left (nccl-*, torch_*, 000000_*)"
        return problem("/dev/shm", f"full: {text}", remedy)
    if machine.gpus and total < SHARED_ENOUGH:
        return note("/dev/shm", f"{text}: NCCL may need more", "give the container --shm-size=1g or --ipc=host")
    return ok("/dev/shm", text)


MACHINE_CHECKS: dict[str, Callable[[Machine], Iterator[Finding]]] = {
    "GPU": check_gpus,
    "kernels": check_kernels,
    "network": check_network,
    "launcher": check_launcher,
    "memory": check_memory,
}
