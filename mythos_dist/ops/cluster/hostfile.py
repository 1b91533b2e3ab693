"""Hostfiles of DeepSpeed: `HOST slots=N` per line, `#` for comments."""

import re
from collections import Counter
from pathlib import Path

from mythos_dist.errors import UserError

MAX_COUNT = 100_000  # nodes, ranks on a node, or jobs in a chain: larger numbers are refused as typing errors
_HOST_RULE = "use letters, digits, dots, hyphens and underscores, such as node1 or user@node1.cluster (no IPv6 address)"


def read_slots(path: str | Path) -> dict[str, int]:
    """Slots by host, in the order of the file; all hosts have the same number.

    Raises UserError with all problems: lines of another form, invalid host names, duplicate hosts, unequal slots.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {path} cannot be read: {error}; see hostfile.example") from None
    slots: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()  # DeepSpeed also ignores the rest of a line after its number
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not match:
            problems.append(f"line {number}: {line!r} is not of the form `HOST slots=N`, such as `node1 slots=8`")
        elif not is_host(match[1]):
            problems.append(f"line {number}: {match[1]!r} is not a host name: {_HOST_RULE}")
        elif len(match[2]) > 6 or not 1 <= int(match[2]) <= MAX_COUNT:
            what = "gives no ranks" if not match[2].strip("0") else f"gives more than {MAX_COUNT:,} ranks"
            problems.append(f"line {number}: {line[:300]!r} {what}; remove the host, or set slots to 1 or more")
        elif match[1] in slots:
            problems.append(f"line {number}: {match[1]} is listed twice; write one line per host")
        else:
            slots[match[1]] = int(match[2])
    if not slots and not problems:
        problems.append("lists no host; write a line like `node1 slots=8` for each")
    problems += _uneven_slots(slots)
    if problems:
        raise UserError(problems, source=str(path))
    return slots


def is_host(name: str) -> bool:
    """Whether `name` is safe in command lines of shells, ssh, pdsh and mpirun: a host name or an IPv4 address.

    Other characters could turn it into a command, an option, a list or pattern of hosts, or a transport.
    """
    word = r"[A-Za-z0-9_][\w.-]{0,254}"
    return re.fullmatch(f"({word}@)?{word}", name, re.ASCII) is not None


def _uneven_slots(slots: dict[str, int]) -> list[str]:
    """A problem for every host whose slots differ from the most common number."""
    counts = Counter(slots.values()).most_common()
    if len(counts) < 2:
        return []
    usual = counts[0][0]
    others = [host for host, number in slots.items() if number == usual]
    most = f"{others[0]} has" if len(others) == 1 else f"{others[0]} and {len(others) - 1} more have"
    return [
        f"{host} has slots={number}, but {most} slots={usual}: every node must run the same number of ranks; "
        f"set its slots to {usual}, remove {host}, or set all to {min(slots.values())}"
        for host, number in slots.items()
        if number != usual
    ]
