"""Loss spikes and non-finite gradients: what follows a step that DeepSpeed or the limit on gradient norms has skipped.

With `faults.retry` a step with non-finite gradients is computed again (not after an fp16 overflow): a bit that flipped
in one GPU does not flip twice. If it fails again it is skipped. After `faults.roll_back_after` skipped steps in a row
the run returns to its newest checkpoint and excludes the batches of those steps; after `faults.max_rollbacks` rollbacks
it ends. All ranks decide from all-reduced values, so their decisions are the same.

After a rollback, step and batch index differ: a step takes the next samples that are not excluded (`global_batch.py`).
`rollbacks.json` has the excluded samples. It is written before the checkpoint is loaded, so a start that is killed then
does not lose them.

Decisions: CLUSTER-7, CLUSTER-8, CHECKPOINT-7, STAGES-4.
"""

import json
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.config.schema import FaultsConfig
from mythos_dist.errors import DivergedError, UserError, first_line
from mythos_dist.files import user_errors
from mythos_dist.parallel.process import from_rank_0
from mythos_dist.train.global_batch import GlobalBatch
from mythos_dist.units import count

FILE = "rollbacks.json"
_WINDOW, _MIN_NORMS = 100, 20  # the most and the fewest norms that a median is computed from


@dataclass(frozen=True)
class Rollback:
    """One rollback."""

    step: int  # after which it was decided
    to: int  # the checkpoint's step
    batches: list[int]  # excluded from now on; indices from 0
    why: str
    stage: str = ""  # in which it was decided
    # The samples of these batches: [begin, end) in the order of the data of that stage. None, as earlier versions wrote
    # it: from index * train.global_batch on.
    samples: list[list[int]] | None = None

    def __str__(self) -> str:
        return (
            f"rolled back from step {self.step} to the checkpoint of step {self.to}, excluding batches "
            f"{', '.join(map(str, self.batches))}: {self.why}"
        )


@dataclass
class SpikeGuard:
    """The norms, skipped steps and rollbacks of a run; the same on every rank."""

    settings: FaultsConfig
    rollbacks: list[Rollback] = field(default_factory=list)
    skipped: list[GlobalBatch] = field(default_factory=list)  # of the latest skipped steps in a row
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @staticmethod
    def load(settings: FaultsConfig, run_dir: Path) -> "SpikeGuard":
        """With the rollbacks of earlier starts, which rank 0 reads.

        Raises UserError, on every rank, if the file of rollbacks is damaged.
        """
        return SpikeGuard(settings, from_rank_0(lambda: read_rollbacks(run_dir)))

    @property
    def limit(self) -> float:
        """The largest gradient norm that is not a spike."""
        if not self.settings.spike_factor or len(self.norms) < _MIN_NORMS:
            return math.inf
        return self.settings.spike_factor * statistics.median(self.norms)

    def record_norm(self, norm: float) -> None:
        """After a step that was not skipped."""
        self.skipped.clear()
        self.norms.append(norm)

    def roll_back(self, step: int, to: int | None, stage: str, metrics: Path) -> Rollback:
        """Record a rollback, on every rank. Raises DivergedError if there were too many already.

        to: the step of the newest checkpoint; none is saved while steps are skipped, so it is before them.
        """
        why = f"{count(len(self.skipped), 'step')} in a row {'was' if len(self.skipped) == 1 else 'were'} skipped"
        if len(self.rollbacks) >= self.settings.max_rollbacks or to is None:
            tried = (
                f"after {count(len(self.rollbacks), 'rollback')}"
                if to is not None
                else "and there is no checkpoint yet"
            )
            raise DivergedError(
                f"step {step}: {why} {tried}; see loss and grad_norm in {metrics}; lower optim.lr, raise "
                "optim.warmup_steps or allow more rollbacks (faults.max_rollbacks)"
            )
        batches = [batch.index for batch in self.skipped]
        samples = [list(ends) for batch in self.skipped for ends in batch.ranges]
        rollback = Rollback(step, to, batches, why, stage, samples)
        self.rollbacks.append(rollback)
        self.skipped.clear()
        return rollback

    def write(self, fence: Fence) -> None:
        """On rank 0, before the checkpoint is loaded. Raises UserError if it fails or the run has a newer start."""
        with user_errors(fence.run_dir / FILE), fence.guard():
            content = json.dumps([asdict(entry) for entry in self.rollbacks], indent=1) + "\n"
            fence.replace(fence.run_dir / FILE, content)

    def rollback_before(self, step: int) -> str:
        """Describes the rollbacks after which step `step` is the first one; empty: none."""
        return "; ".join(str(rollback) for rollback in self.rollbacks if rollback.to + 1 == step)


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """The rollbacks of earlier starts. Raises UserError if their file is damaged."""
    file = run_dir / FILE
    try:
        rollbacks = [Rollback(**entry) for entry in json.loads(file.read_bytes())]
        for rollback in rollbacks:
            if not all(isinstance(batch, int) for batch in rollback.batches):
                raise ValueError("a batch index is not a number")
            for begin, end in rollback.samples or []:
                if not 0 <= begin < end < 1 << 62:
                    raise ValueError(f"a range of samples is [{begin}, {end}]")
        return rollbacks
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({first_line(error)}): it lists the batches to exclude; restore it from a copy, "
            "or remove it to exclude none"
        ) from None
