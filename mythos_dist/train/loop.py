"""THE loop: check, build, resume, then step after step until the run is done. Reads top to bottom."""

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.restore import layout_problems, load_checkpoint, read_meta
from mythos_dist.checkpoint.save import save_checkpoint
from mythos_dist.config.schema import Config
from mythos_dist.data.corpora import Corpus, changes, open_corpora
from mythos_dist.data.manifest import SPLITS
from mythos_dist.data.stream import MicroBatch, ReplicaStream
from mythos_dist.errors import UserError
from mythos_dist.parallel.collectives import gather
from mythos_dist.parallel.mesh import Axis, build_mesh
from mythos_dist.parallel.process import device
from mythos_dist.plan.cost import train_flops_per_token
from mythos_dist.train.engine import Engine, StepResult
from mythos_dist.train.metrics import Metrics, batch_id, peak_flops
from mythos_dist.train.run_folder import check_run_folder, claim_run_folder, start_logging

log = logging.getLogger(__name__)
T = TypeVar("T")


def train(config: Config) -> None:
    """Run to `train.steps`, from the newest checkpoint in `run.dir` if there is one. The process group must be there.

    Raises UserError, before anything is written, for whatever the user has to mend.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    run_dir = Path(config.run.dir)
    layout = {"ranks": world, **{f"parallel.{key}": value for key, value in vars(config.parallel).items()}}

    meta, corpora = together(lambda: check_inputs(config, layout))
    mesh = build_mesh(config.parallel)
    stream, heldout = (open_stream(config, corpora, split, mesh.data) for split in SPLITS)
    writer = together(lambda: claim_run_folder(config, mesh.data.size) if rank == 0 else None)
    start_logging(run_dir, rank)
    completed = run_dir / "COMPLETED"
    if meta and meta["step"] >= config.train.steps:
        if rank == 0:
            completed.touch()  # a kill between the last checkpoint and the marker left it out
            print(f"{run_dir} is done: {meta['step']} of {config.train.steps} steps; raise train.steps to go on")
        return

    if rank == 0:
        completed.unlink(missing_ok=True)  # train.steps was raised
    engine = Engine(config, mesh)
    done = 0  # steps
    if meta:
        load_checkpoint(engine.deepspeed, meta)
        done = meta["step"]
        if rank == 0:
            print(f"resuming from {meta['path']}", flush=True)
    metrics = Metrics(config, run_dir, done) if rank == 0 else None
    peak = peak_flops(config)

    def evaluate(step: int) -> None:
        loss = engine.evaluate(iter(together(lambda: list(heldout_passes(heldout, config, mesh.data)))))
        if metrics:
            metrics.held_out(step, loss)

    def save(step: int) -> None:
        notes = {"layout": layout, "data": stream.fingerprint, "versions": versions()}
        save_checkpoint(engine.deepspeed, run_dir / "checkpoints", step, notes, config.checkpoint.keep)

    if done == 0:
        evaluate(0)
    batches = stream.steps(done)
    for step in range(done + 1, config.train.steps + 1):
        begin = time.perf_counter()
        micro_batches = together(lambda: next(batches))  # one rank's damaged shard ends all of them
        result = engine.train_step(micro_batches, step)
        ids = gather_sample_ids(micro_batches, mesh.data)
        log.info("step %d took %.3f s", step, time.perf_counter() - begin)  # in every rank's log: who is slow?
        if metrics:
            metrics.step(step_line(config, step, result, ids, time.perf_counter() - begin, peak * world))
        last = step == config.train.steps
        if last or (config.train.eval_every and step % config.train.eval_every == 0):
            evaluate(step)
        if last or step % config.checkpoint.every == 0:
            save(step)
    if metrics and writer:
        completed.touch()
        metrics.close()
        print(f"done: {config.train.steps} steps; metrics, logs and checkpoints are in {run_dir}", flush=True)
        writer.close()


def together(check: Callable[[], T]) -> T:
    """`check()` on every rank; a UserError on any of them becomes one on all, so that all leave with its exit code.

    While there is none this costs an all-reduce of one number, so every step can afford it.
    """
    result, problem = None, None
    try:
        result = check()
    except UserError as error:
        problem = str(error)
    failed = torch.tensor(int(problem is not None), device=device())
    dist.all_reduce(failed)
    if failed:
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        rank, text = next((rank, text) for rank, text in enumerate(problems) if text)
        raise UserError(text if rank == 0 else f"rank {rank}: {text}")
    return cast(T, result)


def check_inputs(config: Config, layout: dict) -> tuple[dict | None, list[Corpus]]:
    """The notes of the checkpoint to resume from, or None, and the shards; UserError for what the user has to mend."""
    run_dir = Path(config.run.dir)
    check_run_folder(config)
    meta = read_meta(run_dir / "checkpoints")
    if meta and (found := layout_problems(meta, layout)):
        raise UserError(found)
    corpora = open_corpora(
        config.data.folders,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        tokenizer_path=config.data.tokenizer,
    )
    if meta and (found := changes(corpora, meta["data"])):
        setting = "data.path" if config.data.mix is None else "data.mix"
        remedy = f"set {setting} back to go on with the run in run.dir={run_dir}, or give another run.dir"
        raise UserError([*found, remedy])
    return meta, corpora


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


def versions() -> dict[str, str]:
    """The libraries that a checkpoint depends on."""
    return {
        name: importlib.metadata.version(name) for name in ("mythos_dist", "torch", "deepspeed", "mosaicml-streaming")
    }
