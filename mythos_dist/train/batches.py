"""What a replica reads: its streams of the splits, the passes of an evaluation, and which samples a step was on."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.config.schema import Config
from mythos_dist.data.corpora import Corpus, with_windows
from mythos_dist.data.stream import MicroBatch, ReplicaStream
from mythos_dist.parallel.collectives import all_gather
from mythos_dist.parallel.mesh import Axis
from mythos_dist.parallel.process import device


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


def open_heldout(config: Config, corpora: list[Corpus], data: Axis) -> ReplicaStream | None:
    """This replica's held-out stream, or None for a run without evaluation; rank 0 says why that is."""
    found = with_windows(corpora, "heldout")
    why = ""
    if not config.train.eval_samples:
        why = "no evaluation: train.eval_samples=0"
    elif not found:
        why = f"no evaluation: no held-out split in {', '.join(str(corpus.folder) for corpus in corpora)}"
    elif without := [str(corpus.folder) for corpus in corpora if corpus not in found]:
        print_once(f"evaluation leaves out {', '.join(without)}: no held-out split there")
    if why:
        print_once(f"{why}; eval.jsonl is not written")
    return None if why else open_stream(config, corpora, "heldout", data)


def print_once(text: str) -> None:
    """From rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


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
    return all_gather(torch.cat([batch.sample_ids for batch in micro_batches]).to(device()), data, 0).tolist()
