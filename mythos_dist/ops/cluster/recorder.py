"""What each rank is in the middle of: the last collective that it began, and how many it began in each group.

Functions of `torch.distributed` are replaced by ones that count; ours and DeepSpeed's go through them alike. It costs
7 us per message. The trap: a message that was begun need not have ended (`async_op`), so what is compared between ranks
are beginnings.
"""

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mythos_dist.ops.cluster.rendezvous import format_ranges

_COLLECTIVES = (
    "all_reduce reduce broadcast all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor all_to_all "
    "all_to_all_single gather scatter barrier all_gather_object gather_object broadcast_object_list"
).split()
_MESSAGES = {"send": "dst", "isend": "dst", "recv": "src", "irecv": "src"}


@dataclass
class CollectiveRecorder:
    """This rank's collectives."""

    begun: dict[str, int] = field(default_factory=dict)  # by group's name
    last: tuple[str, int, int] = ("none yet", 0, 0)  # which, the how manieth of its group, numbers in its tensor
    group: str = ""  # of the last one
    members: list[int] = field(default_factory=list)  # of it: who must arrive

    def install(self) -> None:
        """From here on all messages are seen."""
        for name in (*_COLLECTIVES, *_MESSAGES):
            setattr(dist, name, self._wrap(name, getattr(dist, name)))

    def report(self) -> dict[str, Any]:
        """For the watchdog of rank 0, as JSON."""
        return {
            "begun": dict(self.begun),
            "last": self.describe(),
            "group": self.group,
            "members": self.members,
            "at": where(),
        }

    def describe(self) -> str:
        """The last collective, for a person."""
        name, number, size = self.last
        return name + (f" number {number} over ranks {format_ranges(self.members)}, {size:,} numbers" if number else "")

    def _wrap(self, name: str, function: Callable) -> Callable:
        names = list(inspect.signature(function).parameters)
        position = names.index("group")
        peer = names.index(_MESSAGES[name]) if name in _MESSAGES else None

        def recorded(*arguments: Any, **keywords: Any) -> Any:
            group = keywords.get("group") or (arguments[position] if len(arguments) > position else None)
            group = group if isinstance(group, dist.ProcessGroup) else dist.distributed_c10d._get_default_group()
            tensor = next((value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)), None)
            if peer is None:
                self._begin(name, group.group_name, lambda: dist.get_process_group_ranks(group), tensor)
            else:
                other = int(arguments[peer] if len(arguments) > peer else keywords[names[peer]])
                way = [dist.get_rank(), other] if "send" in name else [other, dist.get_rank()]
                self._begin(name, f"{way[0]} to {way[1]}", lambda: way, tensor)
            return function(*arguments, **keywords)

        recorded.__name__, recorded.__doc__ = name, function.__doc__
        return recorded

    def _begin(self, name: str, group: str, members: Callable[[], list[int]], tensor: Tensor | None) -> None:
        self.begun[group] = number = self.begun.get(group, 0) + 1
        if group != self.group:
            self.group, self.members = group, members()
        self.last = name, number, 0 if tensor is None else tensor.numel()


def where() -> str:
    """Where the main thread is, in its innermost function of ours."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and ("/mythos_dist/" not in frame.f_code.co_filename or "recorder" in frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "nowhere"
    return f"{frame.f_code.co_filename.rpartition('/mythos_dist/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"


def find_blocking_ranks(reports: dict[int, dict[str, Any]], ranks: int) -> tuple[list[int], str]:
    """Who keeps the others waiting, and at what: ranks that did not begin a collective that another has begun.

    `reports`: of the ranks that answered. A rank that waits for a third one is not blocking. Returns ([], "") if all of
    them have begun the same.
    """
    missing: dict[int, set[int]] = {}  # whom a rank waits for
    for rank, report in reports.items():
        group = report["group"]
        for other in report["members"]:
            theirs = reports.get(other)
            if other == rank:
                continue
            if theirs is None or theirs["begun"].get(group, 0) < report["begun"][group]:
                missing.setdefault(rank, set()).add(other)
    silent = set(range(ranks)) - reports.keys()
    awaited = set().union(*missing.values())
    guilty = sorted(rank for rank in awaited if rank in silent or rank not in missing) or sorted(awaited)
    waiting = next((rank for rank, others in sorted(missing.items()) if others & set(guilty)), None)
    return guilty, reports[waiting]["last"] if waiting is not None else ""
