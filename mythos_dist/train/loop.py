"""THE loop: check, build, resume, then step after step until the run is done. Reads top to bottom."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mythos_dist.checkpoint.fence import Fence, newest_start
from mythos_dist.checkpoint.manifest import CheckpointManifest, library_versions
from mythos_dist.checkpoint.progress import bar
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import find_checkpoint, load_state
from mythos_dist.checkpoint.save import Saver, clean_complete_run, is_due
from mythos_dist.config.schema import Config
from mythos_dist.data.stream import MicroBatch, ReplicaStream
from mythos_dist.errors import EXIT_STOPPED, UserError
from mythos_dist.files import user_errors
from mythos_dist.ops.cluster.inject import FaultInjector
from mythos_dist.ops.memory_check import Comparison, check_memory
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.ops.preflight import preflight
from mythos_dist.parallel.mesh import Mesh, build_mesh
from mythos_dist.parallel.process import raise_on_all_ranks
from mythos_dist.train.batches import gather_sample_ids, heldout_passes, open_heldout, open_stream
from mythos_dist.train.checks import check_inputs, check_kernels
from mythos_dist.train.depth import depth_line, failures
from mythos_dist.train.engine import Engine, StepResult
from mythos_dist.train.metrics import Metrics, peak_flops, step_line
from mythos_dist.train.restarts import Previous, cost, note_restart
from mythos_dist.train.resume import Resume, schedule_changes, take_fence
from mythos_dist.train.run_folder import claim_run_folder, mark_completed, start_logging, write_settings
from mythos_dist.train.session import Session
from mythos_dist.train.spikes import Spikes
from mythos_dist.train.stop import forget
from mythos_dist.units import count

log = logging.getLogger(__name__)


def train(config: Config, session: Session, only_preflight: bool = False) -> int:
    """Run to `train.steps`, from the newest whole checkpoint in `run.dir` if there is one; the process group must be
    there. Returns the exit code: 0, or EXIT_STOPPED if something asked the run to stop before.

    Raises UserError, before anything is written, for whatever the user has to mend.
    """
    rank, run_dir = dist.get_rank(), Path(config.run.dir)
    session.watchdog.enter_phase("checking")
    corpora = raise_on_all_ranks(lambda: check_inputs(config), session.nodes)
    ranks_here = session.nodes.count(session.rank_info.node)
    estimate = raise_on_all_ranks(lambda: check_memory(config, dist.get_world_size(), ranks_here), session.nodes)
    resume = Resume(config, corpora)
    session.timed("checking")
    if config.faults.preflight or only_preflight:
        session.watchdog.enter_phase("preflight")
        found = preflight(config, session.rank_info, FaultInjector.for_rank(config.faults.inject, rank, start=0))
        if rank == 0 and (only_preflight or len(set(session.nodes)) > 1):
            print(found, flush=True)
        session.timed("preflight")
    if only_preflight:
        return 0

    mesh = build_mesh(config.parallel)
    stream = open_stream(config, corpora, "train", mesh.data)
    heldout = open_heldout(config, corpora, mesh.data)
    session.timed("opening the shards")
    writer = raise_on_all_ranks(lambda: claim_run_folder(config) if rank == 0 else None)
    resume.under_lock()
    if resume.step >= config.train.steps:
        # A kill between the last checkpoint and the marker left work to do.
        raise_on_all_ranks(lambda: finish_earlier_start(config, resume.checkpoint) if rank == 0 else None)
        if rank == 0:
            print(
                f"{run_dir} is done: {resume.step} of {count(config.train.steps, 'step')}; raise train.steps to go on"
            )
        return 0
    previous = Previous.find(run_dir, resume.step) if rank == 0 else Previous()
    fence = take_fence(run_dir)
    session.stop.after_the_next_step(run_dir)
    raise_on_all_ranks(lambda: start_logging(run_dir, session.rank_info, fence.start))
    raise_on_all_ranks(lambda: write_settings(config, mesh.data.size, fence) if rank == 0 else None)
    for line in resume.damaged:
        log.warning("%s", line)
    log.info("%s", check_kernels(config))
    run = Run(config, session, mesh, stream, heldout, fence, resume.step, estimate)
    try:
        run.begin(resume.checkpoint, previous)
        why = run.steps()
        run.end(why)
    except UserError as error:
        run.note("failed", str(error))
        raise
    if writer:
        writer.close()
    return EXIT_STOPPED if why else 0


def finish_earlier_start(config: Config, newest: Checkpoint | None) -> None:
    """On rank 0 of a complete run: what an earlier start did not do because it was killed after its last checkpoint."""
    run_dir = Path(config.run.dir)
    if newest:
        clean_complete_run(newest, config.checkpoint, newest_start(run_dir).get("start", 0))
    mark_completed(None, run_dir)


class Run:
    """One start of a run: what `train` has built, and what it does with it. Every rank has one."""

    def __init__(
        self,
        config: Config,
        session: Session,
        mesh: Mesh,
        stream: ReplicaStream,
        heldout: ReplicaStream | None,
        fence: Fence,
        step: int,
        estimate: Estimate,
    ):
        """`step`: the last one that is behind us."""
        self.config, self.session, self.mesh, self.fence, self.step = config, session, mesh, fence, step
        self.stream, self.heldout = stream, heldout
        self.rank, self.run_dir = dist.get_rank(), Path(config.run.dir)
        self.watchdog = session.watchdog
        self.watchdog.on_failure = session.stop.on_leave = lambda why: self.note("failed", why)
        self.watchdog.keepalive = fence.heartbeat
        self.faults = FaultInjector.for_rank(config.faults.inject, self.rank, fence.start)
        self.comparison = Comparison(estimate)
        self.warned: set[str] = set()  # failures of loops that the console knows of
        self.watchdog.enter_phase("building the engine")
        self.engine = Engine(config, mesh)
        session.timed("engine")

    def begin(self, checkpoint: Checkpoint | None, previous: Previous) -> None:
        """Load, open what is written to, and measure the held-out loss of a run that is new.

        previous: on rank 0, the start before.
        """
        config = self.config
        norms = checkpoint.manifest.optimizer.get("recent_grad_norms", ()) if checkpoint else ()
        self.spikes = Spikes.load(config.faults, self.run_dir, norms)
        if checkpoint:
            if self.rank == 0:
                print(f"resuming from {checkpoint.folder}", flush=True)
                for line in schedule_changes(config, checkpoint):
                    log.warning("%s", line)
            self.load(checkpoint)
        elif previous.last_step:
            print(f"no checkpoint was saved before: {previous.last_step} steps are computed again", flush=True)
        self.session.timed("loading")
        self.saver = Saver(
            self.run_dir / "checkpoints", config.checkpoint, self.fence, self.engine.state, self.watchdog.heartbeat
        )
        if checkpoint:
            self.saver.newest = self.saver.published = self.step
        self.published = self.saver.published
        self.metrics = raise_on_all_ranks(self.open_metrics)
        self.peak = peak_flops(config)
        if self.step == 0:
            self.evaluate()
        self.session.timed("opening the run")
        if previous.about:
            line = note_restart(previous, self.fence, self.step, self.session.phases)
            print(f"start {self.fence.start} goes on behind step {self.step}{cost(line)}: {line['why']}", flush=True)

    def open_metrics(self) -> Metrics | None:
        """On rank 0. Raises UserError if the files cannot be written, or a newer start runs."""
        with user_errors(self.run_dir):
            return Metrics(self.config, self.run_dir, self.step, self.fence) if self.rank == 0 else None

    def steps(self) -> str:
        """Step after step until the run is done. Returns why it stops early; empty: it does not."""
        config, stop = self.config, self.session.stop
        batches = self.batches()
        while self.step < config.train.steps:
            if why := stop.agreed(self.run_dir, config.run.max_seconds):
                return why
            step = self.step + 1
            self.watchdog.enter_phase(f"step {step}")
            self.faults.before_step(step)
            begin = time.perf_counter()
            batch, micro_batches = raise_on_all_ranks(functools.partial(self.read, batches))
            result, decision = self.train_step(micro_batches, step, batch)
            ids = gather_sample_ids(micro_batches, self.mesh.data)
            self.step = step
            seconds = time.perf_counter() - begin
            log.info("step %d took %.3f s%s", step, seconds, f"; {decision}" if decision else "")
            self.session.started()
            last = step == config.train.steps
            compared = self.comparison.step(seconds, last)
            depth = self.look(micro_batches[0], step, result)
            if self.metrics:
                line = depth | step_line(config, step, result, ids, seconds, self.peak * dist.get_world_size())
                decision = "; ".join(filter(None, (self.spikes.decision(step), decision)))
                line |= {"decision": decision} if decision else {}
                self.metrics.step(line | ({"planned": compared.line} if compared else {}))
                if compared:
                    log.info("%s", compared)
                    print(compared, flush=True)
            if len(self.spikes.skipped) >= config.faults.roll_back_after:
                self.roll_back()
                batches = self.batches()
                continue
            if last or (config.train.eval_every and step % config.train.eval_every == 0):
                self.evaluate()
            self.watchdog.enter_phase(f"saving behind step {step}")
            self.saver.poll()
            self.note_published()
            # Not in the middle of trouble: it would push out the checkpoint to go back to.
            if is_due(step, config) and (last or not self.spikes.skipped):
                self.save()
        return ""

    def end(self, why: str) -> None:
        """All is on disk, and COMPLETED says so; or, with a reason `why`, the run can be started again."""
        self.watchdog.enter_phase("the last checkpoint")
        stopped = f"stopped behind step {self.step}: {why}"
        if why and self.saver.newest != self.step:
            self.save()
        if not self.saver.finish():
            raise UserError(
                f"the last checkpoint could not be written to {self.run_dir / 'checkpoints'}; mend that (a full disk: "
                "make room) and give the same command again; it goes on from the checkpoint before"
            )
        raise_on_all_ranks(lambda: self.close(why, stopped) if self.rank == 0 else None)
        if self.metrics:
            self.metrics.close()
            told = f"{stopped}; the same command goes on" if why else f"done: {count(self.step, 'step')}"
            print(f"{told}; metrics, logs and checkpoints are in {self.run_dir}", flush=True)

    def close(self, why: str, stopped: str) -> None:
        """On rank 0: all lines are in their files, and then the markers. Raises UserError."""
        assert self.metrics
        with user_errors(self.run_dir):
            self.metrics.flush()
            self.note_published()
            self.fence.record_state("stopped" if why else "completed", stopped if why else "", self.step)
            forget(self.run_dir)
        if not why:
            mark_completed(self.fence, self.run_dir)

    def read(self, batches: Iterator[tuple[int, list[MicroBatch]]]) -> tuple[int, list[MicroBatch]]:
        """The next batch's number and micro-batches. Raises UserError on one rank: a damaged shard ends all."""
        if self.rank == 0:
            self.fence.check()  # a newer start of this run ends this one
        return next(batches)

    def batches(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Behind `step`: number and micro-batches of each batch that is not passed over."""
        wanted = self.spikes.batches(self.step + 1)
        first = number = next(wanted)
        for i, batch in enumerate(self.stream.steps(first), first):
            if i == number:
                yield i, batch
                number = next(wanted)

    def train_step(self, micro_batches: list[MicroBatch], step: int, batch: int) -> tuple[StepResult, str]:
        """One optimizer step, or two tries at it; and what was decided, if anything was."""

        def run() -> StepResult:
            with self.faults.during_step(step, batch, self.engine.model):
                return self.engine.train_step(micro_batches, step, self.spikes.limit)

        result = run()
        if not result.skipped:
            self.spikes.trained(result.grad_norm)
            return result, ""
        if math.isfinite(result.loss) and self.config.train.dtype == "fp16" and not math.isfinite(result.grad_norm):
            return result, "skipped: gradients overflowed, and the loss scale is halved"
        bad = "gradients are not finite"
        if math.isfinite(result.grad_norm):
            bad = f"grad_norm {result.grad_norm:.3g} is above {self.spikes.limit:.3g}"
        elif self.config.faults.retry:
            result = run()
            if not result.skipped:
                self.spikes.trained(result.grad_norm)
                return result, f"computed again: {bad} at first"
        self.spikes.skipped.append(batch)
        return result, f"skipped: {bad}"

    def roll_back(self) -> None:
        """Back to the newest checkpoint, and past the batches that were skipped."""
        self.watchdog.enter_phase("rolling back")
        self.saver.finish()
        checkpoint, _ = find_checkpoint(
            self.run_dir / "checkpoints", self.config.checkpoint.verify, self.config.checkpoint.key_file
        )
        to = checkpoint.manifest.step if checkpoint else None
        rollback = self.spikes.roll_back(self.step, to, self.run_dir / "metrics.jsonl")
        raise_on_all_ranks(lambda: self.spikes.write(self.fence) if self.rank == 0 else None)
        assert checkpoint, "there would be no decision to go back"
        log.warning("%s", rollback)
        self.load(checkpoint)
        self.step = checkpoint.manifest.step
        self.spikes.norms.clear()
        self.spikes.norms.extend(checkpoint.manifest.optimizer.get("recent_grad_norms", ()))
        raise_on_all_ranks(self.rewind_metrics)

    def rewind_metrics(self) -> None:
        """On rank 0. Raises UserError as `open_metrics`."""
        with user_errors(self.run_dir):
            if self.metrics:
                self.metrics.rewind(self.step)

    def load(self, checkpoint: Checkpoint) -> None:
        """Fill the engine."""
        self.watchdog.enter_phase("loading")
        size = sum(4 * value.numel() for held in self.engine.state.values() for value in held.values.values())
        with bar("loading", size, quiet=self.rank > 0) as shown:

            def progress(size: int) -> None:
                self.watchdog.heartbeat()
                shown.update(size)

            raise_on_all_ranks(lambda: load_state(checkpoint, self.engine.state, progress))
        self.engine.after_load(checkpoint.manifest.optimizer, checkpoint.manifest.step)

    def save(self) -> None:
        """Begin to save the state behind `step`."""
        manifest = manifest_of(
            self.config, self.step, dist.get_world_size(), self.fence, self.stream.fingerprint, self.engine
        )
        manifest.optimizer["recent_grad_norms"] = list(self.spikes.norms)
        if self.metrics:
            self.metrics.to_disk()
        self.saver.save(manifest)

    def look(self, batch: MicroBatch, step: int, result: StepResult) -> dict[str, Any]:
        """Every few steps: what happens inside the loops, for metrics.jsonl; warns of what goes wrong there."""
        every = self.config.loops.telemetry_every
        if not every or step % every:
            return {}
        self.watchdog.enter_phase(f"looking into the loops behind step {step}")
        begin = time.perf_counter()
        found = self.engine.look(batch)
        seconds = time.perf_counter() - begin
        wrong = failures(found, result.expert_counts) if step > self.config.optim.warmup_steps else {}
        for name, text in wrong.items():
            log.log(logging.INFO if name in self.warned else logging.WARNING, "step %d: %s: %s", step, name, text)
            self.warned.add(name)
        line = {"seconds": seconds} | depth_line(found, result.expert_counts)
        return {"depth": line | ({"failures": list(wrong)} if wrong else {})}

    def evaluate(self) -> None:
        """Measure and write down the held-out loss, and the curve of it over loops, if there is a held-out split."""
        if self.heldout is None:
            return
        heldout = self.heldout
        self.watchdog.enter_phase("evaluating")
        passes = raise_on_all_ranks(lambda: list(heldout_passes(heldout, self.config, self.mesh.data)))
        found = self.engine.evaluate(passes)
        curve = {}
        for n_loops in self.config.loops.sweep:
            self.watchdog.heartbeat()
            curve[n_loops] = self.engine.evaluate(passes, n_loops)
        if self.metrics:
            self.metrics.held_out(self.step, found, curve)

    def note(self, state: str, why: str) -> None:
        """On rank 0: write down how this start is doing; if that cannot be, the run's end does not wait for it."""
        if self.rank == 0:
            with contextlib.suppress(OSError, UserError):
                self.fence.record_state(state, why, self.step)

    def note_published(self) -> None:
        """On rank 0: write down that there is a checkpoint. A start that finds none must know that there was one."""
        if self.rank == 0 and self.saver.published != self.published:
            self.published = self.saver.published
            with contextlib.suppress(OSError, UserError):
                self.fence.record_state("running", "", self.step, self.published)


def manifest_of(config: Config, step: int, ranks: int, fence: Fence, data: str, engine: Engine) -> CheckpointManifest:
    """What a checkpoint behind a step says of itself; which tensors and files it has is found when they are written."""
    return CheckpointManifest(
        step=step,
        tokens=step * config.train.global_batch * config.train.seq_len,
        start=fence.start,
        layout={"ranks": ranks, **asdict(config.parallel)},
        config=asdict(config),
        data=data,
        versions=library_versions(),
        optimizer=engine.optimizer_state(),
        tensors={},
        files={},
    )
