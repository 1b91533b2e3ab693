"""Fault injection for tests, off by default: `faults.inject=kill@3:1,bad_batch@7:0`, a list of `kind@step:rank`.

Only in the first start of a run: `kill` (SIGKILL), `freeze` (SIGSTOP), `hang` (an endless loop, in which the watchdog
still responds), `usr1` and `term` (the rank sends itself the signal), each before the step; `nan` (in a gradient of the
step). In every start: `bad_batch` (a NaN whenever the batch with this index, from 0, is trained on; the index is given
in place of the step), `bad_link` (the rank sends wrong values in preflight's all-reduce; the step is 0).
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

if TYPE_CHECKING:  # faults are parsed before torch is imported
    from torch import nn

_SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "usr1": signal.SIGUSR1, "term": signal.SIGTERM}
KINDS = (*_SIGNALS, "hang", "nan", "bad_batch", "bad_link")


class Fault(NamedTuple):
    kind: str
    step: int
    rank: int


def parse_faults(text: str) -> list[Fault]:
    """Raises UserError with every invalid part."""
    faults, problems = [], []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\w+)@([0-9]{1,15}):([0-9]{1,9})", part)
        if match and match[1] in KINDS:
            faults.append(Fault(match[1], int(match[2]), int(match[3])))
        else:
            problems.append(
                f"faults.inject: {part[:80]!r} is not a fault; write kind@step:rank with a kind of {', '.join(KINDS)}, "
                "such as kill@3:1, or leave it empty"
            )
    if problems:
        raise UserError(problems)
    return faults


@dataclass
class FaultInjector:
    """Injects the faults of one rank in one start."""

    pending: list[Fault]

    @staticmethod
    def for_rank(text: str, rank: int, start: int) -> "FaultInjector":
        """From the value of `faults.inject`; `start` counts the starts of the run from 1."""
        in_every_start = ("bad_batch", "bad_link")
        return FaultInjector(
            [f for f in parse_faults(text) if f.rank == rank and (start == 1 or f.kind in in_every_start)]
        )

    def before_step(self, step: int) -> None:
        """Inject the faults that are due before a step."""
        for fault in list(self.pending):
            if fault.step != step:
                continue
            if fault.kind in _SIGNALS:
                self.pending.remove(fault)
                os.kill(os.getpid(), _SIGNALS[fault.kind])
            while fault.kind == "hang":
                time.sleep(1)

    @contextlib.contextmanager
    def during_step(self, step: int, batch: int, model: "nn.Module") -> Iterator[None]:
        """A context for the passes of a step: injects a NaN into one gradient of this rank."""
        due = [fault for fault in self.pending if fault[:2] in (("nan", step), ("bad_batch", batch))]
        if not due:
            yield
            return
        self.pending = [fault for fault in self.pending if fault not in due or fault.kind == "bad_batch"]
        largest = max(model.parameters(), key=lambda parameter: parameter.numel())
        hook = largest.register_hook(lambda gradient: gradient * float("nan"))
        try:
            yield
        finally:
            hook.remove()
