"""The batch of each step: at which positions in the order of the data it trains, over all replicas.

Rule: of the positions from the beginning of the stage on, without those that a rollback has excluded, each step takes
the next `train.batch_size_at(step)`. So the batch of a step follows from config, lineage and `rollbacks.json`, and the
number of samples until a step from config and lineage alone.

Decisions: CLUSTER-8, STAGES-4.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mythos_dist.checkpoint.manifest import Lineage
from mythos_dist.config.schema import Config

if TYPE_CHECKING:
    from mythos_dist.train.spikes import Rollback


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of one step."""

    index: int  # from 0 over all stages of the run; excluded batches keep theirs
    positions: np.ndarray  # (global batch,) int64, ascending, of its samples in the order of the data

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The positions as ranges [begin, end)."""
        runs = np.split(self.positions, np.flatnonzero(np.diff(self.positions) > 1) + 1)
        return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def batches_from(config: Config, lineage: Lineage, rollbacks: Sequence["Rollback"], step: int) -> Iterator[GlobalBatch]:
    """The batches of step `step` (1-based), which is in the current stage, and of the steps after it, without end."""
    excluded_batches = sorted({batch for rollback in rollbacks for batch in rollback.batches if batch >= 0})
    excluded = _excluded_ranges(config, lineage, rollbacks)
    for each in itertools.count(step):
        index = each - 1
        for batch in excluded_batches:
            index += batch <= index
        done = samples_of_stage(config, lineage, each - 1)
        size = config.train.batch_size_at(lineage.first_step + each)
        yield GlobalBatch(index, _nth_positions(lineage.first_sample, excluded, done, size))


def samples_of_stage(config: Config, lineage: Lineage, step: int) -> int:
    """Sequences that the current stage was trained on until `step`."""
    first, last = lineage.first_step + config.run.stage_begin, lineage.first_step + step
    return config.train.samples_until(last) - config.train.samples_until(first)


def tokens_at(config: Config, lineage: Lineage, step: int) -> int:
    """Tokens that the run itself was trained on until `step`, which is in the current stage."""
    return lineage.first_tokens + samples_of_stage(config, lineage, step) * config.train.seq_len


def _excluded_ranges(config: Config, lineage: Lineage, rollbacks: Iterable["Rollback"]) -> list[tuple[int, int]]:
    """What rollbacks of the current stage exclude, [begin, end), ascending and disjoint."""
    size, ranges = config.train.global_batch, []
    for rollback in rollbacks:
        if rollback.stage != config.run.stage:
            continue  # positions in another order, or before this stage
        if rollback.samples is not None:
            ranges += rollback.samples
        else:
            first = lineage.first_sample
            ranges += [(first + batch * size, first + (batch + 1) * size) for batch in rollback.batches]
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        begin = max(begin, merged[-1][1] if merged else lineage.first_sample)
        if begin < end:
            merged.append((begin, end))
    return merged


def _nth_positions(first: int, excluded: Iterable[tuple[int, int]], skip: int, size: int) -> np.ndarray:
    """`size` of the positions from `first` on that are not excluded, after the first `skip` of them."""
    wanted = np.arange(first + skip, first + skip + size)
    for begin, end in excluded:
        wanted[wanted >= begin] += end - begin
    return wanted
