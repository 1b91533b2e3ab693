"""The shards that a node will read, in order: known in advance, because the order of samples is computed.

A time is a step with a fraction: 12.5 is in the middle of step 12. What is needed within the horizon is known exactly.
With a limited cache, the horizon grows with each step until it has all shards: an optimal cache keeps some of them over
an epoch, so shards that are needed much later still differ.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mythos_dist.data.shard import Shard

MAX_STEPS = 20_000  # of the horizon: some 40 MB
STEPS_PER_CALL = 64  # by which the horizon grows at most: some 10 ms


class Need(NamedTuple):
    """The first use of a shard within a step."""

    time: float
    key: str
    shard: Shard


class Lookahead:
    """When each shard is needed next. Thread-safe."""

    def __init__(
        self,
        steps: Iterator[tuple[int, Sequence[Shard]]],
        key: Callable[[Shard], str],
        num_shards: int,
        far: bool = False,
        next_evaluation: Callable[[int], float] = lambda step: math.inf,
    ):
        """`steps`: each step with its shards in the order of their first use. `num_shards`: all that occur in them.
        `far`: the horizon grows until it has all of them. `next_evaluation`: the first step, at or after a given one,
        in which held-out shards are read.
        """
        self._source, self._key = steps, key
        self._num_shards, self._far = num_shards, far
        self._next_evaluation = next_evaluation
        self._steps: deque[tuple[int, list[Need]]] = deque()  # of the horizon
        self._uses: dict[str, deque[Need]] = {}  # by key, those within the horizon
        self._step = 0  # in progress; earlier ones are over
        self._ended = False
        self._lock = threading.Lock()

    def advance(self, step: int) -> None:
        """All steps before `step` are over on every rank."""
        with self._lock:
            self._step = step
            self._drop_old_steps()

    def next_use(self, key: str) -> float:
        """When a shard is needed next; inf: after the horizon, or never."""
        if key.split("/")[1] == "heldout":
            return self._next_evaluation(self._step)
        with self._lock:
            uses = self._uses.get(key)
            return uses[0].time if uses else math.inf

    def upcoming(self, ahead: int) -> list[Need]:
        """What the step in progress needs, then the next `ahead` shards that are not among them, in the order of their
        use."""
        with self._lock:
            for _ in range(STEPS_PER_CALL):
                if self._is_complete() or (self._reaches(ahead) and not self._far) or not self._extend():
                    break
            first = sorted(uses[0] for uses in self._uses.values())
            return first[: len(self._current()) + ahead]

    def _reaches(self, ahead: int) -> bool:
        return bool(self._steps) and len(self._uses) >= len(self._current()) + ahead

    def _is_complete(self) -> bool:
        return self._ended or len(self._uses) == self._num_shards or len(self._steps) >= MAX_STEPS

    def _current(self) -> list[Need]:
        return self._steps[0][1] if self._steps and self._steps[0][0] <= self._step else []

    def _extend(self) -> bool:
        """One more step. False: there is none."""
        step, shards = next(self._source, (0, None))
        if shards is None:
            self._ended = True
            return False
        needs = [Need(step + i / (len(shards) + 1), self._key(shard), shard) for i, shard in enumerate(shards)]
        self._steps.append((step, needs))
        for need in needs:
            if need.key not in self._uses:
                self._uses[need.key] = deque()
            self._uses[need.key].append(need)
        self._drop_old_steps()
        return True

    def _drop_old_steps(self) -> None:
        while self._steps and self._steps[0][0] < self._step:
            for need in self._steps.popleft()[1]:
                uses = self._uses[need.key]
                uses.popleft()
                if not uses:
                    del self._uses[need.key]
