"""The slowest kernels of a trace by part of the step: attention, router, experts, exchange and so on.

On a GPU a kernel's time is that of the device, on a CPU the operation's own. An operation belongs to the innermost
named range (`parallel/ranges.py`) around it. Those of a backward pass have none: the profiler gives each node of
autograd the sequence number of the forward operation that created it, and the node belongs to that operation's range.
The traps: operations that create no node have the number of the next one, so the last operation with a number counts.
And the trace file is read, not `profile.events()`, whose objects take minutes for the operations of a few steps.
"""

import gzip
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from mythos_dist.parallel.ranges import PARTS

OTHER = "other"
_TOP = 8  # kernels of a part
_NAME = 72  # characters of a kernel's name
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events
_RANGE, _OPERATION = "user_annotation", "cpu_op"

Event = Mapping[str, Any]  # of Chrome's trace format


class KernelTime(NamedTuple):
    """A kernel in a part: its calls and its time in microseconds."""

    part: str
    kernel: str
    calls: int
    time: float


class _Operation(NamedTuple):
    """An operation or range that has begun in a thread."""

    end: float  # microseconds
    part: str
    total: list[float]  # of its kernel and part: calls, microseconds


def read_trace(file: str | Path) -> list[Event]:
    """The events of a compressed trace. Raises OSError."""
    with gzip.open(file) as stream:
        return orjson.loads(stream.read())["traceEvents"]


def kernels_by_part(events: Iterable[Event]) -> list[KernelTime]:
    """Rows of all kernels, slowest parts and kernels first."""
    timed = [event for event in events if event.get("ph") == "X"]
    begun = [event for event in timed if event.get("cat") in (_RANGE, _OPERATION)]
    begun.sort(key=lambda event: (event["ts"], -event["dur"]))
    on_device = [event for event in timed if event.get("cat") in _ON_DEVICE]
    totals, part_of = _operations(begun)
    if on_device:
        totals = defaultdict(lambda: [0, 0.0])
        for event in on_device:
            total = totals[part_of.get(event["args"].get("External id"), OTHER), event["name"]]
            total[0] += 1
            total[1] += event["dur"]
    rows = [KernelTime(part, name, int(calls), time) for (part, name), (calls, time) in totals.items() if time > 0]
    by_part: dict[str, float] = defaultdict(float)
    for row in rows:
        by_part[row.part] += row.time
    return sorted(rows, key=lambda row: (-by_part[row.part], row.part, -row.time, row.kernel))


Totals = dict[tuple[str, str], list[float]]  # calls and microseconds by part and kernel


def _operations(begun: list[Event]) -> tuple[Totals, dict[int, str]]:
    """Calls and own times on the CPU of operations, in the order in which they began; and the part of each, by its
    external id, which the kernels that it has launched refer to."""
    totals: Totals = defaultdict(lambda: [0, 0.0])
    parts: dict[int, str] = {}
    created: dict[int, str] = {}  # by sequence number: the part of the forward operation
    running: dict[Any, list[_Operation]] = defaultdict(list)  # by thread, the innermost last
    for event in begun:
        arguments, stack = event["args"], running[event["tid"]]
        while stack and stack[-1].end <= event["ts"]:
            stack.pop()
        number, is_backward = arguments.get("Sequence number", -1), bool(arguments.get("Fwd thread id"))
        part = _range_name(event)
        if not part and is_backward and (creator := created.get(number, OTHER)) != OTHER:
            part = creator
        if not part:
            part = stack[-1].part if stack else OTHER
        if number >= 0 and not is_backward:
            created[number] = part
        if stack:
            stack[-1].total[1] -= event["dur"]
        total = totals[part, event["name"]] if event["cat"] == _OPERATION else [0, 0.0]
        total[0] += 1
        total[1] += event["dur"]
        stack.append(_Operation(event["ts"] + event["dur"], part, total))
        parts[arguments.get("External id", -1)] = part
    return totals, parts


def _range_name(event: Event) -> str:
    """The part that the event is the range of, or ""."""
    if event["cat"] != _RANGE:
        return ""
    name = "loop" if event["name"].startswith("loop ") else event["name"]
    return name if name in PARTS else ""


def kernel_table(rows: list[KernelTime], title: str, steps: int) -> str:
    """The table as text; times are of one step."""
    total = sum(row.time for row in rows)
    if not total:
        return f"{title}: no kernel was recorded\n"
    by_part: dict[str, list[KernelTime]] = {}
    for row in rows:
        by_part.setdefault(row.part, []).append(row)
    lines = [f"{title}; times and calls are of one step, {total / steps / 1000:.2f} ms in all", ""]
    lines.append(f"{'part':<10} {'ms':>10} {'share':>7} {'calls':>9}  kernel")
    for part, kernels in by_part.items():
        time, calls = sum(row.time for row in kernels), sum(row.calls for row in kernels)
        lines.append(_line(part, time, total, calls, steps, ""))
        lines += [_line("", row.time, total, row.calls, steps, row.kernel) for row in kernels[:_TOP]]
        if rest := kernels[_TOP:]:
            time, calls = sum(row.time for row in rest), sum(row.calls for row in rest)
            lines.append(_line("", time, total, calls, steps, f"{len(rest)} others"))
    return "\n".join(lines) + "\n"


def _line(part: str, time: float, total: float, calls: int, steps: int, kernel: str) -> str:
    name = kernel if len(kernel) <= _NAME else kernel[: _NAME - 1] + "…"
    return f"{part:<10} {time / steps / 1000:>10.2f} {100 * time / total:>6.1f}% {calls / steps:>9.6g}  {name}".rstrip()
