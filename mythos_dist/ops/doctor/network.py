"""NCCL, gloo, InfiniBand: what ranks will talk over, and the environment variables that steer it."""

import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mythos_dist.ops.cluster.fabric import infiniband_ports
from mythos_dist.ops.doctor.launcher import machines
from mythos_dist.ops.doctor.lines import Line, note, ok, problem
from mythos_dist.ops.doctor.probe import Outcome

# Switches that make NCCL slow, and what they take away.
SLOW = {
    "NCCL_P2P_DISABLE": "NVLink and PCIe between GPUs of one machine",
    "NCCL_SHM_DISABLE": "shared memory between ranks of one machine",
    "NCCL_IB_DISABLE": "InfiniBand between machines",
}


@dataclass(frozen=True)
class Network:
    nccl: str | None  # version; None: torch has no NCCL
    gloo: bool
    gpus: int
    joined: Outcome  # of a process group of one
    host: str
    addresses: Outcome  # {name: address or None} of this host and of MASTER_ADDR
    interfaces: tuple[str, ...]
    ports: dict[str, str]  # InfiniBand and RoCE: "mlx5_0:1" -> "ACTIVE, 400 Gb/sec (4X NDR), InfiniBand"
    environment: Mapping[str, str]


def find(gpus: int, joined: Outcome, addresses: Outcome, environment: Mapping[str, str]) -> Network:
    """`joined`, `addresses`: what the probes `join_group` and `look_up` found."""
    import torch.distributed as dist
    from torch.cuda.nccl import version

    nccl = None
    if dist.is_nccl_available():
        nccl = ".".join(str(part) for part in version())
    return Network(
        nccl=nccl,
        gloo=dist.is_gloo_available(),
        gpus=gpus,
        joined=joined,
        host=socket.gethostname(),
        addresses=addresses,
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        ports=infiniband_ports(),
        environment=environment,
    )


def lines(found: Network) -> Iterator[Line]:
    """The backend and whether it works, ways between machines, variables."""
    yield _backend(found)
    yield from _names(found)
    yield from _infiniband(found)
    yield from _interfaces(found)
    for name, what in SLOW.items():
        if found.environment.get(name) == "1" and (name != "NCCL_IB_DISABLE" or found.ports):
            yield note(
                "network", f"{name}=1 takes {what} away from NCCL", f"unset {name}, unless it works around a fault"
            )
    told = {k: v for k, v in sorted(found.environment.items()) if re.match(r"(TORCH_)?NCCL_|GLOO_", k)}
    if told:
        yield ok("network", "set: " + ", ".join(f"{name}={value}" for name, value in told.items()))


def _backend(found: Network) -> Line:
    name = f"NCCL {found.nccl}" if found.gpus else "gloo"
    if not (found.nccl if found.gpus else found.gloo):
        return problem(
            "network", f"torch was built without {name.split()[0]}", "install torch from https://pytorch.org"
        )
    if found.joined.error:
        interfaces = ", ".join(found.interfaces)
        return problem(
            "network",
            f"{name}: a process group of one process cannot be joined on loopback ({found.joined.error})",
            f"mend what that names; NCCL_DEBUG=INFO says more, and interfaces here are {interfaces}",
        )
    seconds = found.joined.values["seconds"]
    return ok("network", f"{name}: a process group of one process was joined on loopback ({seconds:.1f} s)")


def _names(found: Network) -> Iterator[Line]:
    """Whether names lead where other machines can follow."""
    master = found.environment.get("MASTER_ADDR")
    if found.addresses.error:
        yield note(
            "network",
            f"host names cannot be looked up ({found.addresses.error})",
            "look at /etc/resolv.conf and /etc/hosts; until then give MASTER_ADDR as a number",
        )
        return
    addresses = found.addresses.values
    if master and addresses.get(master) is None:
        yield problem(
            "network",
            f"MASTER_ADDR={master} is no name that this machine knows",
            "set MASTER_ADDR to the first node's name or address",
        )
    own = addresses.get(found.host)
    several = machines(found.environment) > 1
    if several and not found.gpus and "GLOO_SOCKET_IFNAME" not in found.environment and _is_loopback(own):
        yield note(
            "network",
            f"this host's name {found.host} leads to {own or 'nothing'}: gloo would listen where other machines cannot "
            "reach it",
            f"set GLOO_SOCKET_IFNAME to the interface between machines, one of {', '.join(found.interfaces)}",
        )


def _is_loopback(address: str | None) -> bool:
    return address is None or address.startswith("127.") or address == "::1"


def _infiniband(found: Network) -> Iterator[Line]:
    if not found.ports:
        if found.gpus and machines(found.environment) > 1:
            remedy = "right where the machines have Ethernet only; in a container pass /dev/infiniband through"
            yield note("InfiniBand", "no device: NCCL talks TCP between machines", remedy)
        else:
            yield ok("InfiniBand", "no device" + ("; between machines NCCL would talk TCP" if found.gpus else ""))
        return
    down = {port: state for port, state in found.ports.items() if not state.startswith("ACTIVE")}
    up = {port: state for port, state in found.ports.items() if port not in down}
    if up:
        yield ok("InfiniBand", "; ".join(f"{port} {state}" for port, state in up.items()))
    if down:
        text = "not up: " + "; ".join(f"{port} {state}" for port, state in down.items())
        yield note("InfiniBand", text, "look at cable and subnet manager (ibstat), or leave it out with NCCL_IB_HCA")


def _interfaces(found: Network) -> Iterator[Line]:
    """The interfaces that variables name, by NCCL's rules (^ excludes, = is exact, else a prefix) and gloo's, exact."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = found.environment.get(name, "")
        if not value or value.startswith("^"):
            continue
        wanted = [part.partition(":")[0] for part in value.lstrip("=").split(",")]
        exact = name.startswith("GLOO") or value.startswith("=")
        here = [w for w in wanted if any(i == w or (not exact and i.startswith(w)) for i in found.interfaces)]
        # gloo wants every interface that is named, NCCL takes those that it finds.
        if not here or (name.startswith("GLOO") and len(here) < len(wanted)):
            text = f"{name}={value} names no interface of this machine"
            yield problem("network", text, f"unset it, or set it to one of {', '.join(found.interfaces)}")
