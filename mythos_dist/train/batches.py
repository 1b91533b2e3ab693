"""What a replica reads: training batches, and the held-out samples of an evaluation."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.config.schema import Config
from mythos_dist.data.corpora import Corpus, with_windows
from mythos_dist.data.shard_cache import ShardCache
from mythos_dist.data.stream import MicroBatch, ReplicaStream
from mythos_dist.parallel.collectives import all_gather
from mythos_dist.parallel.mesh import Axis
from mythos_dist.parallel.process import device
from mythos_dist.train.global_batch import GlobalBatch


def open_stream(
    config: Config, corpora: list[Corpus], split: str, data: Axis, cache: ShardCache | None
) -> ReplicaStream:
    """This replica's stream of a split, the same on all its ranks. `cache`: for shards of stores.

    The held-out split is read in order, one micro-batch per replica and pass.
    """
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
        cache=cache or config.data.cache,
    )


def open_heldout(
    config: Config, corpora: list[Corpus], data: Axis, cache: ShardCache | None = None
) -> ReplicaStream | None:
    """This replica's held-out stream, or None for a run without evaluation; rank 0 prints why."""
    evaluated = with_windows(corpora, "heldout")
    missing = ", ".join(corpus.name for corpus in corpora if corpus not in evaluated)
    if not config.train.eval_samples:
        _print_on_rank_0("no evaluation: train.eval_samples=0; eval.jsonl is not written")
        return None
    if not evaluated:
        _print_on_rank_0(
            f"no evaluation: no held-out split in {missing}{_too_short(corpora)}; eval.jsonl is not written"
        )
        return None
    if missing:
        _print_on_rank_0(f"not evaluated, without a held-out split: {missing}{_too_short(corpora)}")
    return open_stream(config, corpora, "heldout", data, cache)


def _too_short(corpora: list[Corpus]) -> str:
    """A note if a held-out split has text, but less than one sequence of it."""
    short = any(corpus.manifest.splits["heldout"].windows and not corpus.shards.get("heldout") for corpus in corpora)
    return " of at least one sequence of train.seq_len tokens" if short else ""


def _print_on_rank_0(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


@dataclass(frozen=True)
class StepBatch:
    """This replica's part of a global batch."""

    of_all: GlobalBatch
    micro_batches: list[MicroBatch]


def read_batches(stream: ReplicaStream, batches: Iterator[GlobalBatch]) -> Iterator[StepBatch]:
    """This replica's part of each batch."""
    requested: deque[GlobalBatch] = deque()  # the stream may iterate in another thread

    def positions() -> Iterator[np.ndarray]:
        for batch in batches:
            requested.append(batch)
            yield batch.positions

    for micro_batches in stream.read(positions()):
        yield StepBatch(requested.popleft(), micro_batches)


def heldout_passes(heldout: ReplicaStream, config: Config, data: Axis) -> Iterator[tuple[MicroBatch, Tensor]]:
    """The first `eval_samples` held-out samples: micro-batches, each with a mask (B,) of the samples to evaluate.

    All replicas get the same number of passes; the masks select each sample once, at any number of replicas.
    """
    samples = min(config.train.eval_samples, heldout.num_samples)
    micro_batch = config.train.micro_batch
    for i in range(-(-samples // (micro_batch * data.size))):
        (batch,) = heldout.step(i)
        positions = (i * data.size + data.rank) * micro_batch + torch.arange(micro_batch)
        yield batch, positions < samples


def gather_sample_ids(micro_batches: list[MicroBatch], data: Axis) -> list[int]:
    """The sample ids that all replicas have trained on in this step."""
    return all_gather(torch.cat([batch.sample_ids for batch in micro_batches]).to(device()), data, 0).tolist()
