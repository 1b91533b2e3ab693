"""Sizes of the chunks that layers work in (model/chunks.py), and the rows over the expert axis that each exchanges, as
expected without a router's choices."""

from collections import Counter
from typing import NamedTuple

from mythos_dist.config.schema import Config
from mythos_dist.parallel.context import local_tokens, most_local_tokens
from mythos_dist.parallel.mesh import Mesh


class ExpertRows(NamedTuple):
    """What a rank exchanges over the expert axis in one loop of one micro-batch; its own rows included."""

    sent: int
    received: int
    pairs: int  # (row, expert) pairs received: the work of this rank's experts


def expected_rows(tokens: int, k: int, n_experts: int, ranks: int, imbalance: float = 1.0) -> ExpertRows:
    """If each token chooses k experts uniformly at random, and this rank receives `imbalance` times the mean.

    A token is sent once to each rank of s experts with probability 1 - C(E - s, k) / C(E, k) (parallel/expert.py).
    """
    if ranks == 1:
        return ExpertRows(0, 0, tokens * k)
    local, none_chosen = n_experts // ranks, 1.0
    for i in range(k):
        none_chosen *= max(0, n_experts - local - i) / (n_experts - i)
    to_each = round(tokens * (1 - none_chosen))
    pairs = round(tokens * k / ranks * imbalance)
    return ExpertRows(to_each * ranks, round(to_each * imbalance) * ranks, pairs * ranks)


def chunk_sizes(config: Config, mesh: Mesh) -> list[int]:
    """Tokens that an MoE layer works on, one chunk after the other, in a loop of one micro-batch (model/chunks.py);
    over all ranks of a tensor group."""
    train, ranks = config.train, mesh.tensor.size if mesh.sequence else 1
    tokens = train.micro_batch * local_tokens(train.seq_len, mesh) // ranks
    if not config.chunk_size:
        return [tokens * ranks]
    most = train.micro_batch * most_local_tokens(train.seq_len, mesh)
    count = -(-most // max(1, config.chunk_size // ranks))
    each, more = divmod(tokens, count)
    return [(each + 1) * ranks] * more + [each * ranks] * (count - more)


def rows_of_chunks(config: Config, mesh: Mesh, imbalance: float = 1.0) -> tuple[ExpertRows, ExpertRows]:
    """`expected_rows` of a loop of one micro-batch: all chunks together, and the largest chunk."""
    c, sizes = config.model, chunk_sizes(config, mesh)
    settings = c.n_experts_per_tok, c.n_experts, mesh.expert.size, imbalance
    total: Counter[str] = Counter()
    for size, times in Counter(sizes).items():
        for name, rows in expected_rows(size, *settings)._asdict().items():
            total[name] += times * rows
    return ExpertRows(**{name: total[name] for name in ExpertRows._fields}), expected_rows(sizes[0], *settings)
