"""One replica's micro-batches, from an endless sequence of samples that does not depend on the layout.

A step's samples are positions in it. Each position belongs to one of the corpora by weight (mix.py), as a position
in that corpus's own order, epoch after epoch (order.py). Replica r takes the r-th of `num_replicas` equal parts of a
step's positions. So each sample of a corpus occurs once per epoch of that corpus, an epoch may end within a step,
seeking reads nothing, and a step has the same samples at any number of replicas, micro-batch size and worker count.
A sample is one sequence of `train.seq_len` tokens (sequences.py). B micro-batch size (sequences), S seq_len (tokens).

The trap: an exception in a loader process becomes a traceback of two processes, and torch sends tensors through
/dev/shm, which has 64 MB in many containers. So loader processes return errors as values, and windows as NumPy arrays
in the dtype of the shards.

Decisions: DATA-1, DATA-4, DATA-5.
"""

import atexit
import functools
import itertools
import multiprocessing
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mythos_dist.data.corpora import Corpus, fingerprint, mix_of, open_corpora, with_windows
from mythos_dist.data.order import SampleOrder
from mythos_dist.data.read_ahead import one_ahead
from mythos_dist.data.sequences import SequenceReader
from mythos_dist.data.shard import Shard
from mythos_dist.data.shard_cache import ShardCache
from mythos_dist.errors import UserError, end_with, redact
from mythos_dist.units import count


class MicroBatch(NamedTuple):
    """The B sequences of one forward pass; `sample_ids` are indices in the split, the same in every epoch.

    In a mix, the ids of a corpus follow those of the previous corpora.
    """

    input_ids: Tensor  # (B, S) int64
    # (B, S) int64; with stored targets (B, T, S), see ShardManifest.targets; (B, 1, S) if some are not in the loss
    labels: Tensor
    document_ids: Tensor  # (B, S) int32, the document of each input token, from 0 in each sequence
    sample_ids: Tensor  # (B,) int64

    @property
    def final_labels(self) -> Tensor:
        """(B, S): the labels of the last loop."""
        return self.labels if self.labels.dim() == 2 else self.labels[:, -1]


class ReplicaStream:
    """The micro-batches of one replica; their order depends only on (seed, shards, weights).

    All ranks of a replica build the same stream. With `shuffle=False` each corpus is read in the order on disk.
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
        cache: ShardCache | str | Path | None = None,
    ):
        """`path`: a folder or URL, a mix (folder or URL -> weight), or the corpora that `open_corpora` returned.

        `global_batch` (of `step`) and `micro_batch` in sequences; `workers`: processes that read ahead; `verify` and
        `cache` as in `WindowReader`. Corpora without windows in the split are left out of the mix. Raises UserError
        with all problems of the folders and conflicts with the config, or if no corpus has windows.
        """
        assert 0 <= replica < num_replicas and split in ("train", "heldout")
        corpora = _open_corpora(path, split, seq_len, vocab_size, tokenizer_path, cache)
        _check_batch_sizes(global_batch, micro_batch, num_replicas)
        self.fingerprint = fingerprint(corpora)
        corpora = _corpora_to_read(corpora, split)
        self._mix = mix_of(corpora, split)
        self._sequences = SequenceReader(corpora, split, seq_len, verify, cache)
        self._orders = [
            SampleOrder(sizes, seed if shuffle else None, corpus=i)
            for i, sizes in enumerate(self._sequences.shard_sizes)
        ]
        lengths = [order.num_samples for order in self._orders]
        # Each corpus in the order of `corpus_counts`: its name, what identifies its shards, and its sequences.
        self.corpora = [
            {"name": redact(corpus.name), "fingerprint": corpus.manifest.fingerprint[:16], "sequences": length}
            for corpus, length in zip(corpora, lengths, strict=True)
        ]
        self._first_ids = np.cumsum([0, *lengths[:-1]])  # of each corpus
        # Of one corpus, its samples; of a mix, the samples before one repeats.
        self.num_samples = self._mix.positions_before_repeat(lengths)
        self._split, self._vocab_size = split, vocab_size
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._replica, self._num_replicas = replica, num_replicas
        self._workers = workers
        self.eos_id = corpora[0].manifest.eos_id
        self._dataset = _SequenceDataset(self._sequences)

    def step(self, step: int) -> list[MicroBatch]:
        """This replica's micro-batches of batch `step` (from 0: optimizer step 1 takes batch 0), read in this process.

        There are global_batch / num_replicas / micro_batch. Raises UserError for a damaged shard and for a token
        outside the vocabulary.
        """
        batch = self._positions(step)
        return [self._micro_batch_of(self._dataset.__getitems__(ids)) for ids in self._micro_batches(batch)]

    def steps(self, start: int) -> Iterator[list[MicroBatch]]:
        """`step(start)`, `step(start + 1)`, … without end, as `read` reads them. For tests and benchmarks: training
        gives `read` the batches that are left after rollbacks."""
        return self.read(self._positions(step) for step in itertools.count(start))

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[list[MicroBatch]]:
        """This replica's micro-batches of each global batch, given as positions in the endless sequence, int64 (n,).

        With worker processes, `batches` is iterated over before its micro-batches are requested, in another thread.
        Raises as `step` does, when that batch is reached; RuntimeError when a worker is killed.
        """
        return one_ahead(self._read(batches)) if self._workers else self._read(batches)

    def _read(self, batches: Iterable[np.ndarray]) -> Generator[list[MicroBatch], None, None]:
        batches, ahead = itertools.tee(batches)
        loader = DataLoader(
            self._dataset,
            batch_sampler=(ids for batch in ahead for ids in self._micro_batches(batch)),  # it runs in this process
            num_workers=self._workers,
            collate_fn=_no_collate,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # by default it draws from the global one, and a resumed run diverges
        )
        reads = iter(loader)
        running, processes = weakref.ref(reads), list(getattr(reads, "_workers", ()))
        stop = functools.partial(_stop_workers, running, processes)
        atexit.register(stop)
        try:
            for batch in batches:
                size = len(batch) // self._num_replicas // self._micro_batch
                step = list(islice(reads, size))  # no comprehension over `reads`: a traceback would keep its frame
                yield [self._micro_batch_of(read) for read in step]
        finally:
            del reads  # stops the workers; if a traceback kept it until garbage collection, that would take 5 s each
            if running() is None:  # the error of a killed worker keeps it, perhaps until the interpreter exits
                atexit.unregister(stop)
                _kill(processes)

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """The sample ids at `positions` of the endless sequence, both int64 (n,)."""
        corpora, own = self._mix.corpus_positions(positions)
        ids = np.empty_like(positions)
        for i, order in enumerate(self._orders):
            here = corpora == i
            ids[here] = self._first_ids[i] + order.samples(own[here])
        return ids

    def corpus_counts(self, positions: np.ndarray) -> list[int]:
        """How many of `positions` (int64 (n,)) belong to each corpus."""
        return np.bincount(self._mix.corpus_positions(positions)[0], minlength=len(self._orders)).tolist()

    def shards_of(self, batch: np.ndarray, replicas: Sequence[int]) -> list[Shard]:
        """The shards that these replicas read of a global batch, given as positions, in the order of first use."""
        parts = batch.reshape(self._num_replicas, -1)[list(replicas)]
        # A step of all replicas at once: their first samples, their second ones, and so on.
        indices = self._sequences.shards_of(self.sample_ids(parts.T.ravel()))
        _, first = np.unique(indices, return_index=True)
        return [self._sequences.shards[i] for i in indices[np.sort(first)].tolist()]

    def _positions(self, step: int) -> np.ndarray:
        return np.arange(step * self._global_batch, (step + 1) * self._global_batch)

    def _micro_batches(self, batch: np.ndarray) -> list[list[int]]:
        """Sample ids of each micro-batch of this replica in a global batch."""
        size = len(batch) // self._num_replicas
        own = batch[self._replica * size : (self._replica + 1) * size]
        return self.sample_ids(own).reshape(-1, self._micro_batch).tolist()

    def _micro_batch_of(self, read: "_Read") -> MicroBatch:
        """Convert sequences to a MicroBatch. Tokens are checked, because on a GPU an index outside the embedding fails
        with an assertion that does not say where."""
        if isinstance(read, UserError):
            raise read
        ids, values = read
        if int(values.max()) >= self._vocab_size:
            row, column = np.argwhere(values >= self._vocab_size)[0].tolist()
            raise UserError(
                f"split {self._split}, sample {ids[row]}: "
                f"token {values[row, column]} is outside model.vocab_size={self._vocab_size}; "
                "the shards are damaged, convert them again"
            )
        inputs, labels, documents = self._sequences.fields(ids, values)
        return MicroBatch(
            torch.from_numpy(inputs.astype(np.int64)),
            torch.from_numpy(labels),
            torch.from_numpy(documents),
            torch.tensor(ids, dtype=torch.int64),
        )


_Read = tuple[list[int], np.ndarray] | UserError  # sample ids and their values, see `SequenceReader.read`


def _open_corpora(
    path: str | Path | Mapping[str, float] | Sequence[Corpus],
    split: str,
    seq_len: int,
    vocab_size: int,
    tokenizer_path: str | Path | None,
    cache: ShardCache | str | Path | None,
) -> Sequence[Corpus]:
    """The corpora of `path`; the arguments are those of `ReplicaStream`."""
    if not isinstance(path, str | Path | Mapping):
        return path
    return open_corpora(
        path if isinstance(path, Mapping) else {str(path): 1.0},
        seq_len=seq_len,
        vocab_size=vocab_size,
        tokenizer_path=tokenizer_path,
        splits=[split],
        cache=cache.root if isinstance(cache, ShardCache) else cache,
    )


def _check_batch_sizes(global_batch: int, micro_batch: int, num_replicas: int) -> None:
    """Raises UserError unless every replica has the same number of micro-batches in a step."""
    if global_batch % (num_replicas * micro_batch):
        raise UserError(
            f"train.global_batch={global_batch} is not divisible by {count(num_replicas, 'replica')} x "
            f"train.micro_batch={micro_batch}; set train.global_batch to a multiple of {num_replicas * micro_batch}"
        )


def _corpora_to_read(corpora: Sequence[Corpus], split: str) -> list[Corpus]:
    """The corpora that have sequences in the split. Raises UserError if none has."""
    if readable := with_windows(corpora, split):
        return readable
    folders = ", ".join(corpus.name for corpus in corpora)
    raise UserError(
        "there is no held-out split; convert more text, or with a larger --heldout, or use other shards", folders
    )


class _SequenceDataset(Dataset):
    """Sequences by sample id; DataLoader calls `__getitems__` with the ids of a batch."""

    def __init__(self, sequences: SequenceReader):
        self.sequences = sequences

    def __getitem__(self, sample_id: int) -> _Read:
        return self.__getitems__([sample_id])

    def __getitems__(self, sample_ids: list[int]) -> _Read:
        try:
            return sample_ids, self.sequences.read(sample_ids)
        except UserError as error:
            return error


def _no_collate(read: Any) -> Any:
    """DataLoader's default would convert the arrays to tensors and send them through /dev/shm."""
    return read


def _stop_workers(reads: weakref.ref, processes: Sequence[BaseProcess]) -> None:
    """When the interpreter exits while a generator is alive: multiprocessing would ask the workers by a signal, which
    they ignore, and wait for them."""
    iterator: Any = reads()
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):  # not if this process reads
        iterator._shutdown_workers()
    _kill(processes)


def _kill(workers: Sequence[BaseProcess]) -> None:
    """End workers that torch has given up: it waits for 5 s, and then sends a signal that they ignore. One may wait for
    ever, for a lock of a queue that a killed one holds, and the interpreter would wait for it when it exits."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def _begin_worker(worker: int) -> None:
    """In a worker process, leave signals to the rank, and end with it.

    Terminals and launchers signal all processes of a job, and a rank that was asked to stop finishes its step, for
    which it may need its workers. If the rank is killed, torch's loop in the worker ends, but the process would wait
    forever until what it has sent is read.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    rank = multiprocessing.parent_process()
    assert rank and rank.pid
    end_with(rank.pid)
