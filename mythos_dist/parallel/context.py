"""Context parallelism: the tokens of each sequence divided over the ranks of the context axis.

All ranks of a context group read the same windows and keep some tokens of each, ranges of positions. A query attends
to the earlier tokens of its document, so a token costs its position in its document, and a rank gets ranges with equal
sums of that. Rule: sequences are cut into chunks, and the chunk with most (query, key) pairs goes to the rank with the
fewest pairs that still has room. Without documents that is zigzag: of 2N chunks rank r has r and 2N - 1 - r
(Megatron-LM, Llama 3). Ranks have equally many tokens, up to one unit, because everything but attention costs the same
for each token.

All ranks compute the same division from the document ids, so nothing is sent for it.

Decisions: PARALLEL-17.
"""

# B sequences, S tokens of each, S' of them on this rank, N ranks of the context axis, W elements per token.

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mythos_dist.parallel.mesh import Axis, Mesh

BALANCE = 1.05  # the largest sum of pairs of a rank over the mean, if chunks of any size can reach it
KEY_TOKENS = 16384  # keys and values are expanded for this many tokens at a time, at most
_MOST_CHUNKS = 64  # per rank and sequence

Division = list[list[list[range]]]  # [sequence][rank]: positions, ascending


class AttentionBlock(NamedTuple):
    """Queries and keys between which a kernel computes attention."""

    queries: slice  # of this rank's B * S' tokens
    keys: slice  # of a tile
    causal: bool  # as many keys as queries, at the same positions; otherwise every query sees every key


class KeyTile(NamedTuple):
    """Consecutive tokens of the B * S whose keys and values exist at a time."""

    tokens: slice
    blocks: list[AttentionBlock]


@dataclass(frozen=True)
class ContextShard:
    """The tokens of a batch that this rank of the context axis holds, and those that they attend to."""

    axis: Axis
    seq_len: int  # S
    division: Division
    bounds: Sequence[int]  # where each document begins in the B * S tokens, and B * S; each sequence begins one
    positions: Tensor  # (B, S') int64
    rows: Tensor  # (B * S,) int64: the row of each token in what `gather` returns
    tiles: list[KeyTile]

    @property
    def _longest(self) -> int:
        """Tokens of a sequence on the rank that has most."""
        return max(sum(map(len, ranges)) for ranges in self.division[0])

    def local(self, x: Tensor) -> Tensor:
        """This rank's tokens of x: (B, S) -> (B, S'), (B, T, S) -> (B, T, S')."""
        positions = self.positions
        if x.dim() == 3:
            positions = positions.unsqueeze(1).expand(-1, x.shape[1], -1)
        return x.gather(-1, positions)

    def full(self, x: Tensor) -> Tensor:
        """(B, S') -> (B, S), zeros at the tokens of other ranks."""
        return x.new_zeros(x.shape[0], self.seq_len).scatter_(1, self.positions, x)

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tokens of x (B, S', W), as rows (N * B * longest, W) in the order `rows`. Outside autograd."""
        if missing := self._longest - x.shape[1]:
            x = F.pad(x, (0, 0, 0, missing))
        own = x.flatten(0, 1).contiguous()
        rows = own.new_empty(self.axis.size * len(own), own.shape[1])
        dist.all_gather_into_tensor(rows, own, group=self.axis.group)
        return rows

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """The sum over ranks of rows as `gather` returns them, for this rank's tokens: (B, S', W)."""
        B, tokens = self.positions.shape
        out = rows.new_empty(len(rows) // self.axis.size, rows.shape[1])
        dist.reduce_scatter_tensor(out, rows, group=self.axis.group)
        return out.view(B, self._longest, -1)[:, :tokens]

    def repeated(self, times: int) -> "ContextShard":
        """For `times` copies of the batch, concatenated."""
        total = self.bounds[-1]
        bounds = [start + i * total for i in range(times) for start in self.bounds[:-1]]
        return _build(self.axis, self.seq_len, self.division * times, [*bounds, times * total], self.positions.device)


class AttentionWork(NamedTuple):
    """What a rank computes in attention over sequences of one document each."""

    pairs: int  # (query, key), per head
    expanded: int  # tokens whose keys and values are expanded
    tile: int  # tokens of the largest tile
    gathered: int  # rows that `gather` returns


def attention_work(batch: int, seq_len: int, mesh: Mesh) -> AttentionWork:
    """The work of this rank of a context axis of several."""
    return _attention_work(batch, seq_len, mesh.context.size, _unit(mesh), mesh.context.rank)


@functools.lru_cache(maxsize=1024)
def _attention_work(batch: int, seq_len: int, ranks: int, unit: int, rank: int) -> AttentionWork:
    division = divide_sequences(np.zeros((batch, seq_len), np.int64), ranks, unit)
    bounds = range(0, (batch + 1) * seq_len, seq_len)
    tiles = _tiles(seq_len, [sequence[rank] for sequence in division], bounds, ranks)
    pairs = 0
    for tile in tiles:
        for queries, keys, causal in tile.blocks:
            m, n = queries.stop - queries.start, keys.stop - keys.start
            pairs += n * (n + 1) // 2 if causal else m * n
    sizes = [tile.tokens.stop - tile.tokens.start for tile in tiles]
    return AttentionWork(pairs, sum(sizes), max(sizes), ranks * batch * _capacities(seq_len, ranks, unit)[0])


def local_tokens(seq_len: int, mesh: Mesh) -> int:
    """Tokens of each sequence on this rank of the context axis (on all its tensor ranks together)."""
    return _capacities(seq_len, mesh.context.size, _unit(mesh))[mesh.context.rank]


def most_local_tokens(seq_len: int, mesh: Mesh) -> int:
    """Tokens of each sequence on the rank of context x tensor that has most of them."""
    return -(-(seq_len // _unit(mesh)) // mesh.context.size)


def context_shard(
    shape: torch.Size, mesh: Mesh, device: torch.device, document_ids: Tensor | None = None
) -> ContextShard | None:
    """This rank's tokens of a batch of shape (B, S); None if the context axis has one rank.

    document_ids: (B, S), equal within a document; None: each sequence is one. Waits for the GPU.
    """
    if mesh.context.size == 1:
        return None
    batch, seq_len = shape
    ids = None if document_ids is None else document_ids.cpu().numpy()
    starts = _document_starts(ids, batch, seq_len)
    division = divide_sequences(starts, mesh.context.size, _unit(mesh))
    bounds = [row * seq_len + int(start) for row in range(batch) for start in np.unique(starts[row])]
    return _build(mesh.context, seq_len, division, [*bounds, batch * seq_len], device)


def divide_sequences(starts: np.ndarray, ranks: int, unit: int = 1) -> Division:
    """Divide sequences over ranks, in multiples of `unit` tokens, with balanced sums of (query, key) pairs.

    starts: (B, S), the position at which each token's document begins; S is divisible by `unit`.
    """
    seq_len = starts.shape[1]
    pairs = np.arange(1, seq_len + 1) - starts  # of each query
    costs = pairs.reshape(len(starts), -1, unit).sum(2)
    before = np.concatenate([np.zeros((len(starts), 1), np.int64), costs.cumsum(1)], axis=1)  # (B, S / unit + 1)
    best, least = None, float("inf")
    chunks = 2
    while True:
        division, loads = _divide_units(before, ranks, chunks)
        imbalance = max(loads) * ranks / sum(loads)
        if imbalance < least:
            best, least = division, imbalance
        if least <= BALANCE or chunks >= min(_MOST_CHUNKS, seq_len // unit // ranks):
            break
        chunks *= 2
    assert best is not None
    return [
        [[range(r.start * unit, r.stop * unit) for r in _merged(ranges)] for ranges in sequence] for sequence in best
    ]


def _divide_units(before: np.ndarray, ranks: int, chunks: int) -> tuple[Division, list[int]]:
    """`divide_sequences` with `chunks` chunks per rank and sequence, in units. before (B, units + 1): pairs before each
    unit.

    Returns also the pairs of each rank.
    """
    units = before.shape[1] - 1
    size = max(1, -(-units // (chunks * ranks)))
    loads, division = [0] * ranks, []
    for row in before:
        room, parts = _capacities(units, ranks, 1), [[] for _ in range(ranks)]
        queue: list[tuple[int, int, int]] = []
        for start in range(0, units, size):
            _enqueue_chunk(queue, row, start, min(start + size, units))
        while queue:
            _, start, end = heapq.heappop(queue)
            rank = min((r for r in range(ranks) if room[r]), key=loads.__getitem__)
            stop = min(end, start + room[rank])
            if stop < end:
                _enqueue_chunk(queue, row, stop, end)
            parts[rank].append(range(start, stop))
            room[rank] -= stop - start
            loads[rank] += int(row[stop] - row[start])
        division.append(parts)
    return division, loads


def _enqueue_chunk(queue: list[tuple[int, int, int]], before: np.ndarray, start: int, stop: int) -> None:
    """Put the units [start, stop) of a sequence into the heap, in which the chunk with the most pairs is first."""
    heapq.heappush(queue, (int(before[start] - before[stop]), start, stop))


def _capacities(seq_len: int, ranks: int, unit: int) -> list[int]:
    """The tokens of a sequence that each rank has."""
    each, more = divmod(seq_len // unit, ranks)
    return [(each + (rank < more)) * unit for rank in range(ranks)]


def _unit(mesh: Mesh) -> int:
    """With sequence parallelism each tensor rank has an equal part of a rank's tokens."""
    return mesh.tensor.size if mesh.sequence else 1


def _merged(ranges: list[range]) -> list[range]:
    merged: list[range] = []
    for one in sorted(ranges, key=lambda one: one.start):
        if merged and merged[-1].stop == one.start:
            merged[-1] = range(merged[-1].start, one.stop)
        else:
            merged.append(one)
    return merged


def _document_starts(ids: np.ndarray | None, batch: int, seq_len: int) -> np.ndarray:
    """(B, S): the position at which each token's document begins."""
    if ids is None:
        return np.zeros((batch, seq_len), np.int64)
    begins = np.zeros((batch, seq_len), np.int64)
    begins[:, 1:] = np.where(ids[:, 1:] != ids[:, :-1], np.arange(1, seq_len), 0)
    return np.maximum.accumulate(begins, axis=1)


def _build(axis: Axis, seq_len: int, division: Division, bounds: Sequence[int], device: torch.device) -> ContextShard:
    batch, longest = len(division), max(sum(map(len, ranges)) for ranges in division[0])
    rows = np.empty(batch * seq_len, np.int64)
    for sequence, rank in itertools.product(range(batch), range(axis.size)):
        positions = _positions(division[sequence][rank])
        rows[sequence * seq_len + positions] = (rank * batch + sequence) * longest + np.arange(len(positions))
    own = np.stack([_positions(sequence[axis.rank]) for sequence in division])
    tiles = _tiles(seq_len, [sequence[axis.rank] for sequence in division], bounds, axis.size)
    positions, rows_of_tokens = (torch.from_numpy(index).to(device) for index in (own, rows))
    return ContextShard(axis, seq_len, division, bounds, positions, rows_of_tokens, tiles)


def _positions(ranges: list[range]) -> np.ndarray:
    return np.concatenate([np.arange(one.start, one.stop) for one in ranges])


def _tiles(seq_len: int, own: list[list[range]], bounds: Sequence[int], ranks: int) -> list[KeyTile]:
    """The tiles of keys that the queries of `own` (by sequence) attend to."""
    total = bounds[-1]
    size = min(KEY_TOKENS, -(-seq_len // ranks))
    blocks: dict[int, list[AttentionBlock]] = {}
    for query, start, stop, document in _segments(seq_len, own, bounds):
        for tile in range(document // size, (stop - 1) // size + 1):
            first, last = tile * size, min((tile + 1) * size, stop)
            blocks.setdefault(tile, []).extend(
                AttentionBlock(queries, slice(keys.start - first, keys.stop - first), causal)
                for queries, keys, causal in _blocks(query, start, stop, range(max(document, first), last))
            )
    return [
        KeyTile(slice(i * size, min((i + 1) * size, total)), blocks_of_tile)
        for i, blocks_of_tile in sorted(blocks.items())
    ]


def _segments(seq_len: int, own: list[list[range]], bounds: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """This rank's tokens by document: the first of them among the rank's own, the first and the end among the B * S
    tokens, and where the document begins."""
    query, document = 0, 0
    for row, ranges in enumerate(own):
        for one in ranges:
            start, end = row * seq_len + one.start, row * seq_len + one.stop
            while start < end:
                while bounds[document + 1] <= start:
                    document += 1
                stop = min(end, bounds[document + 1])
                yield query, start, stop, bounds[document]
                query, start = query + stop - start, stop


def _blocks(query: int, start: int, stop: int, keys: range) -> Iterator[tuple[slice, range, bool]]:
    """Blocks of the queries [start, stop), from `query` on among the rank's own, with `keys` of their document."""
    if keys.start < start:
        earlier = range(keys.start, min(keys.stop, start))
        yield slice(query, query + stop - start), earlier, False
    same = range(max(keys.start, start), keys.stop)
    if same:
        first, last = query + same.start - start, query + same.stop - start
        yield slice(first, last), same, True
        if same.stop < stop:
            yield slice(last, query + stop - start), same, False
