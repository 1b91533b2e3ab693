"""The start of a run, until its engine is built: check all inputs, then claim the run folder and write to it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from mythos_dist.checkpoint.fence import Fence, newest_start
from mythos_dist.checkpoint.manifest import CheckpointManifest
from mythos_dist.checkpoint.save import prune_complete_run
from mythos_dist.config.schema import Config
from mythos_dist.data.corpora import Corpus
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.process import from_rank_0, on_rank_0, raise_on_all_ranks
from mythos_dist.train.batches import open_heldout, open_stream
from mythos_dist.train.checks import check_inputs, check_kernels
from mythos_dist.train.feed import Feed, open_shard_cache
from mythos_dist.train.hooks import Hooks
from mythos_dist.train.remote_run import join_remote
from mythos_dist.train.restarts import PreviousStart
from mythos_dist.train.resume import Resume, Search, take_fence
from mythos_dist.train.run_folder import (
    claim_run_folder,
    mark_completed,
    remove_leftovers,
    start_logging,
    write_settings,
)
from mythos_dist.train.session import Session
from mythos_dist.train.uploads import RunUploads
from mythos_dist.units import count

log = logging.getLogger(__name__)


@dataclass
class RunInputs:
    """What a run reads: shards, and the checkpoint that it resumes from or begins with."""

    corpora: list[Corpus]
    resume: Resume


def check_run(config: Config, session: Session, corpora: list[Corpus], newest: Search | None = None) -> RunInputs:
    """Check the checkpoint to resume from, after `check_stage`. Writes nothing. Raises UserError, the same on every
    rank.

    newest: see `Resume`.
    """
    session.enter_phase("checking")
    resume = Resume(config, corpora, newest)
    session.record_startup("checking")
    return RunInputs(corpora, resume)


def check_stage(config: Config, session: Session, hooks: Hooks) -> list[Corpus]:
    """Check settings, shards and run folder, also of a stage that begins later. Writes nothing. Raises UserError, the
    same on every rank."""
    corpora = raise_on_all_ranks(lambda: check_inputs(config), session.nodes)
    raise_on_all_ranks(hooks.check_config, session.nodes)
    return corpora


@dataclass
class Prepared:
    """A run whose folder this start has claimed."""

    mesh: Mesh
    inputs: RunInputs
    feed: Feed
    stream: ReplicaStream
    heldout: ReplicaStream | None
    previous: PreviousStart  # on rank 0
    fence: Fence
    folder_lock: TextIO | None  # on rank 0: keeps the folder claimed while it is open
    remote_run_id: str  # the run's id in `checkpoint.remote`; "" without


def prepare(config: Config, session: Session, inputs: RunInputs, is_last_stage: bool) -> Prepared | None:
    """Claim the run folder, open the shards, start logging. Returns None if the run, or this stage, is complete.

    Raises UserError, the same on every rank.
    """
    rank, run_dir, resume = dist.get_rank(), Path(config.run.dir), inputs.resume
    mesh = session.mesh(config.parallel)
    folder_lock = on_rank_0(lambda: claim_run_folder(config))
    resume.refresh()
    if resume.step >= resume.last_step:
        if not is_last_stage:
            return None
        assert resume.checkpoint, "it has reached train.steps"
        if from_folder := not resume.checkpoint.is_remote:  # else nothing of the run is in this folder
            is_waiting = _upload_rest(config, session)
            newest = resume.checkpoint.manifest
            on_rank_0(lambda: _complete_earlier_start(config, newest, is_waiting))
        if rank == 0:
            steps, where = count(resume.last_step, "step"), run_dir if from_folder else resume.checkpoint.folder.parent
            print(f"{where} is complete: {resume.step} of {steps}; raise train.steps to train further")
        return None
    cache = raise_on_all_ranks(lambda: open_shard_cache(config, inputs.corpora))
    stream = open_stream(config, inputs.corpora, "train", mesh.data, cache)
    heldout = open_heldout(config, inputs.corpora, mesh.data, cache)
    feed = Feed(config, session, mesh, inputs.corpora, stream, cache)
    session.record_startup("opening the shards")
    from_store = resume.checkpoint and resume.checkpoint.is_remote
    remote_run_id = from_rank_0(lambda: join_remote(config, resumes_from_store=bool(from_store)))
    previous = PreviousStart.read(run_dir, resume.step) if rank == 0 else PreviousStart()
    fence = take_fence(run_dir)
    resume.refresh()  # until now, a suspended rank 0 of an earlier start may have published a checkpoint
    session.stop.stop_after_step(run_dir)
    raise_on_all_ranks(lambda: start_logging(run_dir, session.rank_info, fence.start))
    on_rank_0(lambda: write_settings(config, mesh, fence))
    for line in resume.damaged:
        log.warning("%s", line)
    log.info("%s", check_kernels(config))
    return Prepared(mesh, inputs, feed, stream, heldout, previous, fence, folder_lock, remote_run_id)


def _complete_earlier_start(config: Config, newest: CheckpointManifest, is_waiting: Callable[[int], bool]) -> None:
    """Do what an earlier start did not, if it was killed between its last checkpoint and the marker COMPLETED."""
    run_dir = Path(config.run.dir)
    remove_leftovers(run_dir, newest_start(run_dir).get("start", 0))
    prune_complete_run(run_dir / "checkpoints", newest, config.checkpoint, is_waiting)
    mark_completed(None, config)


def _upload_rest(config: Config, session: Session) -> Callable[[int], bool]:
    """Upload what the start that completed the run could not. Returns whether a step still waits. Every rank calls
    this."""
    if not config.checkpoint.remote:
        return lambda step: False
    run_dir = Path(config.run.dir)
    run_id, about = from_rank_0(lambda: (join_remote(config, resumes_from_store=False), newest_start(run_dir)))
    fence = Fence(run_dir, about.get("start", 0), about.get("token", ""))
    uploads = RunUploads(config, session, fence, run_id)
    uploads.finish(stopped=False)
    return uploads.is_waiting
