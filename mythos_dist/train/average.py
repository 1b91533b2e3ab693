"""The average of the weights over training, in fp32 beside the master weights that a rank's ZeRO optimizer holds.

The weights w after every step that is a multiple of `average.every` are a snapshot. With an average's k-th snapshot

    average += (w - average) * rate(k),   rate(k) = 1 / k (mean), (1 - decay) / (1 - decay^k) (ema)

where difference, product and sum are rounded to fp32 one after the other, and the rate is rounded once. So a mean is
that of its snapshots. An ema gives them the weights decay^0, decay^1, ... from the newest back, divided by their sum:
Adam's bias correction (Kingma & Ba 2015), so it does not depend on the weights before the first snapshot.

A mean of the last N snapshots would take N copies of the weights. Here snapshots are grouped into windows of N that are
counted back from the run's last snapshot, and a mean starts over with each window: at the end it is that of the last N
snapshots, in between that of the window so far. One copy is enough, and the only state besides it is k.

The router's bias is averaged like a weight.

Decisions: AVERAGE-1, AVERAGE-2, AVERAGE-3.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mythos_dist.checkpoint.manifest import AVERAGE, CheckpointManifest, LocalShards
from mythos_dist.config.fields import show
from mythos_dist.config.schema import AverageConfig
from mythos_dist.units import count

_BLOCK_ELEMENTS = 1 << 24  # maximum size of temporary tensors


def add_averages(shards: LocalShards) -> None:
    """Give each shard an average, all zeros, to save, to load and to update."""
    for shard in shards.values():
        shard.values[AVERAGE] = torch.zeros_like(shard.weights)


class WeightAverage:
    """This rank's part of the average. Every rank has one with the same number of snapshots."""

    def __init__(self, settings: AverageConfig, shards: LocalShards):
        """`shards`: with averages, unless `settings.kind` is off."""
        self.settings = settings
        self.snapshots = 0  # of the window, or since the beginning; 0: there is no average yet
        self._shards = [shard for shard in shards.values() if AVERAGE in shard.values]

    @torch.no_grad()
    def update(self, step: int, last_step: int) -> None:
        """After step `step` of a run that ends after `last_step`: take a snapshot, if it is due."""
        if self.settings.kind == "off" or step % self.settings.every:
            return
        if self.snapshots >= window_snapshots(self.settings, step, last_step):
            self.snapshots = 0
        self.snapshots += 1
        if self.snapshots == 1:
            for shard in self._shards:
                shard.values[AVERAGE].copy_(shard.weights)
            return
        rate = snapshot_rate(self.settings, self.snapshots)
        for weights, average in self._blocks():
            average += (weights - average).mul_(rate)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the average and the weights (fp32 master copies and buffers); twice changes no bit."""
        for weights, average in self._blocks():
            before = weights.clone()
            weights.copy_(average)
            average.copy_(before)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All weights and averages, in views of limited size."""
        for shard in self._shards:
            yield from zip(
                shard.weights.split(_BLOCK_ELEMENTS), shard.values[AVERAGE].split(_BLOCK_ELEMENTS), strict=True
            )


def window_snapshots(settings: AverageConfig, step: int, last_step: int) -> float:
    """The number of snapshots in the window of the one at `step`, until that one; infinite without windows."""
    if settings.kind != "mean" or settings.last is None:
        return float("inf")
    snapshots_left = last_step // settings.every - step // settings.every
    return settings.last - snapshots_left % settings.last


def snapshot_rate(settings: AverageConfig, snapshots: int) -> float:
    """The weight of the newest of `snapshots` snapshots in their average."""
    if settings.kind == "mean":
        return 1 / snapshots
    return (1 - settings.decay) / (1 - settings.decay**snapshots)


def carried_snapshots(settings: AverageConfig, manifest: CheckpointManifest) -> int:
    """The snapshots of a checkpoint's average that a run with these settings continues; 0: its average starts over."""
    same = not list(_changes(settings, manifest))
    return manifest.optimizer.get("average_samples", 0) if same else 0


def describe_resume(settings: AverageConfig, manifest: CheckpointManifest, last_step: int) -> Iterator[str]:
    """A line for the log if a run that resumes from a checkpoint does not continue its average."""
    snapshots = manifest.optimizer.get("average_samples", 0)
    in_checkpoint = f"the checkpoint of step {manifest.step}"
    if settings.kind == "off":
        if snapshots:
            average = f"average of {count(snapshots, 'snapshot')}"
            yield f"average.kind=off: later checkpoints will not have the {average} that {in_checkpoint} has"
    elif not snapshots:
        if manifest.step >= settings.every:
            yield f"the average of the weights begins now: {in_checkpoint} has none"
    elif changes := list(_changes(settings, manifest)):
        changed = ", ".join(f"average.{name}={show(now)} (was {show(before)})" for name, now, before in changes)
        yield f"the average of the weights starts over: {changed}"
    elif snapshots > window_snapshots(settings, manifest.step, last_step):
        yield (
            f"the average of the weights starts over at its next snapshot: the run ends after step {last_step} now, so "
            f"other windows of average.last={settings.last} snapshots end at its last snapshot"
        )


def _changes(settings: AverageConfig, manifest: CheckpointManifest) -> Iterator[tuple[str, object, object]]:
    """(setting, value now, value in the checkpoint) of those that an average depends on and that differ."""
    before = manifest.config.get("average", {})
    names = ("kind", "every", "decay" if settings.kind == "ema" else "last")
    for name in names:
        now = getattr(settings, name)
        if before.get(name) != now:
            yield name, now, before.get(name)
