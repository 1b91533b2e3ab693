"""The batches of a run on this rank, and the shards of stores that its node needs for them.

The first rank of each node downloads shards ahead, for all replicas of the node; no collective depends on it.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from mythos_dist.config.schema import Config
from mythos_dist.data.corpora import Corpus
from mythos_dist.data.lookahead import Lookahead
from mythos_dist.data.prefetch import Prefetcher
from mythos_dist.data.remote import cache_folder
from mythos_dist.data.shard import Shard
from mythos_dist.data.shard_cache import ShardCache
from mythos_dist.errors import UserError
from mythos_dist.parallel.mesh import Mesh, mesh_coordinates
from mythos_dist.train.batches import StepBatch, open_stream, read_batches
from mythos_dist.train.global_batch import GlobalBatch
from mythos_dist.train.session import Session
from mythos_dist.units import short_bytes

if TYPE_CHECKING:
    from mythos_dist.data.stream import ReplicaStream


def open_shard_cache(config: Config, corpora: list[Corpus]) -> ShardCache | None:
    """The cache of this node; None if no corpus is in a store. Raises UserError if it cannot hold two shards, of which
    one is read while the other is downloaded."""
    shards = [shard for corpus in corpora if corpus.url for split in corpus.shards.values() for shard in split]
    if not shards:
        return None
    limit = config.data.cache_bytes
    # A compressed shard and its content are there at the same time.
    largest = max(s.entry["raw_data"]["bytes"] + (s.stored["bytes"] if s.entry["zip_data"] else 0) for s in shards)
    if limit is not None and limit < 2 * largest:
        raise UserError(
            f"data.cache_limit={config.data.cache_limit} is less than two of the largest shards, "
            f"{short_bytes(2 * largest)}; set it to that or more"
        )
    return ShardCache(cache_folder(config.data.cache), limit)


class Feed:
    """The training batches of this rank, one per step."""

    def __init__(
        self,
        config: Config,
        session: Session,
        mesh: Mesh,
        corpora: list[Corpus],
        stream: "ReplicaStream",
        cache: ShardCache | None,
    ):
        self._config, self._session, self._mesh, self._corpora = config, session, mesh, corpora
        self._stream, self._cache = stream, cache
        self._prefetcher: Prefetcher | None = None
        self._batches: Iterator[StepBatch] = iter(())
        self._step = 0  # that is read next

    def begin(self, batches: Callable[[], Iterator[GlobalBatch]], step: int, last_step: int) -> None:
        """Read from step `step` on; called again after a rollback. `batches()`: those of this step and later ones."""
        self.close()
        self._step = step
        self._batches = read_batches(self._stream, batches())
        nodes, rank = self._session.nodes, self._session.rank_info.rank
        if self._cache is not None and nodes.index(nodes[rank]) == rank:
            self._prefetcher = self._prefetch(
                self._cache, islice(batches(), max(0, last_step - step + 1)), step, last_step
            )

    def read(self) -> StepBatch:
        """The batch of the next step. Raises UserError."""
        if self._prefetcher:
            self._prefetcher.advance(self._step)
        self._step += 1
        return next(self._batches)

    def close(self) -> None:
        """Stop downloading ahead."""
        if self._prefetcher:
            self._prefetcher.close()
            self._prefetcher = None

    def _prefetch(self, cache: ShardCache, batches: Iterator[GlobalBatch], step: int, last_step: int) -> Prefetcher:
        # A stream of its own: the order of samples caches permutations, and is not thread-safe.
        stream = open_stream(self._config, self._corpora, "train", self._mesh.data, cache)
        replicas = self._replicas_of_node()

        def steps() -> Iterator[tuple[int, list[Shard]]]:
            for at, batch in enumerate(batches, step):
                yield at, [shard for shard in stream.shards_of(batch.positions, replicas) if shard.url]

        remote = {corpus.url: corpus for corpus in self._corpora if corpus.url}.values()
        num_shards = sum(len(corpus.shards["train"]) for corpus in remote)
        every = self._config.train.eval_every

        def next_evaluation(at: int) -> float:
            return min(-(-at // every) * every if every else math.inf, last_step) if at <= last_step else math.inf

        lookahead = Lookahead(steps(), cache.key, num_shards, cache.limit is not None, next_evaluation)
        lookahead.advance(step)
        cache.set_plan(lookahead.next_use, [corpus.manifest.fingerprint for corpus in remote])
        return Prefetcher(cache, lookahead, self._config.data.prefetch_shards)

    def _replicas_of_node(self) -> list[int]:
        nodes, info = self._session.nodes, self._session.rank_info
        ranks = [rank for rank, node in enumerate(nodes) if node == nodes[info.rank]]
        return sorted({mesh_coordinates(self._config.parallel, info.world_size, rank).data.rank for rank in ranks})
