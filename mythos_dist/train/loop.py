"""THE loop: check, build, resume, then step after step until the run is done. Reads top to bottom."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import Checkpoint, Manifest, versions
from mythos_dist.checkpoint.progress import bar
from mythos_dist.checkpoint.restore import find_checkpoint, load_state
from mythos_dist.checkpoint.save import Saver, is_due
from mythos_dist.config.compare import differences
from mythos_dist.config.schema import Config
from mythos_dist.data.corpora import Corpus, changes, open_corpora
from mythos_dist.data.manifest import SPLITS
from mythos_dist.data.stream import MicroBatch, ReplicaStream
from mythos_dist.errors import UserError
from mythos_dist.model.attend import choose_kernel
from mythos_dist.model.megablocks import check as check_megablocks
from mythos_dist.parallel.collectives import gather
from mythos_dist.parallel.mesh import Axis, build_mesh
from mythos_dist.parallel.process import DTYPES, check_dtype, device, together
from mythos_dist.plan.cost import train_flops_per_token
from mythos_dist.train.engine import Engine, StepResult
from mythos_dist.train.metrics import Metrics, batch_id, peak_flops
from mythos_dist.train.run_folder import check_run_folder, claim_run_folder, start_logging

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Run to `train.steps`, from the newest whole checkpoint in `run.dir` if there is one. The process group must be
    there.

    Raises UserError, before anything is written, for whatever the user has to mend.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    run_dir = Path(config.run.dir)
    checkpoints = run_dir / "checkpoints"

    corpora = together(lambda: check_inputs(config))
    checkpoint, damaged = find_checkpoint(checkpoints, config.checkpoint.verify)
    if checkpoint:
        together(lambda: check_checkpoint(config, checkpoint, corpora))
    mesh = build_mesh(config.parallel)
    stream, heldout = (open_stream(config, corpora, split, mesh.data) for split in SPLITS)
    writer = together(lambda: claim_run_folder(config, mesh.data.size) if rank == 0 else None)
    start_logging(run_dir, rank)
    for line in damaged:
        log.warning("%s", line)
    completed = run_dir / "COMPLETED"
    done = checkpoint.manifest.step if checkpoint else 0  # steps
    if done >= config.train.steps:
        if rank == 0:
            completed.touch()  # a kill between the last checkpoint and the marker left it out
            print(f"{run_dir} is done: {done} of {config.train.steps} steps; raise train.steps to go on")
        return

    fence = take_fence(run_dir)
    log.info("%s", check_kernels(config))
    if rank == 0:
        completed.unlink(missing_ok=True)  # train.steps was raised
    engine = Engine(config, mesh)
    if checkpoint:
        if rank == 0:
            print(f"resuming from {checkpoint.folder}", flush=True)
        size = sum(4 * value.numel() for held in engine.state.values() for value in held.values.values())
        with bar("loading", size, quiet=rank > 0) as shown:
            together(lambda: load_state(checkpoint, engine.state, shown.update))
        engine.after_load(checkpoint.manifest.optimizer, done)
    saver = Saver(checkpoints, config.checkpoint, fence, engine.state)
    metrics = Metrics(config, run_dir, done) if rank == 0 else None
    peak = peak_flops(config)

    def evaluate(step: int) -> None:
        loss = engine.evaluate(iter(together(lambda: list(heldout_passes(heldout, config, mesh.data)))))
        if metrics:
            metrics.held_out(step, loss)

    if done == 0:
        evaluate(0)
    batches = stream.steps(done)

    def read() -> list[MicroBatch]:
        if rank == 0:
            fence.check()  # a newer start of this run ends this one
        return next(batches)  # one rank's damaged shard ends all

    for step in range(done + 1, config.train.steps + 1):
        begin = time.perf_counter()
        micro_batches = together(read)
        result = engine.train_step(micro_batches, step)
        ids = gather_sample_ids(micro_batches, mesh.data)
        log.info("step %d took %.3f s", step, time.perf_counter() - begin)  # in every rank's log: who is slow?
        if metrics:
            metrics.step(step_line(config, step, result, ids, time.perf_counter() - begin, peak * world))
        last = step == config.train.steps
        if last or (config.train.eval_every and step % config.train.eval_every == 0):
            evaluate(step)
        saver.poll()
        if is_due(step, config):
            saver.save(manifest_of(config, step, world, fence, stream.fingerprint, engine))
    if not saver.finish():
        raise UserError(
            f"the last checkpoint could not be written to {checkpoints}; mend that (a full disk: make room) and give "
            "the same command again; it goes on from the checkpoint before"
        )
    if metrics and writer:
        completed.touch()
        metrics.close()
        print(f"done: {config.train.steps} steps; metrics, logs and checkpoints are in {run_dir}", flush=True)
        writer.close()


def check_inputs(config: Config) -> list[Corpus]:
    """The shards; UserError for what the user has to mend."""
    check_dtype(config.train.dtype)
    check_kernels(config)
    check_run_folder(config)
    return open_corpora(
        config.data.folders,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        tokenizer_path=config.data.tokenizer,
    )


def check_kernels(config: Config) -> str:
    """Which kernels run experts and attention; UserError, with all reasons, if those that are asked for cannot."""
    dtype = DTYPES[config.train.dtype]
    problems, attention = [], ""
    try:
        attention = choose_kernel(config.train.attention, device(), dtype, config.model)
    except UserError as error:
        problems += error.problems
    if config.experts.backend == "megablocks":
        try:
            check_megablocks(dtype)
        except UserError as error:
            problems += error.problems
    compiler = os.environ.get("CXX", "g++")
    if config.train.compile and device().type == "cpu" and not shutil.which(compiler):
        problems.append(f"train.compile=true: there is no C++ compiler {compiler}; install one, or set it to false")
    if problems:
        raise UserError(problems)
    return f"experts: {config.experts.backend}, attention: {attention}"


def check_checkpoint(config: Config, checkpoint: Checkpoint, corpora: list[Corpus]) -> None:
    """UserError if a run with this config and these shards cannot go on from a checkpoint, with all that differs."""
    manifest = checkpoint.manifest
    found = [
        f"{name}={value}, but {checkpoint.folder} was saved with {old}"
        for name, value, old in differences(config, manifest.config)
    ]
    settings = ["these"] if found else []
    if manifest.data and (changed := changes(corpora, manifest.data)):
        found += changed
        settings.append("data.path" if config.data.mix is None else "data.mix")
    if found:
        remedy = f"set {' and '.join(settings)} back to go on with the run in run.dir={config.run.dir}"
        raise UserError([*found, f"{remedy}, or give another run.dir"])


def take_fence(run_dir: Path) -> Fence:
    """This start of the run, the same on every rank."""
    start = torch.tensor(Fence.take(run_dir).start if dist.get_rank() == 0 else 0, device=device())
    dist.broadcast(start, 0)
    return Fence(run_dir, int(start))


def manifest_of(config: Config, step: int, ranks: int, fence: Fence, data: str, engine: Engine) -> Manifest:
    """What a checkpoint behind a step says of itself; which tensors and files it has is found when they are written."""
    return Manifest(
        step=step,
        tokens=step * config.train.global_batch * config.train.seq_len,
        start=fence.start,
        layout={"ranks": ranks, **asdict(config.parallel)},
        config=asdict(config),
        data=data,
        versions=versions(),
        optimizer=engine.optimizer_state(),
        tensors={},
        files={},
    )


def open_stream(config: Config, corpora: list[Corpus], split: str, data: Axis) -> ReplicaStream:
    """This replica's stream of a split, the same on all its ranks. Held-out passes take one micro-batch per replica,
    in order."""
    train = config.train
    training = split == "train"
    return ReplicaStream(
        corpora,
        split,
        seq_len=train.seq_len,
        vocab_size=config.model.vocab_size,
        global_batch=train.global_batch if training else train.micro_batch * data.size,
        micro_batch=train.micro_batch,
        replica=data.rank,
        num_replicas=data.size,
        seed=config.run.seed,
        shuffle=training,
        workers=config.data.workers if training else 0,
        verify=config.data.verify,
        cache=config.data.cache,
    )


def heldout_passes(heldout: ReplicaStream, config: Config, data: Axis) -> Iterator[tuple[MicroBatch, Tensor]]:
    """The first `eval_samples` held-out samples, as micro-batches with a mask (B,) of those that count.

    Every replica gets as many passes; a sample counts once, at any number of replicas.
    """
    samples = min(config.train.eval_samples, heldout.num_samples)
    micro_batch = config.train.micro_batch
    for i in range(-(-samples // (micro_batch * data.size))):
        (batch,) = heldout.step(i)
        positions = (i * data.size + data.rank) * micro_batch + torch.arange(micro_batch)
        yield batch, positions < samples


def gather_sample_ids(micro_batches: list[MicroBatch], data: Axis) -> list[int]:
    """The sample ids that all replicas really trained on in this step."""
    return gather(torch.cat([batch.sample_ids for batch in micro_batches]).to(device()), data, 0).tolist()


def step_line(config: Config, step: int, result: StepResult, ids: list[int], seconds: float, peak: float) -> dict:
    """A line of metrics.jsonl; `peak` is the FLOP/s of all ranks together."""
    tokens = config.train.global_batch * config.train.seq_len
    flops = train_flops_per_token(config.model, config.train.seq_len, result.n_loops) * tokens
    load = result.expert_counts.sum(0).double()
    return {
        "step": step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "n_loops": result.n_loops,
        "backprop": result.backprop,
        "tokens": step * tokens,
        "batch_id": batch_id(ids),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / peak,
        "objective": result.objective,
        "expert_load_max": float(load.max() / load.mean()),
        "experts_idle": int((load == 0).sum()),
        "skipped": result.skipped,
        **({"communication": result.communication} if result.communication is not None else {}),
    }
