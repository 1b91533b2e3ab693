"""Checks that need no config: packages, GPUs, kernels, network, launcher, memory."""

import platform
import re
from collections import Counter
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mythos_dist.data.windows import OPEN_FILES
from mythos_dist.gpu_packages import DISTRIBUTIONS, INSTALL
from mythos_dist.ops.cluster.fabric import is_loopback
from mythos_dist.ops.doctor.findings import Check, Finding, gigabytes, note, ok, problem
from mythos_dist.ops.doctor.machine import PROGRAMS, SMI_SECONDS, Machine
from mythos_dist.parallel.launcher import read_rank_info
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


def check_packages(machine: Machine) -> Iterator[Finding]:
    """Unmet requirements, which otherwise fail when the first shard is read. They are read from the packages' own
    metadata, so never out of date (mosaicml-streaming 0.13.0: numpy<2.2)."""
    versions, unmet = machine.versions, False
    yield ok(platform.python_version(), topic="python")
    for package in filter(versions.get, CHECKED):
        for required in map(Requirement, metadata.requires(package) or []):
            version, wanted = versions.get(canonicalize_name(required.name)), f"{required.name}{required.specifier}"
            if required.marker and not required.marker.evaluate({"extra": ""}):
                continue
            if version is None or not required.specifier.contains(version, prereleases=True):
                unmet, installed = True, f"{version} is installed" if version else "it is not installed"
                text = f"{package} {versions[package]} requires {wanted}, but {installed}"
                yield problem(text, f"pip install '{wanted}'")
    if not unmet:
        yield ok(", ".join(f"{name} {versions.get(name, 'missing')}" for name in SHOWN) + "; all requirements met")


def check_reader(machine: Machine) -> Iterator[Finding]:
    reader = machine.reader
    if reader.timed_out:
        remedy = "every rank waits for this import at startup: put the environment on a local disk, or try again"
        yield note(f"importing the shard reader is slow ({reader.error})", remedy)
    elif reader.error:
        yield problem(f"the shard reader cannot be imported ({reader.error})", "fix what the error names")
    else:
        yield ok(f"the shard reader can be imported ({reader.seconds:.1f} s)")


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """The driver, the build of torch, the GPUs."""
    driver = machine.driver
    if driver.version:
        yield ok(driver.version, topic="driver")
    if driver.hangs:
        text = f"nvidia-smi does not answer within {SMI_SECONDS} s: the driver or a GPU hangs"
        yield problem(text, "look for `Xid` in dmesg; drain this node and reboot it")
    torch = machine.torch
    yield ok(f"{torch.version}, built for {f'CUDA {torch.cuda}' if torch.cuda else 'CPUs only'}", topic="torch")
    if torch.gpus:
        yield _usable_gpus(machine)
        text = f"torch {torch.version} warns: {torch.warning}"
        if "NVML" in torch.warning:  # torch counts the GPUs in another way then
            yield note(text, "check the driver's libnvidia-ml.so; training does not need it")
        elif torch.warning:  # such as: this torch has no kernels for the GPU
            yield problem(text, "install a torch built for these GPUs (https://pytorch.org/get-started)")
    elif not driver.hangs:
        yield _why_no_gpu(machine)


def _usable_gpus(machine: Machine) -> Finding:
    present, visible = len(machine.driver.gpus), machine.env.get("CUDA_VISIBLE_DEVICES")
    kinds = Counter(
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        for gpu in machine.gpus
    )
    text = "; ".join(f"{number} x {kind}" for kind, number in kinds.items())
    if present > len(machine.gpus):
        text += f" (of {present} in this machine{f'; CUDA_VISIBLE_DEVICES={visible}' if visible else ''})"
    if len(kinds) == 1:
        return ok(text)
    remedy = "use GPUs of one kind: select them with CUDA_VISIBLE_DEVICES or the scheduler's constraint"
    return note(f"{text}: every step runs at the speed of the slowest", remedy)


def _why_no_gpu(machine: Machine) -> Finding:
    """The most certain reason for which torch finds none."""
    driver, torch, visible = machine.driver, machine.torch, machine.env.get("CUDA_VISIBLE_DEVICES")
    present = f"this machine has {len(driver.gpus) or 'some'} x {driver.gpus[0] if driver.gpus else 'NVIDIA GPU'}"
    if not driver.version and not driver.gpus:
        remedy = "enough for a trial; a machine with GPUs needs NVIDIA's driver"
        return note("none: training runs on the CPU, with gloo", remedy)
    if torch.cuda is None:
        text = f"{present}, but torch {torch.version} is built for CPUs only"
        return problem(text, "install a torch built for CUDA: https://pytorch.org/get-started")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        remedy = "unset CUDA_VISIBLE_DEVICES; under SLURM request GPUs (--gpus-per-node=8 or --gres=gpu:8)"
        return problem(f"{present}, but CUDA_VISIBLE_DEVICES={visible!r} hides them", remedy)
    # torch's warning names a driver that is too old
    remedy = "run nvidia-smi; start a container with --gpus all; with NVSwitch, nvidia-fabricmanager must be running"
    return problem(f"{present}, but torch cannot use it: {torch.warning or 'torch gives no reason'}", remedy)


def check_grouped_mm(machine: Machine) -> Iterator[Finding]:
    major, minor = machine.capability
    if not machine.gpus:
        yield ok("on the CPU a loop over experts inside torch")
    elif major in ONE_KERNEL:
        yield ok("one kernel per product in bf16")
    else:
        # grouped_gemm is such a loop too, unless it was built with CUTLASS, the default on 8.x.
        cutlass = "" if major == HALF[0] else "GROUPED_GEMM_CUTLASS=1 "
        remedy = f"compare with experts.backend=megablocks (bf16) after {cutlass}{INSTALL}"
        if (major, minor) < HALF:
            remedy = "nothing on these GPUs; those with compute capability 9.x or 10.x have the kernel"
        yield note(f"on compute capability {major}.{minor} a loop over experts that synchronizes with the GPU", remedy)


def check_gpu_packages(machine: Machine) -> Iterator[Finding]:
    """Whether or not a config asks for them."""
    for package, names in DISTRIBUTIONS.items():
        versions = [machine.versions.get(canonicalize_name(name)) for name in names]
        installed = [f"{name} {version}" for name, version in zip(names, versions, strict=True) if version]
        error = machine.unavailable[package]
        if error is None:
            yield ok(", ".join(installed) or "can be imported", topic=package)
        elif installed or machine.gpus:
            yield note("; ".join([error, *installed]), INSTALL, package)
        else:
            yield ok("not installed; only GPUs use it", topic=package)


def check_group(machine: Machine) -> Iterator[Finding]:
    name, group = f"NCCL {machine.torch.nccl}" if machine.gpus else "gloo", machine.group
    if group.error:
        interfaces = ", ".join(machine.interfaces)
        remedy = f"fix what the error names; NCCL_DEBUG=INFO logs more; interfaces here: {interfaces}"
        yield problem(f"{name}: one process cannot join a process group on loopback ({group.error})", remedy)
    else:
        yield ok(f"{name}: one process joined a process group on loopback ({group.seconds:.1f} s)")


def check_interfaces(machine: Machine) -> Iterator[Finding]:
    """Interfaces that variables name: NCCL's rules (^ excludes, = is exact, otherwise a prefix), gloo's are exact."""
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value, is_gloo = machine.env.get(variable, ""), variable.startswith("GLOO")
        if not value or value.startswith("^"):
            continue
        same = str.__eq__ if is_gloo or value.startswith("=") else str.startswith
        names = [name.partition(":")[0] for name in value.lstrip("=").split(",")]
        present = [any(same(interface, name) for interface in machine.interfaces) for name in names]
        if not (all(present) if is_gloo else any(present)):  # gloo needs all of them, NCCL uses those that exist
            remedy = f"unset it, or set it to one of {', '.join(machine.interfaces)}"
            yield problem(f"{variable}={value} names no interface of this machine", remedy)


def check_addresses(machine: Machine) -> Iterator[Finding]:
    """Whether other nodes can reach the addresses that host names resolve to."""
    if machine.addresses.error:
        remedy = "check /etc/resolv.conf and /etc/hosts; until then give MASTER_ADDR as a number"
        yield note(f"host names cannot be resolved ({machine.addresses.error})", remedy)
        return
    master, addresses = machine.env.get("MASTER_ADDR"), machine.addresses.value
    if master and addresses.get(master) is None:
        yield problem(f"MASTER_ADDR={master} cannot be resolved", "set it to the first node's name or address")
    own = addresses.get(machine.host)
    uses_own = machine.node_count > 1 and not machine.gpus and "GLOO_SOCKET_IFNAME" not in machine.env
    if uses_own and (own is None or is_loopback(own)):
        text = f"the host name {machine.host} resolves to {own or 'nothing'}: other nodes could not reach gloo there"
        interfaces = ", ".join(machine.interfaces)
        yield note(text, f"set GLOO_SOCKET_IFNAME to the interface between nodes, one of {interfaces}")


def check_infiniband(machine: Machine) -> Iterator[Finding]:
    """The ports, and the variables of NCCL and gloo."""
    env, up, down = machine.env, [], []
    for port, state in machine.ports.items():
        (up if state.startswith("ACTIVE") else down).append(f"{port} {state}")
    if not machine.ports and machine.gpus and machine.node_count > 1:
        remedy = "correct if the nodes have Ethernet only; in a container pass /dev/infiniband through"
        yield note("no device: NCCL uses TCP between nodes", remedy)
    else:
        yield ok("; ".join(up) or "no active port")
    if down:
        remedy = "check cable and subnet manager (ibstat), or exclude the port with NCCL_IB_HCA"
        yield note("not up: " + "; ".join(down), remedy)
    for variable, transport in SLOW_NCCL.items():
        if env.get(variable) == "1" and (variable != "NCCL_IB_DISABLE" or up):
            remedy = f"unset {variable}, unless it works around a fault"
            yield note(f"{variable}=1 disables {transport}", remedy, "network")
    if variables := [f"{name}={env[name]}" for name in sorted(env) if re.match("(TORCH_)?NCCL_|GLOO_", name)]:
        yield ok("set: " + ", ".join(variables), topic="network")


def check_rank(machine: Machine) -> Iterator[Finding]:
    """The rank of this process, read as training reads it."""
    info, gpus = read_rank_info(machine.env), len(machine.gpus)
    if info.launcher:
        yield ok(f"{info.launcher}: rank {info.rank} of {info.world_size}, local rank {info.local_rank}")
    else:
        yield ok("none: this process would train alone; start several ranks with torchrun or a scheduler")
    if 0 < gpus <= info.local_rank:
        text = f"local rank {info.local_rank} needs a GPU of its own, but this process sees {count(gpus, 'GPU')}"
        remedy = "make all GPUs of a node visible to every rank (SLURM: --gpus-per-node, not --gpus-per-task)"
        yield problem(text, f"{remedy}, or start fewer ranks")


def check_launchers(machine: Machine) -> Iterator[Finding]:
    """The SLURM job, and the programs that start ranks."""
    env, nodes = machine.env, machine.node_count
    if "SLURM_JOB_ID" in env:
        text = f"{count(nodes, 'node')} ({env.get('SLURM_JOB_NODELIST', 'names unknown')})"
        yield ok(f"SLURM job {env['SLURM_JOB_ID']}: {text}, {env.get('SLURM_NTASKS', '?')} tasks")
        if nodes > 1 and "SLURM_NTASKS_PER_NODE" not in env:
            text = f"the job has {text} and no --ntasks-per-node: SLURM may place ranks unevenly, such as 3 + 1"
            yield note(text, "give sbatch --ntasks-per-node")
    missing = [name for name in PROGRAMS if name not in machine.programs]
    text = (", ".join(machine.programs) or "none") + (f"; not installed: {', '.join(missing)}" if missing else "")
    yield ok(text, topic="programs")
    if "srun" in missing and {"pdsh", "ssh"} & set(missing):
        remedy = "not needed on one node; for several use a SLURM login node, or install pdsh and ssh for deepspeed"
        yield note("nothing here starts ranks on other nodes", remedy, "programs")


def check_node_memory(machine: Machine) -> Iterator[Finding]:
    total, available = machine.memory
    yield ok(f"{gigabytes(available)} of {gigabytes(total)} available")


def check_shared_memory(machine: Machine) -> Iterator[Finding]:
    if machine.shared_memory is None:
        remedy = "mount -t tmpfs -o size=1g tmpfs /dev/shm; in docker --shm-size=1g"
        yield problem("missing: NCCL's ranks and loader workers need it", remedy)
        return
    total, _, free = machine.shared_memory
    text = f"{gigabytes(free)} of {gigabytes(total)} free"
    if free < SHARED_FULL:
        remedy = "ls -l /dev/shm lists its files; remove those that killed jobs left (nccl-*, torch_*, 000000_*)"
        yield problem(f"full: {text}", remedy)
    elif machine.gpus and total < SHARED_ENOUGH:
        yield note(f"{text}: NCCL may need more", "give the container --shm-size=1g or --ipc=host")
    else:
        yield ok(text)


def check_limits(machine: Machine) -> Iterator[Finding]:
    files, locked = machine.open_files, machine.locked_memory
    if 0 <= files < NEEDED_FILES:
        text = f"a process may open {files} files, and a rank may need {NEEDED_FILES}"
        yield note(text, "ulimit -n 65536 before training")
    if machine.ports and locked >= 0:
        text = f"a process may lock {gigabytes(locked)} of memory, and InfiniBand locks NCCL's buffers"
        remedy = "ulimit -l unlimited; under SLURM PropagateResourceLimitsExcept=MEMLOCK, in docker --ulimit memlock=-1"
        yield note(text, remedy)


MACHINE_CHECKS = (
    Check("packages", check_packages),
    Check("GPU", check_gpus),
    Check("grouped_mm", check_grouped_mm),
    Check("GPU packages", check_gpu_packages),
    Check("network", check_group),
    Check("network", check_interfaces),
    Check("network", check_addresses),
    Check("InfiniBand", check_infiniband),
    Check("launcher", check_rank),
    Check("launcher", check_launchers),
    Check("memory", check_node_memory),
    Check("/dev/shm", check_shared_memory),
    Check("limits", check_limits),
    Check("streaming", check_reader),  # last: it waits for the slowest probe
)
