"""Sequences of any length from windows of one length: a longer or shorter `train.seq_len` needs no second conversion.

The windows of a corpus are one stream of tokens, which is cut into sequences of S + 1: sequence i has the tokens
i (S + 1) to (i + 1) (S + 1) - 1. So each token is in one sequence whatever S is, documents are complete across joined
windows, and for the windows' own length sequences are the windows. What is left at the end of a split, less than one
sequence, is not read. An EOS ends each document and nothing is padded, so each token is trained on once per epoch. Text
must therefore never encode to EOS (tokenizer.py).

The trap: a part of the conversion ends with its last full window, and the rest of its text is in another folder. What
follows is another document, so one begins there, and its first token is not a label.
Windows with flags or stored labels (`ShardManifest.loss_mask`, `targets`) are complete in themselves. They are joined,
never divided, and each keeps its own labels.

Decisions: DATA-33.
"""

# B sequences, S train.seq_len, W tokens of a window without its last, k windows of a sequence, T rows of labels.

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mythos_dist.data.loss_mask import IGNORED, documents_of, labels_of
from mythos_dist.data.manifest import ShardManifest
from mythos_dist.data.shard import Shard
from mythos_dist.data.shard_cache import ShardCache
from mythos_dist.data.windows import WindowReader
from mythos_dist.units import count

if TYPE_CHECKING:
    from mythos_dist.data.corpora import Corpus


def num_sequences(manifest: ShardManifest, split: str, seq_len: int) -> int:
    """Sequences of `seq_len` tokens in a split; `length_problems` accepts that length."""
    return manifest.splits[split].windows * manifest.window // _sequence_values(manifest, seq_len)


def length_problems(manifest: ShardManifest, seq_len: int) -> Iterator[str]:
    """Why windows of a manifest do not serve a length, with the nearest lengths that they do."""
    window, windows = manifest.seq_len, manifest.splits["train"].windows
    what = "conversations" if manifest.loss_mask else "stored labels" if manifest.targets else ""
    if seq_len % window and what:
        yield (
            f"train.seq_len={seq_len}, but the shards have {what} in windows of {window} tokens, which are joined but "
            f"not divided; set train.seq_len to {_either(_multiples_near(seq_len, window))}, or convert with --seq-len "
            f"{seq_len}"
        )
    elif seq_len % window and window % seq_len:
        divisors = [n for n in range(1, window) if window % n == 0] if seq_len < window else []
        near = {max((n for n in divisors if n < seq_len), default=0), *_multiples_near(seq_len, window)}
        near |= {min((n for n in divisors if n > seq_len), default=0)}
        near = sorted(near - {0}, key=lambda n: abs(n - seq_len))[:2]
        yield (
            f"train.seq_len={seq_len} neither divides the shards' seq_len={window} nor is a multiple of it; set "
            f"train.seq_len to {_either(near)}, or convert with --seq-len {seq_len} (`mythos shards`)"
        )
    elif windows and not num_sequences(manifest, "train", seq_len):
        longest = windows if what else (windows * manifest.window - 1) // window  # windows
        yield (
            f"train.seq_len={seq_len}, but train/ has {count(windows, 'window')} of {window} tokens, less than one "
            f"sequence; set train.seq_len to at most {longest * window}, or convert more text"
        )


def _multiples_near(seq_len: int, window: int) -> list[int]:
    """The multiples of `window` below and above `seq_len`."""
    return [n for n in (seq_len // window * window, -(-seq_len // window) * window) if n]


def _either(lengths: Sequence[int]) -> str:
    return " or ".join(map(str, sorted(lengths)))


def _sequence_values(manifest: ShardManifest, seq_len: int) -> int:
    """Values of the stream in one sequence."""
    if manifest.loss_mask or manifest.targets:
        return seq_len // manifest.seq_len * manifest.window
    return seq_len + 1


class SequenceReader:
    """Reads sequences by their index; those of a corpus follow those of the corpora before it."""

    def __init__(
        self,
        corpora: "Sequence[Corpus]",
        split: str,
        seq_len: int,
        verify: bool = True,
        cache: ShardCache | str | Path | None = None,
    ):
        """seq_len: one that `length_problems` accepts. corpora: as `open_corpora` returns them. verify, cache: as in
        `WindowReader`."""
        self._manifest, self._seq_len = corpora[0].manifest, seq_len
        self._window_size, self._size = self._manifest.window, _sequence_values(self._manifest, seq_len)  # values
        self.shard_sizes = [self._sequences_by_shard(corpus.shards[split]) for corpus in corpora]
        self._first_ids = _starts([sum(sizes) for sizes in self.shard_sizes])
        windows = [[shard.entry["samples"] for shard in corpus.shards[split]] for corpus in corpora]
        self._first_windows = _starts([sum(samples) for samples in windows])
        self._breaks = self._find_breaks([corpus.shards[split] for corpus in corpora])
        shards = [shard for corpus in corpora for shard in corpus.shards[split]]
        self._windows = WindowReader(shards, self._window_size, verify, cache)

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards, in the order of the sequences."""
        return self._windows.shards

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """The indices of the shards that sequences are in, in the order in which they are read; int64 (n,)."""
        first, last, _ = self._spans(np.asarray(ids))
        begin, end = self._windows.shards_of(first), self._windows.shards_of(last)
        if (begin == end).all():
            return begin
        return np.concatenate([np.arange(a, b + 1) for a, b in zip(begin, end, strict=True)])

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """The values of sequences, unsigned integers (B, values per sequence). Raises UserError as `WindowReader`."""
        first, last, offset = self._spans(np.asarray(ids))
        windows = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        values = self._windows.read(windows.tolist()).ravel()
        begins = np.searchsorted(windows, first) * self._window_size + offset  # its windows are neighbors in `values`
        return np.stack([values[begin : begin + self._size] for begin in begins.tolist()])

    def fields(self, ids: Sequence[int], values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `read` returned -> input ids (B, S), int64 labels (B, S) or (B, T, S), int32 document ids (B, S)."""
        if self._manifest.loss_mask or self._manifest.targets:
            return self._joined(values)
        eos, inputs = self._manifest.eos_id, values[:, :-1]
        labels = values[:, 1:].astype(np.int64)
        if self._breaks is None:
            return inputs, labels, document_ids(inputs, eos)
        begins = self._begins(np.asarray(ids))
        labels[begins[:, 1:] & (inputs != eos)] = IGNORED
        return inputs, labels[:, None], document_ids(inputs, eos, begins[:, :-1])

    def _joined(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `fields`, of windows that are complete in themselves: side by side, without their last tokens."""
        manifest, B, W = self._manifest, len(values), self._manifest.seq_len
        windows = values.reshape(-1, self._window_size)  # (B * k, -)
        tokens, rest = windows[:, : W + 1], windows[:, W + 1 :]
        inputs = tokens[:, :W]
        if manifest.targets:
            labels = rest.astype(np.int64).reshape(-1, manifest.targets, W)
            labels[labels == manifest.eos_id] = IGNORED
            documents = document_ids(inputs, manifest.eos_id)
        else:
            labels, documents = labels_of(tokens, rest)[:, None], documents_of(rest[:, :W])
        documents = documents.reshape(B, -1, W)
        ends = np.cumsum(documents[:, :, -1:] + 1, axis=1, dtype=np.int32)  # documents up to the end of each window
        documents[:, 1:] += ends[:, :-1]
        labels = labels.reshape(B, -1, labels.shape[1], W).transpose(0, 2, 1, 3)  # (B, T, k, W)
        shape = (B, self._seq_len)
        return inputs.reshape(shape), labels.reshape(B, -1, self._seq_len), documents.reshape(shape)

    def _sequences_by_shard(self, shards: Sequence[Shard]) -> list[int]:
        """Sequences that begin in each shard of a corpus: a few shards may have none."""
        values = np.cumsum([shard.entry["samples"] * self._window_size for shard in shards])
        until = np.minimum(-(-values // self._size), values[-1] // self._size)  # that begin before its end
        return np.diff(until, prepend=0).tolist()

    def _find_breaks(self, corpora: Sequence[Sequence[Shard]]) -> np.ndarray | None:
        """The windows, of all corpora, with which a part begins; None if none is inside of a sequence."""
        breaks, inside = [], False
        for shards, first in zip(corpora, self._first_windows.tolist(), strict=True):
            parts = [shard.stored["basename"].rpartition("/")[0] for shard in shards]
            starts = _starts([shard.entry["samples"] for shard in shards])
            begins = [int(starts[i]) for i in range(1, len(parts)) if parts[i] != parts[i - 1]]
            inside |= any(begin * self._window_size % self._size for begin in begins)
            breaks += [first + begin for begin in begins]
        return np.array(breaks) if inside else None

    def _begins(self, ids: np.ndarray) -> np.ndarray:
        """bool (B, values per sequence): where the text of another part begins inside of a sequence."""
        assert self._breaks is not None
        first, last, offset = self._spans(ids)
        begins = np.zeros((len(ids), self._size), bool)
        low, high = (np.searchsorted(self._breaks, windows, side="right") for windows in (first, last))
        for row in np.flatnonzero(high > low).tolist():
            windows = self._breaks[low[row] : high[row]] - first[row]
            begins[row, windows * self._window_size - offset[row]] = True
        return begins

    def _spans(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first and the last window of sequences, and the value of the first window with which they begin."""
        corpora = np.searchsorted(self._first_ids, ids, side="right") - 1
        begin = (ids - self._first_ids[corpora]) * self._size
        first = self._first_windows[corpora]
        return (
            first + begin // self._window_size,
            first + (begin + self._size - 1) // self._window_size,
            begin % (self._window_size),
        )


def _starts(sizes: Sequence[int]) -> np.ndarray:
    """Where each of these begins, one after the other, int64 (n,)."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return ends - np.asarray(sizes, dtype=np.int64)


def document_ids(tokens: np.ndarray, eos: int, begins: np.ndarray | None = None) -> np.ndarray:
    """Index of each token's document in its sequence, from 0; an EOS belongs to the document that it ends.

    (..., S) -> int32 (..., S). A document that continues from the previous sequence is document 0.
    begins: bool (..., S), tokens that begin a document without an EOS before them.
    """
    starts = np.zeros(tokens.shape, bool)
    starts[..., 1:] = tokens[..., :-1] == eos
    if begins is not None:
        starts[..., 1:] |= begins[..., 1:]
    return np.cumsum(starts, axis=-1, dtype=np.int32)
