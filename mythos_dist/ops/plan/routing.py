"""Expected number of rows over the expert axis, for plans without a router's choices."""

from typing import NamedTuple


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
