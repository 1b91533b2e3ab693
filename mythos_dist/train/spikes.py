"""Gradients that are of no use: what is done about a step that DeepSpeed or the limit on gradient norms has skipped.

First the same step is computed again: a bit that flipped in one GPU does not flip twice. If it fails again it is
skipped. `faults.roll_back_after` skipped steps in a row, and the run goes back to its newest checkpoint and passes over
the batches of those steps for ever; after `faults.max_rollbacks` of that, it ends. All ranks decide from numbers that
an all-reduce has given them, so all decide the same.

Which batch a step trains on is thus no longer its number: `rollbacks.json` has those that are left out, and a step
takes the next one that is not. It is written before the run goes back, so a start that is killed then knows.
"""

import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.config.schema import FaultsConfig
from mythos_dist.errors import DivergedError, UserError, first_line
from mythos_dist.files import user_errors, write_atomically
from mythos_dist.parallel.process import raise_on_all_ranks
from mythos_dist.units import count

FILE = "rollbacks.json"
_WINDOW, _ENOUGH = 100, 20  # norms that a median is taken of, and how many there must be


@dataclass(frozen=True)
class Rollback:
    """One decision to go back."""

    step: int  # at which it was taken
    to: int  # the checkpoint's step
    batches: list[int]  # passed over from here on; numbers of batches, from 0
    why: str

    def __str__(self) -> str:
        return (
            f"back from step {self.step} to the checkpoint of step {self.to} and past batches "
            f"{', '.join(map(str, self.batches))}: {self.why}"
        )


@dataclass
class Spikes:
    """The state of the policy; the same on every rank."""

    settings: FaultsConfig
    rollbacks: list[Rollback] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # batches of the last steps in a row
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @staticmethod
    def load(settings: FaultsConfig, run_dir: Path, norms: Sequence[float] = ()) -> "Spikes":
        """With the rollbacks of earlier starts, as rank 0 reads them, and the norms that a checkpoint has kept.

        Raises UserError, on every rank, if their file is damaged.
        """
        found: list[Any] = [raise_on_all_ranks(lambda: read_rollbacks(run_dir) if dist.get_rank() == 0 else [])]
        dist.broadcast_object_list(found)
        return Spikes(settings, found[0], norms=deque(norms, maxlen=_WINDOW))

    @property
    def limit(self) -> float:
        """The largest gradient norm that is not a spike."""
        if not self.settings.spike_factor or len(self.norms) < _ENOUGH:
            return math.inf
        return self.settings.spike_factor * statistics.median(self.norms)

    def batches(self, step: int) -> Iterator[int]:
        """Numbers of the batches of step `step` (from 1) and those after it."""
        left_out = {batch for rollback in self.rollbacks for batch in rollback.batches}
        wanted = (batch for batch in itertools.count() if batch not in left_out)
        for _ in range(step - 1):
            next(wanted)
        return wanted

    def trained(self, norm: float) -> None:
        """A step was not skipped."""
        self.skipped.clear()
        self.norms.append(norm)

    def roll_back(self, step: int, to: int | None, metrics: Path) -> Rollback:
        """Decide on it, on every rank. Raises DivergedError if that was done too often already.

        to: the newest checkpoint's step; while steps are skipped none is saved, so it lies before them.
        """
        why = f"{count(len(self.skipped), 'step')} in a row {'was' if len(self.skipped) == 1 else 'were'} skipped"
        if len(self.rollbacks) >= self.settings.max_rollbacks or to is None:
            tried = f"after {len(self.rollbacks)} rollbacks" if to is not None else "and there is no checkpoint yet"
            raise DivergedError(
                f"step {step}: {why} {tried}; look at loss and grad_norm in {metrics}, then lower optim.lr or raise "
                "optim.warmup_steps, or allow more (faults.max_rollbacks)"
            )
        rollback = Rollback(step, to, list(self.skipped), why)
        self.rollbacks.append(rollback)
        self.skipped.clear()
        return rollback

    def write(self, fence: Fence) -> None:
        """On rank 0, before the run goes back. Raises UserError if the disk takes nothing, or a newer start runs."""
        with user_errors(fence.run_dir / FILE), fence.guard():
            content = json.dumps([asdict(entry) for entry in self.rollbacks], indent=1) + "\n"
            write_atomically(fence.run_dir / FILE, content)

    def decision(self, step: int) -> str:
        """The rollback that step `step` comes behind, in words; empty: none."""
        return "; ".join(str(rollback) for rollback in self.rollbacks if rollback.to + 1 == step)


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Those that earlier starts have written. Raises UserError if their file is damaged."""
    file = run_dir / FILE
    try:
        found = [Rollback(**entry) for entry in json.loads(file.read_bytes())]
        if not all(isinstance(batch, int) for rollback in found for batch in rollback.batches):
            raise ValueError("batches are numbers")
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({first_line(error)}): it says which batches are left out; put it back from a copy, or "
            "remove it, and no batch is left out"
        ) from None
