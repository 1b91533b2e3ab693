"""Network interfaces: the one that leads to rank 0, and InfiniBand ports."""

import os
import socket
from collections.abc import MutableMapping
from pathlib import Path

import psutil

from mythos_dist.parallel.launcher import RankInfo


def infiniband_ports(folder: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """State, rate and link layer by port; empty if `folder` does not exist."""
    ports = {}
    for port in sorted(folder.glob("*/ports/*")):
        state, rate, link = (
            (port / name).read_text().strip() if (port / name).is_file() else "?"
            for name in ("state", "rate", "link_layer")
        )
        ports[f"{port.parent.parent.name}:{port.name}"] = f"{state.rpartition(': ')[2]}, {rate}, {link}"
    return ports


def set_network_interface(rank_info: RankInfo, environment: MutableMapping[str, str] = os.environ) -> str:
    """Set the variables by which gloo and NCCL choose the interface that leads to rank 0, unless they are set.

    By default gloo listens at the address of the host name, which is a loopback address on many systems, and interface
    names may differ between nodes. Returns the name; "" on one node.
    """
    if rank_info.world_size == rank_info.local_world_size:
        return ""
    name, _ = interface_to(rank_info.master_addr, rank_info.master_port)
    if name:
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
        environment.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": exactly this name, not a prefix
    return name


def interface_to(host: str, port: int) -> tuple[str, str]:
    """(name, local address) of the interface that leads to `host`, else of one that is up; ("", "") if there is none.

    The address of the host name is not an alternative: on many systems it is a loopback address.
    """
    address = local_address_to(host, port)
    names = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    if address in names and not is_loopback(address):
        return names[address], address
    up = psutil.net_if_stats()
    others = [(name, address) for address, name in names.items() if up[name].isup and not is_loopback(address)]
    return min(others, key=lambda other: other[1].startswith("fe80:"), default=("", ""))


def listen_address(host: str, port: int, one_node: bool) -> str:
    """Where rank 0 listens: the address that other nodes reach, loopback on one node; "" (all) if it is unknown."""
    address = local_address_to(host, port)
    if not address or (is_loopback(address) and not one_node):
        address = interface_to(host, port)[1]
    return "" if address.startswith("fe80:") else address  # link-local: needs an interface name


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def local_address_to(host: str, port: int) -> str:
    """The local address from which packets to `host` are sent; "" if there is none. Sends nothing."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return ""
