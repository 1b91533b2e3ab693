"""The micro-batches of one replica, cut from one endless sequence of samples that no layout changes.

Position p = step * global_batch + offset is dealt to one of the corpora by weight (mix.py), in which it is a position
of an endless order, epoch after epoch (order.py). Replica r takes the r-th of `num_replicas` equal parts of a step's
positions. So each sample of a corpus comes once in each of that corpus's epochs, an epoch may end inside a step,
seeking reads nothing, and a step holds the same samples at any number of replicas, micro-batch size and worker count.
B micro-batch size (windows), S seq_len (tokens).

The trap: what a loader process raises comes out as a traceback of two processes, and torch hands tensors over in
/dev/shm, which containers keep at 64 MB. So errors travel as data, and windows as arrays, as narrow as on disk.
"""

import itertools
import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mythos_dist.data.corpora import Corpus, fingerprint, open_corpora, with_windows
from mythos_dist.data.document_ids import document_ids
from mythos_dist.data.mix import deal, positions_before_repeat
from mythos_dist.data.order import SampleOrder
from mythos_dist.data.windows import WindowReader
from mythos_dist.errors import UserError
from mythos_dist.units import count


class MicroBatch(NamedTuple):
    """B windows of one forward pass; `sample_ids` are indices in the split, the same in every epoch.

    In a mix a corpus's ids come after those of the corpora before it.
    """

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64; of shards with targets (B, T, S), see ShardManifest.targets
    document_ids: Tensor  # (B, S) int32, of each input token, from 0 in each window
    sample_ids: Tensor  # (B,) int64

    @property
    def final_labels(self) -> Tensor:
        """(B, S): what is to be said in the end."""
        return self.labels if self.labels.dim() == 2 else self.labels[:, -1]


class ReplicaStream:
    """The micro-batches of one replica; their order depends only on (seed, the shards, the weights).

    Every rank of a replica builds the same one. With `shuffle=False` each corpus's order is the one on disk.
    """

    def __init__(
        self,
        path: str | Path | Mapping[str, float] | Sequence[Corpus],
        split: str,
        *,
        seq_len: int,
        vocab_size: int,
        global_batch: int,
        micro_batch: int,
        replica: int,
        num_replicas: int,
        seed: int,
        shuffle: bool = True,
        workers: int = 0,
        tokenizer_path: str | Path | None = None,
        verify: bool = True,
        cache: str | Path | None = None,
    ):
        """`path`: a folder, a mix (folder -> weight), or what `open_corpora` made of one.

        `global_batch` and `micro_batch` in sequences; `workers` are processes that read ahead for `steps`; `verify` and
        `cache` as in `WindowReader`. Raises UserError with all problems of the folders and of their fit to the config.

        Of a mix, corpora without windows in a split are left out of it; UserError if none has any.
        """
        assert 0 <= replica < num_replicas and split in ("train", "heldout")
        if isinstance(path, str | Path | Mapping):
            mix = path if isinstance(path, Mapping) else {str(path): 1.0}
            corpora: Sequence[Corpus] = open_corpora(
                mix, seq_len=seq_len, vocab_size=vocab_size, tokenizer_path=tokenizer_path, splits=[split]
            )
        else:
            corpora = path
        if global_batch % (num_replicas * micro_batch):
            raise UserError(
                f"train.global_batch={global_batch} is not divisible by {count(num_replicas, 'replica')} x "
                f"train.micro_batch={micro_batch}; set train.global_batch to a multiple of {num_replicas * micro_batch}"
            )
        self.fingerprint = fingerprint(corpora)
        folders = ", ".join(str(corpus.folder) for corpus in corpora)
        corpora = with_windows(corpora, split)
        if not corpora:
            raise UserError(
                "there is no held-out split; convert more text, or with a larger --heldout, or give other shards",
                folders,
            )
        self._weights = [corpus.weight for corpus in corpora]
        self._orders = [
            SampleOrder([shard.entry["samples"] for shard in corpus.shards[split]], seed if shuffle else None, corpus=i)
            for i, corpus in enumerate(corpora)
        ]
        lengths = [order.num_samples for order in self._orders]
        self._first_ids = np.cumsum([0, *lengths[:-1]])  # of each corpus
        # Of one corpus its samples; of a mix so many that none comes twice in the order on disk.
        self.num_samples = positions_before_repeat(lengths, self._weights)
        self._split, self._vocab_size, self._eos_id = split, vocab_size, corpora[0].manifest.eos_id
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._per_step = global_batch // num_replicas  # samples of this replica in a step
        self._first = replica * self._per_step
        self._workers = workers
        shards = [shard for corpus in corpora for shard in corpus.shards[split]]
        self._seq_len, self._targets = seq_len, corpora[0].manifest.targets
        self._windows = _Reads(WindowReader(shards, corpora[0].manifest.window, verify, cache))

    def step(self, step: int) -> list[MicroBatch]:
        """This replica's micro-batches of optimizer step `step` (from 0), read here and now.

        Returns global_batch / num_replicas / micro_batch of them. Raises UserError on a shard that is damaged and on a
        token outside the vocabulary.
        """
        return [self._micro_batch_of(self._windows.__getitems__(ids)) for ids in self._micro_batches(step)]

    def steps(self, start: int) -> Iterator[list[MicroBatch]]:
        """`step(start)`, `step(start + 1)`, … without end, read ahead by the worker processes.

        Raises what `step` raises, at that step; RuntimeError when a worker is killed.
        """
        loader = DataLoader(
            self._windows,
            # Endless; runs in this process.
            batch_sampler=chain.from_iterable(map(self._micro_batches, itertools.count(start))),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_rank,
            generator=torch.Generator(),  # else it draws from the global generator, and a resumed run drifts
        )
        reads = iter(loader)
        try:
            while True:
                step = list(islice(reads, self._per_step // self._micro_batch))
                yield [self._micro_batch_of(read) for read in step]
        finally:
            del reads  # ends the workers; if an error's traceback kept it for the garbage collector, after 5 s each

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions` of the endless sequence, both int64 (n,)."""
        corpora, own = deal(positions, self._weights)
        ids = np.empty_like(positions)
        for i, order in enumerate(self._orders):
            here = corpora == i
            ids[here] = self._first_ids[i] + order.samples(own[here])
        return ids

    def _micro_batches(self, step: int) -> list[list[int]]:
        """Sample ids of each micro-batch of this replica in `step`."""
        first = step * self._global_batch + self._first
        return self.sample_ids(np.arange(first, first + self._per_step)).reshape(-1, self._micro_batch).tolist()

    def _micro_batch_of(self, read: "_Read") -> MicroBatch:
        """The MicroBatch of what was read, checked: on a GPU a token that the model has no embedding for is an assert
        without a name."""
        if isinstance(read, UserError):
            raise read
        ids, windows = read
        if int(windows.max()) >= self._vocab_size:
            row, column = np.argwhere(windows >= self._vocab_size)[0].tolist()
            raise UserError(
                f"split {self._split}, sample {ids[row]}: "
                f"token {windows[row, column]} is outside model.vocab_size={self._vocab_size}; "
                "the shards are damaged, convert them again"
            )
        S = self._seq_len
        inputs, labels = windows[:, :S], windows[:, 1 : S + 1].astype(np.int64)
        if self._targets:
            labels = windows[:, S + 1 :].astype(np.int64).reshape(-1, self._targets, S)
            labels[labels == self._eos_id] = -100  # PyTorch's own for a label that does not count
        return MicroBatch(
            torch.from_numpy(inputs.astype(np.int64)),
            torch.from_numpy(labels),
            torch.from_numpy(document_ids(inputs, self._eos_id)),
            torch.tensor(ids, dtype=torch.int64),
        )


_Read = tuple[list[int], np.ndarray] | UserError  # sample ids and their windows (B, S + 1)


class _Reads(Dataset):
    """Micro-batches of windows by their sample ids, for DataLoader: it hands a batch's ids to `__getitems__`."""

    def __init__(self, windows: WindowReader):
        self._windows = windows

    def __getitem__(self, sample_id: int) -> _Read:
        return self.__getitems__([sample_id])

    def __getitems__(self, sample_ids: list[int]) -> _Read:
        try:
            return sample_ids, self._windows.read(sample_ids)
        except UserError as error:
            return error


def _as_it_is(read: Any) -> Any:
    """DataLoader's own collate function would make tensors of the arrays, and send them through /dev/shm."""
    return read


def _leave_signals_to_the_rank(worker: int) -> None:
    """In a new worker process. A terminal and launchers signal all processes of a job, and a rank that is asked to stop
    finishes its step first, for which it may need its workers. They end with it (torch watches the parent)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
