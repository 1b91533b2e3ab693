"""Records the collectives of this rank: the last one called, and the number of calls in each group.

Functions of `torch.distributed` are replaced by wrappers, so DeepSpeed's collectives are counted as well. It costs 7 us
per call. The trap: a call that was made need not have completed (`async_op`), so ranks are compared by calls.

Decisions: CLUSTER-3.
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
from mythos_dist.ops.cluster.watchdog_protocol import CollectiveState
from mythos_dist.units import count

_COLLECTIVES = (
    "all_reduce reduce broadcast all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor all_to_all "
    "all_to_all_single gather scatter barrier all_gather_object gather_object broadcast_object_list"
).split()
_POINT_TO_POINT = {"send": "dst", "isend": "dst", "recv": "src", "irecv": "src"}  # and the argument with the peer


@dataclass
class CollectiveRecorder:
    """The collectives and point-to-point calls of this rank."""

    calls: dict[str, int] = field(default_factory=dict)  # number of calls by group name, or "SENDER to RECEIVER"
    last: tuple[str, int, int] = ("none yet", 0, 0)  # function, number of the call in its group, elements in its tensor
    group: str = ""  # of the last call
    members: list[int] = field(default_factory=list)  # ranks of that group

    def install(self) -> None:
        """Record all calls from now on."""
        for name in (*_COLLECTIVES, *_POINT_TO_POINT):
            setattr(dist, name, self._wrap(name, getattr(dist, name)))

    def state(self) -> CollectiveState:
        """For the watchdog server."""
        return CollectiveState(
            calls=dict(self.calls),
            last=self.describe(),
            group=self.group,
            members=self.members,
            at=main_thread_location(),
        )

    def describe(self) -> str:
        """The last call, for messages: "all_reduce number 5 over ranks 0-3, 1,024 elements"."""
        name, number, size = self.last
        if not number:
            return name
        return f"{name} number {number} over ranks {format_ranges(self.members)}, {count(size, 'element')}"

    def _wrap(self, name: str, function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters)
        group_position = parameters.index("group")
        peer_position = parameters.index(_POINT_TO_POINT[name]) if name in _POINT_TO_POINT else None

        def recorded(*arguments: Any, **keywords: Any) -> Any:
            group = keywords.get("group") or (arguments[group_position] if len(arguments) > group_position else None)
            group = group if isinstance(group, dist.ProcessGroup) else dist.distributed_c10d._get_default_group()
            tensor = next((value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)), None)
            if peer_position is None:
                self._record(name, group.group_name, lambda: dist.get_process_group_ranks(group), tensor)
            else:
                has_position = len(arguments) > peer_position
                peer = int(arguments[peer_position] if has_position else keywords[parameters[peer_position]])
                ends = [dist.get_rank(), peer] if "send" in name else [peer, dist.get_rank()]
                self._record(name, f"{ends[0]} to {ends[1]}", lambda: ends, tensor)
            return function(*arguments, **keywords)

        recorded.__name__, recorded.__doc__ = name, function.__doc__
        return recorded

    def _record(self, name: str, group: str, members: Callable[[], list[int]], tensor: Tensor | None) -> None:
        self.calls[group] = number = self.calls.get(group, 0) + 1
        if group != self.group:
            self.group, self.members = group, members()
        self.last = name, number, 0 if tensor is None else tensor.numel()


def main_thread_location() -> str:
    """File, line and function of this package that the main thread is in."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and ("/mythos_dist/" not in frame.f_code.co_filename or "recorder" in frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "an unknown position"
    return f"{frame.f_code.co_filename.rpartition('/mythos_dist/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"


def find_blocking_ranks(states: dict[int, CollectiveState]) -> tuple[list[int], str]:
    """The ranks that block the others, and the collective that they did not call.

    A rank waits for another one of its last group that has made fewer calls in that group, or that sent no state. Of
    the ranks waited for, those that wait for none themselves block the run. Returns ([], "") if none waits.

    states: of the ranks that responded.
    """
    waits_for: dict[int, set[int]] = {}
    for rank, state in states.items():
        for other in state.members:
            if other == rank:
                continue
            theirs = states.get(other)
            if theirs is None or theirs.calls.get(state.group, 0) < state.calls[state.group]:
                waits_for.setdefault(rank, set()).add(other)
    awaited = set().union(*waits_for.values())
    blocking = sorted(rank for rank in awaited if rank not in waits_for)  # a rank without a state waits for none
    blocking = blocking or sorted(awaited)  # they wait for each other
    for rank, others in sorted(waits_for.items()):
        if others & set(blocking):
            return blocking, states[rank].last
    return blocking, ""
