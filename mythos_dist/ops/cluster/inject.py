"""Fault injection for tests: `faults.inject=kill@3:1,bad_batch@7:0`. Off unless that is set.

`kind@step:rank`. In the first start of a run and once: `kill` (SIGKILL), `freeze` (SIGSTOP), `hang` (an endless loop
that answers), `usr1` and `term` (a signal to itself), each before the step; `nan` (in a gradient of the step). In every
start: `bad_batch` (a NaN whenever the batch of that number, from 0, is trained on), `bad_link` (this rank's part of the
first all-reduce comes out wrong; its step is 0).
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mythos_dist.errors import UserError

if TYPE_CHECKING:  # the order is read before torch is imported
    from torch import nn

_SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "usr1": signal.SIGUSR1, "term": signal.SIGTERM}
KINDS = (*_SIGNALS, "hang", "nan", "bad_batch", "bad_link")


class Fault(NamedTuple):
    kind: str
    step: int
    rank: int


def parse_faults(text: str) -> list[Fault]:
    """Raises UserError, with every part that is no fault."""
    faults, problems = [], []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\w+)@([0-9]{1,15}):([0-9]{1,9})", part)
        if found and found[1] in KINDS:
            faults.append(Fault(found[1], int(found[2]), int(found[3])))
        else:
            problems.append(
                f"faults.inject: {part[:80]!r} is no fault; write kind@step:rank with a kind of {', '.join(KINDS)}, "
                "such as kill@3:1, or leave it empty"
            )
    if problems:
        raise UserError(problems)
    return faults


@dataclass
class FaultInjector:
    """Those of one rank in one start."""

    left: list[Fault]

    @staticmethod
    def for_rank(text: str, rank: int, start: int) -> "FaultInjector":
        """What `faults.inject` means for a rank in start number `start` (from 1)."""
        again = ("bad_batch", "bad_link")
        return FaultInjector([f for f in parse_faults(text) if f.rank == rank and (start == 1 or f.kind in again)])

    def before_step(self, step: int) -> None:
        """What is to happen before a step."""
        for fault in [fault for fault in self.left if fault.step == step]:
            if fault.kind in _SIGNALS or fault.kind == "hang":
                self.left.remove(fault)
            if fault.kind in _SIGNALS:
                os.kill(os.getpid(), _SIGNALS[fault.kind])
            while fault.kind == "hang":
                time.sleep(1)

    @contextlib.contextmanager
    def during_step(self, step: int, batch: int, model: "nn.Module") -> Iterator[None]:
        """Around a step's passes: a NaN in one gradient of this rank."""
        due = [fault for fault in self.left if fault[:2] in (("nan", step), ("bad_batch", batch))]
        if not due:
            yield
            return
        self.left = [fault for fault in self.left if fault not in due or fault.kind == "bad_batch"]
        largest = max(model.parameters(), key=lambda parameter: parameter.numel())
        hook = largest.register_hook(lambda gradient: gradient * float("nan"))
        try:
            yield
        finally:
            hook.remove()
