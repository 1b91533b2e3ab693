"""Held-out loss and accuracy of a checkpoint over the number of loops, on one process."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mythos_dist.checkpoint.restore import load_model
from mythos_dist.config.schema import MAX_LOOPS, Config
from mythos_dist.data.remote import read_manifest
from mythos_dist.data.stream import MicroBatch, ReplicaStream
from mythos_dist.errors import UserError
from mythos_dist.files import write_atomically
from mythos_dist.model.mythos import IGNORED, Mythos
from mythos_dist.parallel.process import device
from mythos_dist.train.evaluation import Curve, HeldOut, overthinks_from
from mythos_dist.urls import AnyPath

# Called after each batch with the loops that are done, over all batches and numbers of loops, and with their total:
# a pass takes about as long as it has loops.
SweepProgress = Callable[[int, int], object]


@dataclass(frozen=True)
class Sweep:
    """Evaluation of a checkpoint with several numbers of loops."""

    step: int
    data: str
    trained: int  # mean number of loops in training
    curve: Curve
    by_position: dict[int, list[float]]  # accuracy at each position of the sequence, by the number of loops

    def to_json(self) -> dict[str, Any]:
        """The values under the names of `mythos depth-sweep --json`."""
        return {
            "step": self.step,
            "data": self.data,
            "trained_loops": self.trained,
            "best_loops": min(self.curve, key=lambda n: self.curve[n].loss),
            "overthinking_from": overthinks_from(self.curve),
            "loops": {
                str(n): {**result._asdict(), "accuracy_by_position": self.by_position[n]}
                for n, result in self.curve.items()
            },
        }


def parse_loops(text: str) -> tuple[list[int], list[str]]:
    """Parse numbers of loops such as `1,2,4`. Returns them and a list of problems; one of the two is empty."""
    items = [item.strip() for item in text.split(",")]
    wrong = [item for item in items if not (item.isdecimal() and 1 <= int(item[:9]) <= MAX_LOOPS)]
    if wrong:
        return [], [f"--loops={text} holds {wrong}; give numbers from 1 to {MAX_LOOPS}, such as 1,2,4,8"]
    return [int(item) for item in items], []


def sweep(
    checkpoint: str | AnyPath,
    loops: Sequence[int],
    *,
    data: Path | None = None,
    samples: int = 256,
    batch: int = 16,
    progress: SweepProgress = lambda done, total: None,
) -> Sweep:
    """Evaluate a checkpoint, or a run's newest one, with each of `loops` on the first `samples` held-out sequences.

    data: folder of shards; default: the folders of the run. progress: see `SweepProgress`. Raises UserError for a
    checkpoint, shards or loops that cannot be used.

    >>> from mythos_dist import sweep
    >>> result = sweep("runs/first", [1, 2, 4], samples=2)
    >>> sorted(result.curve), result.curve[4].loss > 0  # loss in nats, accuracy in 0 to 1
    ([1, 2, 4], True)
    """
    if wrong := [n for n in loops if n < 1]:
        raise UserError(f"loops={list(loops)} holds {wrong}; loops are counted from 1")
    return sweep_model(*load_model(checkpoint), loops, data=data, samples=samples, batch=batch, progress=progress)


def sweep_model(
    model: Mythos,
    config: Config,
    step: int,
    loops: Sequence[int],
    *,
    data: Path | None,
    samples: int,
    batch: int,
    progress: SweepProgress,
) -> Sweep:
    """As `sweep`, of a model that `load_model` returned."""
    model.to(device())
    stream, folder = open_sequences(config, data, batch)
    samples = min(samples, stream.num_samples)
    batches = [MicroBatch(*(field.to(device()) for field in one)) for one in read_sequences(stream, samples, batch)]
    curve, by_position, done = {}, {}, 0
    total = sum(set(loops)) * len(batches)
    for n in sorted(set(loops)):
        before, done = done, done + n * len(batches)
        curve[n], by_position[n] = measure(
            model, config, batches, n, lambda count, n=n, before=before: progress(before + n * count, total)
        )
    return Sweep(step, folder, config.loops.mean_of(config.model), curve, by_position)


def open_sequences(config: Config, data: Path | None, batch: int) -> tuple[ReplicaStream, str]:
    """The held-out sequences of a run, or the windows of the folder of shards `data`, in batches; the folders' names.

    Raises UserError for shards that cannot be used.
    """
    folders = {str(data): 1.0} if data else config.data.folders
    if "" in folders:
        raise UserError("an export does not name its shards; give a folder of shards with --data")
    # Of a run's own shards sequences of the length that it trains on; of others their windows.
    seq_len = read_manifest(str(data)).seq_len if data else config.train.seq_len
    if seq_len > config.model.max_seq_len:
        raise UserError(
            f"windows of seq_len={seq_len} are longer than the context of this model, "
            f"model.max_seq_len={config.model.max_seq_len}; give shards of shorter windows",
            next(iter(folders)),
        )
    stream = ReplicaStream(
        folders,
        "heldout",
        seq_len=seq_len,
        vocab_size=config.model.vocab_size,
        global_batch=batch,
        micro_batch=batch,
        replica=0,
        num_replicas=1,
        seed=0,
        shuffle=False,
        cache=config.data.cache,
    )
    return stream, ", ".join(folders)


def read_sequences(stream: ReplicaStream, samples: int, batch: int) -> Iterator[MicroBatch]:
    """The first `samples` sequences of a stream that `open_sequences` opened for this size of batches."""
    for i in range(-(-samples // batch)):
        (micro_batch,) = stream.step(i)
        remaining = samples - i * batch
        yield MicroBatch(*(field[:remaining] for field in micro_batch))


@torch.no_grad()
def measure(
    model: Mythos, config: Config, batches: Sequence[MicroBatch], n_loops: int, progress: Callable[[int], object]
) -> tuple[HeldOut, list[float]]:
    """Loss and accuracy with `n_loops` loops, and the accuracy at each position (0 if all labels there are ignored).

    progress: called with the number of batches that are done.
    """
    loss, tokens = 0.0, 0
    correct = counted = torch.zeros(batches[0].input_ids.shape[1], dtype=torch.int64, device=device())
    for i, batch in enumerate(batches, 1):
        labels = batch.final_labels
        documents = batch.document_ids if config.data.document_mask else None
        losses = model(batch.input_ids, n_loops, labels=labels, document_ids=documents)
        loss += float(losses["cross_entropy"]) * int(losses["tokens"])
        tokens += int(losses["tokens"])
        correct = correct + losses["correct"].sum(0)
        counted = counted + (labels != IGNORED).sum(0)
        progress(i)
    return HeldOut(loss / tokens, float(correct.sum()) / tokens), (correct / counted.clamp(min=1)).tolist()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(file, json.dumps(content, indent=2) + "\n")
