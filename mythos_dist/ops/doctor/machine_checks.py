"""Checks that need no config: GPUs, packages, network, memory.

Not here is what the start of a run refuses with the same remedy, and what `pip check` finds.

Decisions: CLUSTER-13.
"""

import platform
import re
from collections import Counter
from collections.abc import Iterator
from importlib import metadata

from mythos_dist.gpu_packages import DISTRIBUTIONS, INSTALL
from mythos_dist.ops.doctor.findings import Check, Finding, gigabytes, note, ok, problem
from mythos_dist.ops.doctor.machine import SMI_SECONDS, Machine
from mythos_dist.parallel.launcher import read_rank_info
from mythos_dist.units import count

SHOWN = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "transformers")
# NCCL passes data between ranks of one node through /dev/shm, and loader workers take their locks from it; docker
# gives 64 MB.
SHARED_FULL = 16 << 20  # bytes left
SHARED_ENOUGH = 1 << 30  # bytes in all, for NCCL on a node with 8 GPUs


def check_versions(machine: Machine) -> Iterator[Finding]:
    yield ok(platform.python_version(), topic="python")
    yield ok(", ".join(f"{name} {metadata.version(name)}" for name in SHOWN))


def check_driver(machine: Machine) -> Iterator[Finding]:
    if machine.driver.version:
        yield ok(machine.driver.version)
    if machine.driver.hangs:
        text = f"nvidia-smi does not answer within {SMI_SECONDS} s: the driver or a GPU hangs"
        yield problem(text, "look for `Xid` in dmesg; drain this node and reboot it")


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """The GPUs that torch can use, and its warnings about them; or why there is none."""
    torch = machine.torch
    yield ok(f"{torch.version}, built for {f'CUDA {torch.cuda}' if torch.cuda else 'CPUs only'}", topic="torch")
    if not torch.gpus:
        if not machine.driver.hangs:
            yield _why_no_gpu(machine)
        return
    kinds = Counter(
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        for gpu in torch.gpus
    )
    text, present = "; ".join(f"{number} x {kind}" for kind, number in kinds.items()), len(machine.driver.gpus)
    if present > len(torch.gpus):
        visible = machine.env.get("CUDA_VISIBLE_DEVICES")
        text += f" (of {present} in this machine{f'; CUDA_VISIBLE_DEVICES={visible}' if visible else ''})"
    if len(kinds) > 1:
        yield note(f"{text}: every step runs at the speed of the slowest", "use GPUs of one kind")
    else:
        yield ok(text)
    if "NVML" in torch.warning:  # torch counts the GPUs in another way then
        yield note(f"torch warns: {torch.warning}", "check the driver's libnvidia-ml.so; training does not need it")
    elif torch.warning:  # such as: this torch has no kernels for the GPU
        remedy = "install a torch built for these GPUs (https://pytorch.org/get-started)"
        yield problem(f"torch warns: {torch.warning}", remedy)
    if len(torch.gpus) <= (local_rank := read_rank_info(machine.env).local_rank):
        text = f"local rank {local_rank} needs a GPU of its own, but this process sees {count(len(torch.gpus), 'GPU')}"
        remedy = "make all GPUs of a node visible to every rank (SLURM: --gpus-per-node, not --gpus-per-task)"
        yield problem(text, f"{remedy}, or start fewer ranks")


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


def check_gpu_packages(machine: Machine) -> Iterator[Finding]:
    """Whether or not a config asks for them."""
    for package in DISTRIBUTIONS:
        if (reason := machine.unavailable[package]) and machine.torch.gpus:
            yield note(reason, INSTALL, package)
        else:
            yield ok(f"{reason}; only GPUs use it" if reason else "can be imported", topic=package)


def check_network(machine: Machine) -> Iterator[Finding]:
    """A process group of this process alone, which fails for an interface that does not exist, too; the variables of
    NCCL and gloo; the address of the machine's own name."""
    name, group = f"NCCL {machine.torch.nccl}" if machine.torch.gpus else "gloo", machine.group
    if group.error:
        text = f"{name}: one process cannot join a process group on loopback ({group.error})"
        yield problem(text, "fix what the error names, perhaps NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME")
    else:
        yield ok(f"{name}: one process joined a process group on loopback ({group.seconds:.1f} s)")
    variables = [f"{key}={machine.env[key]}" for key in sorted(machine.env) if re.match("(TORCH_)?NCCL_|GLOO_", key)]
    if slow := [one for one in variables if re.match("NCCL_(P2P|SHM|IB)_DISABLE=1", one)]:
        yield note(f"slow: {', '.join(slow)}", f"unset {slow[0].partition('=')[0]}, unless it works around a fault")
    if variables:
        yield ok("set: " + ", ".join(variables))
    host, error = machine.host_name
    if error:
        text = f"this machine's name {host} has no address ({error}): torchrun waits 5 minutes for it"
        yield note(text, "add it to /etc/hosts, or on one machine start torchrun with --local-addr localhost")


def check_infiniband(machine: Machine) -> Iterator[Finding]:
    up = [f"{port} {state}" for port, state in machine.ports.items() if state.startswith("ACTIVE")]
    down = [f"{port} {state}" for port, state in machine.ports.items() if not state.startswith("ACTIVE")]
    if not machine.ports and machine.torch.gpus and machine.node_count > 1:
        remedy = "correct if the nodes have Ethernet only; in a container pass /dev/infiniband through"
        yield note("no device: NCCL uses TCP between nodes", remedy)
    else:
        yield ok("; ".join(up) or "no active port")
    if down:
        remedy = "check cable and subnet manager (ibstat), or exclude the port with NCCL_IB_HCA"
        yield note("not up: " + "; ".join(down), remedy)
    if machine.ports and machine.locked_memory >= 0:
        text = f"a process may lock {gigabytes(machine.locked_memory)} of memory, and InfiniBand locks NCCL's buffers"
        remedy = "ulimit -l unlimited; under SLURM PropagateResourceLimitsExcept=MEMLOCK, in docker --ulimit memlock=-1"
        yield note(text, remedy)


def check_node_memory(machine: Machine) -> Iterator[Finding]:
    total, available = machine.memory
    yield ok(f"{gigabytes(available)} of {gigabytes(total)} available")


def check_shared_memory(machine: Machine) -> Iterator[Finding]:
    total, _, free = machine.shared_memory or (0, 0, 0)
    text = f"{gigabytes(free)} of {gigabytes(total)} free, for NCCL's ranks and loader workers"
    if free < SHARED_FULL:
        remedy = "remove what killed jobs left there (nccl-*, torch_*, 000000_*); in docker give --shm-size=1g"
        yield problem(f"full or missing: {text}", remedy)
    elif machine.torch.gpus and total < SHARED_ENOUGH:
        yield note(f"{text}: NCCL may need more", "give the container --shm-size=1g or --ipc=host")
    else:
        yield ok(text)


MACHINE_CHECKS = (
    Check("packages", check_versions),
    Check("driver", check_driver),
    Check("GPU", check_gpus),
    Check("GPU packages", check_gpu_packages),
    Check("network", check_network),
    Check("InfiniBand", check_infiniband),
    Check("memory", check_node_memory),
    Check("/dev/shm", check_shared_memory),
)
