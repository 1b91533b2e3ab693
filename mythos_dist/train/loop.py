"""The training loop: batch, step, log, evaluate, save, until the run is done."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.save import is_due
from mythos_dist.config.schema import Config
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.errors import EXIT_STOPPED, UserError
from mythos_dist.files import user_errors
from mythos_dist.parallel.process import held_memory, measured_on_all_ranks, on_rank_0, raise_on_all_ranks
from mythos_dist.progress import Bar
from mythos_dist.train.average import describe_resume
from mythos_dist.train.batches import StepBatch, gather_sample_ids, heldout_passes
from mythos_dist.train.evaluation import Evaluation
from mythos_dist.train.global_batch import GlobalBatch, batches_from
from mythos_dist.train.hooks import Hooks
from mythos_dist.train.loop_probe import find_failures, probe_entries, probe_loops
from mythos_dist.train.metrics import Metrics, StepResult, peak_flops, step_line
from mythos_dist.train.prepare import Prepared, RunInputs, prepare
from mythos_dist.train.restarts import describe_restart, record_restart
from mythos_dist.train.resume import find_newest, schedule_changes
from mythos_dist.train.run_checkpoints import RunCheckpoints, load_checkpoint, load_parent, manifest_of
from mythos_dist.train.run_folder import mark_completed
from mythos_dist.train.session import Session
from mythos_dist.train.spikes import SpikeGuard
from mythos_dist.train.start_from import describe_start
from mythos_dist.train.stop import remove_stop_file
from mythos_dist.units import count, is_multiple

log = logging.getLogger(__name__)


def train(config: Config, session: Session, inputs: RunInputs, hooks: Hooks, is_last_stage: bool = True) -> int:
    """Train until `train.steps`, from the newest complete checkpoint in `run.dir` if there is one.

    is_last_stage: the run is complete then. Returns the exit code: 0, or EXIT_STOPPED if the run was stopped early.
    Raises UserError, the same on every rank.
    """
    prepared = prepare(config, session, inputs, is_last_stage)
    if prepared is None:
        return 0
    run = Run(config, session, prepared, hooks, is_last_stage)
    try:
        run.begin()
        reason = run.run_steps()
        run.finish(reason)
    except UserError as error:
        run.record_status("failed", str(error))
        raise
    if prepared.folder_lock:
        prepared.folder_lock.close()
    return EXIT_STOPPED if reason else 0


class Run:
    """One start of a run, or of one of its stages. Every rank calls the same methods in the same order."""

    def __init__(self, config: Config, session: Session, prepared: Prepared, hooks: Hooks, is_last_stage: bool):
        self.config, self.session, self.hooks = config, session, hooks
        self.is_last_stage = is_last_stage
        self.mesh, self.fence = prepared.mesh, prepared.fence
        self.feed, self.stream, self.heldout = prepared.feed, prepared.stream, prepared.heldout
        self.resume, self.corpora = prepared.inputs.resume, prepared.inputs.corpora
        self.previous, self.lineage, self.remote_run_id = prepared.previous, self.resume.lineage, prepared.remote_run_id
        self.step, self.last_step = self.resume.step, self.resume.last_step  # the step that is done; the run's last one
        self.rank, self.run_dir = dist.get_rank(), Path(config.run.dir)
        self.data_wait = 0.0  # seconds that the slowest rank waited for the batch of the step
        self.memory = 0.0  # bytes that the rank with most memory held before the step
        self.data_entry = self.describe_data()  # of the next line in metrics.jsonl
        self.warned: set[str] = set()  # failures of loops that the console has shown
        # begin() sets:
        self.checkpoints: RunCheckpoints
        self.metrics: Metrics | None  # on rank 0
        self.peak_flops: float  # per second, of all ranks together
        session.on_failure = session.stop.on_exit = lambda reason: self.record_status("failed", reason)
        session.keepalive = self.fence.heartbeat
        hooks.begin_run(self.fence.start)
        self.spikes = SpikeGuard.load(config.faults, self.run_dir)
        self.feed.begin(self.next_batches, self.step + 1, self.last_step)  # downloads begin while the engine is built
        session.enter_phase("building the engine")
        from mythos_dist.train.engine import Engine  # see there why it is imported after the process group exists

        self.engine = Engine(config, self.mesh)
        session.record_startup("engine")

    def begin(self) -> None:
        """Load the checkpoint or the parent, open the files of the run, and evaluate a new run."""
        checkpoint, previous = self.resume.checkpoint, self.previous
        parent = checkpoint if self.resume.begins_stage else self.resume.parent
        if parent:
            if self.rank == 0:
                print(*describe_start(self.config, parent, self.lineage, self.corpora), sep="\n", flush=True)
            self.load(parent, as_parent=True)
        elif checkpoint:
            if self.rank == 0:
                print(f"resuming from {checkpoint.folder}", flush=True)
                average_changes = describe_resume(self.config.average, checkpoint.manifest, self.last_step)
                for line in (*schedule_changes(self.config, checkpoint), *average_changes):
                    log.warning("%s", line)
            self.load(checkpoint, as_parent=False)
        if self.rank == 0 and not checkpoint and previous.last_step:
            print(f"no checkpoint was saved yet: {previous.last_step} steps are repeated", flush=True)
        self.session.record_startup("loading")
        loaded = self.step if checkpoint else None
        self.checkpoints = RunCheckpoints(
            self.config, self.session, self.fence, self.engine, self.remote_run_id, loaded
        )
        self.metrics = on_rank_0(self.open_metrics)
        self.peak_flops = peak_flops(self.config) * dist.get_world_size()
        if self.step == 0:
            self.evaluate()
        self.session.record_startup("opening the run")
        if self.rank == 0 and previous.record:
            line = record_restart(previous, self.fence, self.step, self.session.startup_seconds)
            print(describe_restart(line), flush=True)

    def run_steps(self) -> str:
        """Train step by step until the run is done. Returns why it stops early; empty: it does not."""
        config = self.config
        while self.step < self.last_step:
            request = self.session.stop.agree(self.run_dir, config.run.max_seconds)
            if request.stop:
                return request.stop
            step = self.step + 1
            self.session.enter_phase(f"step {step}")
            self.hooks.before_step(step, request.profile)
            began = time.perf_counter()
            batch = self.read_batch()
            result, decision = self.attempt_step(batch, step)
            sample_ids = gather_sample_ids(batch.micro_batches, self.mesh.data)
            self.step = step
            self.engine.average.update(step, self.last_step)
            self.log_step(batch, result, decision, sample_ids, time.perf_counter() - began)
            if len(self.spikes.skipped) >= config.faults.roll_back_after:
                self.roll_back()
                continue
            is_last = step == self.last_step
            self.evaluate()
            self.session.enter_phase(f"saving after step {step}")
            self.checkpoints.poll(step)
            # Not while steps are skipped: it would replace the checkpoint that a rollback needs.
            if is_due(step, self.last_step, config.checkpoint) and (is_last or not self.spikes.skipped):
                self.save()
        return ""

    def next_batches(self) -> Iterator[GlobalBatch]:
        """The batches of the steps after `step`, without samples that a rollback has excluded."""
        return batches_from(self.config, self.lineage, self.spikes.rollbacks, self.step + 1)

    def read_batch(self) -> StepBatch:
        """Raises UserError on all ranks if one cannot read its shards, or if a newer start of this run exists."""

        def read() -> StepBatch:
            if self.rank == 0:
                self.fence.check()
            return self.feed.read()

        batch, self.data_wait, self.memory = measured_on_all_ranks(read, value=held_memory())
        return batch

    def attempt_step(self, batch: StepBatch, step: int) -> tuple[StepResult, str]:
        """One optimizer step, computed again (`faults.retry`) if gradients are not finite, except fp16 overflows.

        Returns also the decision, "" if none.
        """

        def compute() -> StepResult:
            with self.hooks.during_step(step, batch.of_all.index, self.engine):
                schedule_step = self.lineage.first_step + step
                return self.engine.train_step(batch.micro_batches, schedule_step, self.spikes.limit)

        result = compute()
        if not result.skipped:
            self.spikes.record_norm(result.grad_norm)
            return result, ""
        norm_is_finite = math.isfinite(result.grad_norm)
        if math.isfinite(result.loss) and self.config.train.dtype == "fp16" and not norm_is_finite:
            return result, "skipped: gradients overflowed, and the loss scale is halved"
        problem = "gradients are not finite"
        if norm_is_finite:
            problem = f"grad_norm {result.grad_norm:.3g} is above the limit {self.spikes.limit:.3g}"
        elif self.config.faults.retry:
            result = compute()
            if not result.skipped:
                self.spikes.record_norm(result.grad_norm)
                return result, "recomputed: gradients were not finite"
        self.spikes.skipped.append(batch.of_all)
        return result, f"skipped: {problem}"

    def log_step(self, batch: StepBatch, result: StepResult, decision: str, ids: list[int], seconds: float) -> None:
        """Write the step's line to the log, to metrics.jsonl and to the console."""
        step = self.step
        log.info("step %d took %.3f s%s", step, seconds, f"; {decision}" if decision else "")
        self.session.record_first_step()
        entries, message = self.hooks.after_step(seconds, is_last=step == self.last_step)
        entries |= self.probe(batch, result) | self.checkpoints.uploads.take_entries()
        if self.metrics:
            decisions = [text for text in (self.spikes.rollback_before(step), decision) if text]
            if decisions:
                entries["decision"] = "; ".join(decisions)
            line = step_line(self.config, self.lineage, step, result, ids, seconds, self.peak_flops)
            measured = {"data_wait_seconds": self.data_wait, "memory_gb": self.memory / 1e9}
            read = {"by_corpus": self.stream.corpus_counts(batch.of_all.positions)} | self.data_entry
            self.data_entry = {}
            self.metrics.write_step(line | measured | read | entries)
            if message:
                log.info("%s", message)
                print(message, flush=True)

    def describe_data(self) -> dict[str, Any]:
        """What `by_corpus` counts: the entry `data` of a start's first line in metrics.jsonl."""
        return {"data": {"seq_len": self.config.train.seq_len, "corpora": self.stream.corpora}}

    def probe(self, batch: StepBatch, result: StepResult) -> dict[str, Any]:
        """Every `loops.telemetry_every` steps, measure each loop and warn of known failures; for metrics.jsonl."""
        step = self.step
        if not is_multiple(step, self.config.loops.telemetry_every):
            return {}
        self.session.enter_phase(f"probing the loops after step {step}")
        began = time.perf_counter()
        measured = probe_loops(self.engine, batch.micro_batches[0])
        entries = {"seconds": time.perf_counter() - began} | probe_entries(measured, result.expert_counts)
        failures = find_failures(measured, result.expert_counts) if result.phase != "warmup" else {}
        for name, text in failures.items():
            log.log(logging.INFO if name in self.warned else logging.WARNING, "step %d: %s: %s", step, name, text)
            self.warned.add(name)
        if failures:
            entries["failures"] = list(failures)
        if self.metrics:
            self.metrics.write_expert_load(step, result.expert_counts)
        return {"depth": entries}

    def evaluate(self) -> None:
        """Measure what is due: the held-out loss, before the first step, every `eval_every` and after the last; and
        `train.tasks`, every `tasks_every` and after the last."""
        train, is_last = self.config.train, self.step == self.last_step
        evaluation = Evaluation()
        if self.heldout and (self.step == 0 or is_last or is_multiple(self.step, train.eval_every)):
            self.session.enter_phase("evaluating")
            evaluation = self.evaluate_heldout(self.heldout)
        if train.tasks and (is_last or (self.step > 0 and is_multiple(self.step, train.tasks_every))):
            self.session.enter_phase("evaluating tasks")
            tasks = self.hooks.evaluate_tasks(self.engine, self.session.heartbeat)
            evaluation = evaluation._replace(tasks=tasks)
        if self.metrics:
            self.metrics.write_evaluation(self.step, evaluation)

    def evaluate_heldout(self, heldout: ReplicaStream) -> Evaluation:
        """Measure the held-out loss, also over `loops.sweep` and of the averaged weights if set."""
        passes = raise_on_all_ranks(lambda: list(heldout_passes(heldout, self.config, self.mesh.data)))
        sweep = self.config.loops.sweep
        with_average = self.config.average.evaluate and self.engine.average.snapshots > 0
        by_loops, of_average = {}, None
        total = 1 + len(sweep) + with_average
        with Bar("evaluating", total, unit=" evaluations", quiet=self.rank > 0) as shown:
            result = self.engine.evaluate(passes)
            shown.update(1)
            for n_loops in sweep:
                self.session.heartbeat()
                by_loops[n_loops] = self.engine.evaluate(passes, n_loops)
                shown.update(1)
            if with_average:
                self.session.heartbeat()
                of_average = self.engine.evaluate_average(passes)
        return Evaluation(result, by_loops, of_average, self.engine.average.snapshots)

    def save(self) -> None:
        """Begin to save the state after `step`."""
        lineage = replace(self.lineage, next_sample=int(next(self.next_batches()).positions[0]))
        manifest = manifest_of(self.config, self.step, self.fence, self.stream.fingerprint, self.engine, lineage)
        manifest.optimizer["recent_grad_norms"] = list(self.spikes.norms)
        if self.metrics:
            self.metrics.fsync()
        self.checkpoints.saver.save(manifest)

    def load(self, checkpoint: Checkpoint, as_parent: bool) -> None:
        """Fill the engine with a checkpoint; `as_parent`: with what this run, or stage, begins with."""
        fill = load_parent if as_parent else load_checkpoint
        self.spikes.norms.extend(fill(self.config, self.session, self.engine, checkpoint))

    def roll_back(self) -> None:
        """Return to the newest checkpoint, and exclude the batches of the skipped steps."""
        self.session.enter_phase("rolling back")
        self.checkpoints.saver.finish()
        checkpoint = find_newest(self.config).checkpoint
        to = checkpoint.manifest.step if checkpoint else None
        rollback = self.spikes.roll_back(self.step, to, self.config.run.stage, self.run_dir / "metrics.jsonl")
        on_rank_0(lambda: self.spikes.write(self.fence))
        assert checkpoint, "spikes.roll_back raises without one"
        log.warning("%s", rollback)
        self.step, begin = checkpoint.manifest.step, self.config.run.stage_begin
        if self.step < begin:
            raise UserError(f"rolled back to step {self.step}, in an earlier stage: run the same command again")
        self.spikes.norms.clear()
        self.load(checkpoint, as_parent=bool(begin) and self.step == begin)
        self.data_entry = self.describe_data()  # this start's first line may be among those that are removed
        on_rank_0(self.rewind_metrics)
        self.feed.begin(self.next_batches, self.step + 1, self.last_step)

    def open_metrics(self) -> Metrics:
        """On rank 0. Raises UserError if the files cannot be written, or if a newer start of this run exists."""
        with user_errors(self.run_dir):
            return Metrics(self.config, self.run_dir, self.step, self.fence, self.last_step)

    def rewind_metrics(self) -> None:
        """On rank 0. Raises UserError as `open_metrics`."""
        assert self.metrics
        with user_errors(self.run_dir):
            self.metrics.rewind(self.step)

    def finish(self, reason: str) -> None:
        """Wait for the last checkpoint and mark the run as completed, or with a `reason` as stopped."""
        self.feed.close()
        if (message := self.hooks.end_steps()) and self.rank == 0:
            print(message, flush=True)
        self.session.enter_phase("the last checkpoint")
        stopped = f"stopped after step {self.step}: {reason}"
        if reason and self.checkpoints.saver.newest != self.step:
            self.save()
        self.checkpoints.finish(self.step)
        stage = f"stage {self.config.run.stage} is done"
        on_rank_0(lambda: self.write_final_status(stopped if reason else "" if self.is_last_stage else stage))
        if self.metrics:
            self.metrics.close()
        if reason or self.is_last_stage:
            self.checkpoints.finish_uploads(stopped=bool(reason))
        else:
            self.checkpoints.uploads.close()  # the next stage continues
        if self.metrics:
            result = f"{stopped}; run the same command to resume" if reason else f"done: {count(self.step, 'step')}"
            if not (reason or self.is_last_stage):
                result = f"{stage}: {count(self.step, 'step')}"
            print(f"{result}; metrics, logs and checkpoints are in {self.run_dir}", flush=True)
        if not reason and self.is_last_stage:
            self.hooks.end_run()
        self.engine.close()

    def write_final_status(self, stopped: str) -> None:
        """On rank 0: all metrics, then the final status, then COMPLETED unless `stopped` says why. Raises UserError."""
        assert self.metrics
        with user_errors(self.run_dir):
            self.metrics.flush()
            self.fence.record_status("stopped" if stopped else "completed", stopped, self.step)
            if self.is_last_stage or self.step < self.last_step:  # else the next stage stops
                remove_stop_file(self.run_dir)
        if not stopped:
            mark_completed(self.fence, self.config)

    def record_status(self, status: str, reason: str) -> None:
        """On rank 0: write the status of this start to writer.json; an error does not prevent the run's end."""
        if self.rank == 0:
            with contextlib.suppress(OSError, UserError):
                self.fence.record_status(status, reason, self.step)
