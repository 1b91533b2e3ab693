"""Interfaces: which one leads to rank 0, and what InfiniBand there is."""

import os
import socket
from collections.abc import MutableMapping
from pathlib import Path

import psutil

from mythos_dist.parallel.launcher import RankInfo


def infiniband_ports(folder: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """State, rate and link layer of each port below `folder`; empty where there is no such folder."""
    ports = {}
    for port in sorted(folder.glob("*/ports/*")):
        state, rate, link = (
            (port / name).read_text().strip() if (port / name).is_file() else "?"
            for name in ("state", "rate", "link_layer")
        )
        ports[f"{port.parent.parent.name}:{port.name}"] = f"{state.rpartition(': ')[2]}, {rate}, {link}"
    return ports


def set_network_interface(rank_info: RankInfo, environment: MutableMapping[str, str] = os.environ) -> str:
    """Tell gloo and NCCL which interface leads to rank 0, by this node's own name for it; what is set stays.

    Left to itself gloo listens at the address of the host's name, which on many systems is a loopback address, and one
    name for all nodes does not fit where they call their interfaces differently. Returns "" on one node.
    """
    if rank_info.world_size == rank_info.local_world_size:
        return ""
    name, _ = interface_to(rank_info.master_addr, rank_info.master_port)
    if name:
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
        environment.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this name and not all that begin so
    return name


def interface_to(host: str, port: int) -> tuple[str, str]:
    """(interface, our address on it) on the way to `host`, or else of the first one that is up; ("", "") without any.

    The host's own name leads to a loopback address on many systems, where no other node can reach it.
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
    return min(others, key=lambda found: found[1].startswith("fe80:"), default=("", ""))


def listen_address(host: str, port: int, one_node: bool) -> str:
    """Where rank 0 listens: its address on the way to the others, loopback on one node; "" (all) if none is known."""
    address = local_address_to(host, port)
    if not address or (is_loopback(address) and not one_node):
        address = interface_to(host, port)[1]
    return "" if address.startswith("fe80:") else address  # without the interface's name it leads nowhere


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def local_address_to(host: str, port: int) -> str:
    """Ours on the way to `host`; nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return ""
