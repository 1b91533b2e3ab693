"""The micro-batches of one replica: the only place that knows streaming's traps.

Storage is streaming's (local files now; it can also download, cache and decompress), read by index. The order is ours:
position p = step * global_batch + offset is in epoch p // num_samples, and is the sample
order(seed, epoch)[p % num_samples]. Replica r takes the r-th of `num_replicas` equal parts of a step's positions.
So each sample comes once an epoch, an epoch may end inside a step, seeking reads nothing, and a step holds the same
samples at any number of replicas, micro-batch size and worker count. B micro-batch size (windows), S seq_len (tokens).
"""

import json
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mythos_dist.data.manifest import Manifest, file_sha256, index_fingerprint, read_manifest
from mythos_dist.data.pack import document_ids
from mythos_dist.errors import UserError

# One canonical node: a global batch is one stretch of one order, whatever the number of nodes (more would tie the
# order to a layout). The block is how far a sample may travel from its shard's place.
CANONICAL_NODES = 1
MIN_SHUFFLE_BLOCK = 1 << 18
ORDERS_KEPT = 2  # the end of one epoch and the start of the next; 8 bytes a sample each


class MicroBatch(NamedTuple):
    """B windows of one forward pass; `sample_ids` are indices in the split, the same in every epoch."""

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64
    document_ids: Tensor  # (B, S) int32, of each input token, from 0 in each window
    sample_ids: Tensor  # (B,) int64


class ReplicaStream:
    """The micro-batches of one replica, cut from one order of samples that depends only on (seed, the shards).

    Every rank of a replica builds the same one. With `shuffle=False` the order is the one on disk.
    """

    def __init__(
        self,
        path: str | Path,
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
    ):
        """`global_batch` and `micro_batch` in sequences; `workers` are processes that read ahead for `steps`.

        Raises UserError with all problems of the folder and of its fit to the config. Where several ranks of one job
        run on a machine, all of them construct at once: streaming waits for them at a barrier.
        """
        assert 0 <= replica < num_replicas and split in ("train", "heldout")
        path = Path(path)
        manifest = check_shards(path, split, seq_len=seq_len, vocab_size=vocab_size, tokenizer_path=tokenizer_path)
        if global_batch % (num_replicas * micro_batch):
            raise UserError(
                f"train.global_batch={global_batch} is not divisible by {num_replicas} replicas x "
                f"train.micro_batch={micro_batch}; set train.global_batch to a multiple of {num_replicas * micro_batch}"
            )
        self.fingerprint = manifest.fingerprint  # of the shards on disk
        self.num_samples = manifest.splits[split].windows
        self._split, self._vocab_size = split, vocab_size
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._per_step = global_batch // num_replicas  # samples of this replica in a step
        self._first = replica * self._per_step
        self._seed, self._shuffle, self._workers = seed, shuffle, workers
        self._windows = _Windows(path / split, manifest)
        self._collate = partial(_collate, eos_id=manifest.eos_id)
        self._orders: dict[int, np.ndarray] = {}

    def step(self, step: int) -> list[MicroBatch]:
        """This replica's micro-batches of optimizer step `step` (from 0), read here and now.

        Returns global_batch / num_replicas / micro_batch of them. Raises UserError on a token outside the vocabulary.
        """
        return [
            self._checked(self._collate([self._windows[i] for i in sample_ids]))
            for sample_ids in self._micro_batches(step)
        ]

    def steps(self, start: int) -> Iterator[list[MicroBatch]]:
        """`step(start)`, `step(start + 1)`, … without end, read ahead by the worker processes."""
        loader = DataLoader(
            self._windows,
            batch_sampler=chain.from_iterable(map(self._micro_batches, count(start))),  # endless; runs in this process
            num_workers=self._workers,
            collate_fn=self._collate,
            generator=torch.Generator(),  # else it draws from the global generator, and a resumed run drifts
        )
        micro_batches = iter(loader)
        while True:
            yield [self._checked(one) for one in islice(micro_batches, self._per_step // self._micro_batch)]

    def _micro_batches(self, step: int) -> list[list[int]]:
        """Sample ids of each micro-batch of this replica in `step`."""
        first = step * self._global_batch + self._first
        epochs, offsets = np.divmod(np.arange(first, first + self._per_step), self.num_samples)
        ids = np.empty(self._per_step, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._order(int(epoch))[offsets[here]]
        return ids.reshape(-1, self._micro_batch).tolist()

    def _order(self, epoch: int) -> np.ndarray:
        """The samples of `epoch` in order, int64 (num_samples,)."""
        if epoch not in self._orders:
            while len(self._orders) >= ORDERS_KEPT:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = self._windows.order(self._seed, epoch) if self._shuffle else self._windows.ids
        return self._orders[epoch]

    def _checked(self, batch: MicroBatch | UserError) -> MicroBatch:
        """`batch`, or UserError on a token that the model has no embedding for (on a GPU: an assert without a name)."""
        if isinstance(batch, UserError):
            raise batch
        windows = torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1)  # (B, S + 1)
        if int(windows.max()) >= self._vocab_size:
            row, column = (windows >= self._vocab_size).nonzero()[0].tolist()
            raise UserError(
                f"split {self._split}, sample {int(batch.sample_ids[row])}: "
                f"token {int(windows[row, column])} is outside model.vocab_size={self._vocab_size}; "
                "the shards are damaged, convert them again"
            )
        return batch


def check_shards(
    path: str | Path, split: str, *, seq_len: int, vocab_size: int, tokenizer_path: str | Path | None = None
) -> Manifest:
    """The manifest of the folder, or UserError with all that is wrong with it or with its fit to the config.

    Unlike building a stream this waits for no other rank, so ranks can check first and then agree.
    """
    path = Path(path)
    manifest = read_manifest(path)
    problems = _folder_problems(path, split, manifest, tokenizer_path)
    problems += _config_problems(path, manifest, seq_len, vocab_size)
    if problems:
        raise UserError(problems, str(path))
    return manifest


@lru_cache
def _open_dataset(folder: str, fingerprint: str) -> Any:
    """The StreamingDataset of a split, one for a folder and process.

    Streaming holds the shared memory of every dataset until the process ends, and each new one opens that of all
    earlier ones again: a hundred of them are thousands of open files, more than many machines allow.
    """
    # DeepSpeed's launcher sets LOCAL_SIZE only. Without LOCAL_WORLD_SIZE every rank takes itself for the first on
    # its machine, and two of them die of FileExistsError '/000000_locals' (streaming #717).
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    from streaming import StreamingDataset  # 6 seconds of import

    del fingerprint  # part of the cache's key: a folder that was converted again is another one
    return StreamingDataset(local=folder, batch_size=1)


class _Windows(Dataset):
    """The windows of a split by index: map-style, because DataLoader would iterate over a StreamingDataset itself."""

    def __init__(self, folder: Path, manifest: Manifest):
        try:
            self._data = _open_dataset(str(folder), manifest.fingerprint)
        except FileExistsError:
            raise UserError(
                "another rank or job took the same shared memory; "
                f"LOCAL_WORLD_SIZE={os.environ['LOCAL_WORLD_SIZE']} must be the number of ranks on this machine: "
                "set it if it is not, else start again",
                str(folder),
            ) from None
        self._window = manifest.seq_len + 1
        self._folder = str(folder)
        expected = manifest.splits[folder.name].windows
        if self._data.num_samples != expected:  # len(dataset) is one rank's share
            raise UserError(
                f"{self._data.num_samples} windows, but the manifest says {expected}; convert again", str(folder)
            )

    @property
    def ids(self) -> np.ndarray:
        return np.arange(self._data.num_samples)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the samples that keeps those of one shard near each other, int64 (num_samples,)."""
        from streaming.base.shuffle import get_shuffle

        sizes = self._data.samples_per_shard
        block = max(MIN_SHUFFLE_BLOCK, 2 * int(sizes.max()))  # a block below a shard's size would not mix shards
        return get_shuffle("py1e", sizes, CANONICAL_NODES, seed, epoch, block)

    def __len__(self) -> int:
        return self._data.num_samples

    def __getitem__(self, sample_id: int) -> tuple[int, np.ndarray | UserError]:
        """The sample's window; an error is handed over like data, for DataLoader would wrap it in a traceback."""
        try:
            tokens = self._data[sample_id]["tokens"]
        except (IndexError, KeyError, ValueError) as error:  # what streaming's decoder makes of damaged bytes
            problem = f"sample {sample_id} cannot be decoded ({error}): the shard is damaged; convert again"
            return sample_id, UserError(problem, self._folder)
        assert tokens.shape == (self._window,), f"sample {sample_id} has shape {tokens.shape}"
        return sample_id, tokens


def _collate(samples: list[tuple[int, np.ndarray | UserError]], eos_id: int) -> MicroBatch | UserError:
    """B pairs of (sample id, window of S + 1 tokens) to a MicroBatch, or their first error; runs in the worker."""
    ids, rows = zip(*samples, strict=True)
    for row in rows:
        if isinstance(row, UserError):
            return row
    windows = np.stack(rows).astype(np.int64)  # (B, S + 1)
    inputs = windows[:, :-1].copy()
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(windows[:, 1:].copy()),
        torch.from_numpy(document_ids(inputs, eos_id)),
        torch.tensor(ids, dtype=torch.int64),
    )


def _config_problems(path: Path, manifest: Manifest, seq_len: int, vocab_size: int) -> list[str]:
    problems = []
    if seq_len != manifest.seq_len:
        problems.append(
            f"train.seq_len={seq_len}, but these shards hold windows of seq_len={manifest.seq_len}; "
            f"set train.seq_len to {manifest.seq_len}, or make shards of {seq_len} with tools/make_shards.py"
        )
    if vocab_size < manifest.vocab_size:
        problems.append(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer of data.path={path}, "
            f"which has {manifest.vocab_size} pieces; set model.vocab_size to {manifest.vocab_size} or more"
        )
    return problems


def _folder_problems(path: Path, split: str, manifest: Manifest, tokenizer_path: str | Path | None) -> list[str]:
    problems = []
    try:
        if index_fingerprint(path) != manifest.fingerprint:
            problems.append("the shards changed after the conversion (index.json is another); convert again")
        elif missing := _missing_shards(path / split):
            problems.append(
                f"{len(missing)} shard files are missing in {split}/, the first is {missing[0]}; copy them too"
            )
        if not manifest.splits[split].windows:
            problems.append(f"split {split} has 0 windows; convert more text, or with a larger share of held-out text")
    except OSError as error:
        problems.append(f"{error.filename} cannot be read ({error.strerror}); copy the whole folder, or convert again")
    for file in filter(None, [path / "tokenizer.model", tokenizer_path]):
        if not Path(file).is_file():
            problems.append(f"no tokenizer at {file}; copy it there, or convert again")
        elif file_sha256(Path(file)) != manifest.tokenizer_sha256:
            problems.append(
                f"these shards were made with another tokenizer than {file}; use that one, or convert again"
            )
    return problems


def _missing_shards(folder: Path) -> list[str]:
    """Names in index.json without a file. One listing: asking a cluster's file system for each file takes minutes."""
    present = set(os.listdir(folder))
    shards = json.loads((folder / "index.json").read_bytes())["shards"]
    return [name for shard in shards if (name := shard["raw_data"]["basename"]) not in present]
