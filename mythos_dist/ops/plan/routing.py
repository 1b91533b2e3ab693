"""How many rows go over the expert axis when no router has spoken yet."""

from typing import NamedTuple


class Routed(NamedTuple):
    """What one loop of one micro-batch sends over the expert axis, and gets; own rows included."""

    sent: int  # rows
    received: int
    pairs: int  # (row, expert) pairs received: what this rank's experts work on


def expected_rows(tokens: int, k: int, n_experts: int, ranks: int, imbalance: float = 1.0) -> Routed:
    """When each token chooses k experts with equal chances; `imbalance` times that comes in.

    A token goes once to a rank of s experts, with probability 1 - C(E - s, k) / C(E, k) (parallel/expert.py).
    """
    if ranks == 1:
        return Routed(0, 0, tokens * k)
    local, none = n_experts // ranks, 1.0
    for i in range(k):
        none *= max(0, n_experts - local - i) / (n_experts - i)
    to_each = round(tokens * (1 - none))
    pairs = round(tokens * k / ranks * imbalance)
    return Routed(to_each * ranks, round(to_each * imbalance) * ranks, pairs * ranks)
