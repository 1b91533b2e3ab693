"""The checkpoint that a run resumes from, or the parent that it begins with, and what changes in its schedule.

It is searched before anything is written, and again under the folder's lock and after this start has taken over: in
between, ranks of an earlier start that have outlived their launcher may publish a newer checkpoint, remove the selected
one, or finish the run.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import Lineage
from mythos_dist.checkpoint.names import MANIFEST_FILE
from mythos_dist.checkpoint.reader import Checkpoint, checkpoints_of
from mythos_dist.checkpoint.remote import read_writer
from mythos_dist.checkpoint.restore import find_checkpoint
from mythos_dist.config.fields import show
from mythos_dist.config.load import config_from
from mythos_dist.config.schema import Config
from mythos_dist.data.corpora import Corpus
from mythos_dist.errors import UserError
from mythos_dist.parallel.process import any_rank, device, on_rank_0, raise_on_all_ranks
from mythos_dist.train.checks import check_checkpoint
from mythos_dist.train.run_folder import check_run_folder, refuse_to_start_over, take_over
from mythos_dist.train.schedule import learning_rate, mean_at
from mythos_dist.train.start_from import check_parent, find_parent, lineage_from, lineage_of_stage, steps_done
from mythos_dist.urls import RemotePath

_NO_JUMP = (
    "this rise undoes a decay: begin a stage with a warm-up of its own instead (another run.dir, "
    "start_from=this run), and for runs whose length may change set optim.schedule=wsd, which can branch before its "
    "decay"
)


class Search(NamedTuple):
    """The newest intact checkpoint of a run, the same on every rank."""

    listing: list[tuple[Any, ...]] | None  # on rank 0, before the search
    checkpoint: Checkpoint | None
    damaged: list[str]  # a line per damaged file in newer checkpoints


class Resume:
    """The checkpoint to resume from, or without one the parent; the same on every rank, and every rank calls the same
    methods."""

    def __init__(self, config: Config, corpora: list[Corpus], search: Search | None = None):
        """search: an earlier result for this run; None: search now, which reads all bytes of the checkpoint.

        Raises UserError if this config and these shards cannot resume from it, or if the run had one and lost it."""
        self._config, self._corpora = config, corpora
        self._folder = Path(config.run.dir) / "checkpoints"
        self._find(search or find_newest(config))

    def refresh(self) -> None:
        """Search again if the folder has changed. Raises UserError."""
        on_rank_0(lambda: check_run_folder(self._config))
        if any_rank(on_rank_0(lambda: _listing(self._folder)) != self._seen):
            self._find(find_newest(self._config))

    @property
    def step(self) -> int:
        """The last step that is done."""
        return self.checkpoint.manifest.step if self.checkpoint else 0

    @property
    def begins_stage(self) -> bool:
        """Whether the checkpoint is the end of the stage before this one."""
        return bool(self._config.run.stage_begin) and self.step == self._config.run.stage_begin

    @property
    def last_step(self) -> int:
        """The run's last step: `train.steps` counts the steps that were carried over."""
        return self._config.train.steps - self.lineage.first_step

    def _find(self, search: Search) -> None:
        self._seen, self.checkpoint, self.damaged = search
        self.parent: Checkpoint | None = None
        if not self.checkpoint and self._config.run.start_from:
            self.parent, self.damaged = find_parent(self._config)
        raise_on_all_ranks(self._check)
        self.lineage = Lineage()
        if self.checkpoint and self.begins_stage:
            self.lineage = lineage_of_stage(self._config, self.checkpoint, self._corpora)
        elif self.checkpoint:
            self.lineage = self.checkpoint.manifest.lineage
        elif self.parent:
            self.lineage = lineage_from(self._config, self.parent, self._corpora)

    def _check(self) -> None:
        run = self._config.run
        if self.step < run.stage_begin:
            raise UserError(f"stage {run.stage} begins after step {run.stage_begin}; {run.dir} is at step {self.step}")
        if self.checkpoint and self.begins_stage:
            check_parent(self._config, self.checkpoint)
            return
        if self.checkpoint:
            check_checkpoint(self._config, self.checkpoint, self._corpora)
            return
        if dist.get_rank() == 0:
            refuse_to_start_over(self._folder.parent)
        if self.parent:
            check_parent(self._config, self.parent)


def find_newest(config: Config) -> Search:
    """In run.dir, or if that has none in `checkpoint.remote`. Every rank calls this. Raises UserError as
    `find_checkpoint` does."""
    folder = Path(config.run.dir) / "checkpoints"
    listing = on_rank_0(lambda: _listing(folder))
    search = Search(listing, *find_checkpoint(folder, config.checkpoint))
    if search.checkpoint is None and (url := config.checkpoint.remote):
        on_rank_0(lambda: read_writer(url))  # its answer names what is wrong, which that of a HEAD does not
        in_store = find_checkpoint(RemotePath(url) / "checkpoints", config.checkpoint)
        search = Search(listing, *in_store)
    return search


def _listing(checkpoints: Path) -> list[tuple[Any, ...]]:
    """A value that changes when a checkpoint is published, replaced or removed. Raises UserError."""
    listing = []
    for folder in checkpoints_of(checkpoints):
        try:
            about = (folder / MANIFEST_FILE).stat()
            listing.append((folder.name, about.st_ino, about.st_mtime_ns))
        except OSError:
            listing.append((folder.name,))
    return listing


def find_stage(stages: list[Config], newest: Search) -> int:
    """The index of the stage in which the run is."""
    step = newest.checkpoint.manifest.step if newest.checkpoint else 0
    return max(i for i, stage in enumerate(stages) if stage.run.stage_begin <= step)


def take_fence(run_dir: Path) -> Fence:
    """Make this the newest start of the run; the fence of the same start on every rank. Raises UserError."""
    fence = on_rank_0(lambda: take_over(run_dir))
    start = torch.tensor(fence.start if fence else 0, device=device())
    dist.broadcast(start, 0)
    return fence or Fence(run_dir, int(start))


def schedule_changes(config: Config, checkpoint: Checkpoint) -> Iterator[str]:
    """Changes of the schedule after `checkpoint`, compared with the settings that it was saved with.

    Of the settings that may change between two starts only `train.steps` has an effect: on the learning rate.
    Checkpoints of versions without `optim.schedule` had a cosine.
    """
    done = steps_done(checkpoint.manifest)
    try:
        before = config_from(checkpoint.manifest.config)
    except UserError:  # settings of another version
        return
    settings = {"train.steps": (config.train.steps, before.train.steps)}
    for key in ("schedule", "decay_steps", "decay"):
        settings[f"optim.{key}"] = (getattr(config.optim, key), getattr(before.optim, key))
    changed = ", ".join(
        f"{name}={show(now)}, and the checkpoint of step {done} was saved with {show(was)}"
        for name, (now, was) in settings.items()
        if now != was
    )

    def rate(config: Config, step: int) -> float:
        return learning_rate(config.optim, step, config.train.steps)

    schedules: dict[str, tuple[Callable[[Config, int], float], str]] = {
        "the learning rate": (rate, ".2e"),
        "the mean number of loops": (mean_at, "g"),
    }
    # Nothing differs during the warm-up; the first step after it shows the change.
    for step in sorted({done + 1, max(done, config.optim.warmup_steps) + 1}):
        for name, (value, form) in schedules.items():
            was, now = value(before, step), value(config, step)
            if abs(now - was) > 1e-6 * abs(was):
                last = value(before, done) if done else 0.0
                rises_again = value is rate and done > before.optim.warmup_steps and now > 1.001 * last
                yield (
                    f"{changed}: {name} of step {step} is {now:{form}} instead of {was:{form}}"
                    + (f" ({last:{form}} in step {done})" if done else "")
                    + (f"; {_NO_JUMP}" if rises_again else "")
                )
                return
