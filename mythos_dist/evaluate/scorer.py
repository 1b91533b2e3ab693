"""Rank 0 evaluates; all ranks compute.

Rank 0 runs the tasks and holds the cache. For each round of requests it sends them to the other ranks, and every rank
computes its share: that is one collective after another, in the same order on every rank, whatever the tasks do.
Rounds depend on the requests only, not on what the cache already holds, so that a resumed evaluation computes the same
batches.

Decisions: EVALUATION-2.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch.distributed as dist

from mythos_dist.errors import UserError
from mythos_dist.evaluate.cache import Cache, Result
from mythos_dist.evaluate.requests import Prompt, ScoreRequest, TokenScores

T = TypeVar("T")
Progress = Callable[[int, int], object]


class Backend(Protocol):
    """A model on all ranks: replicas (replicas.py) or the engine of a run (in_run.py). A round is a list of batches."""

    max_length: int  # tokens of the longest input

    def plan(self, requests: Sequence[ScoreRequest]) -> Iterator[list[list[int]]]:
        """Indices of the requests of each round's batches. The same requests give the same batches."""
        ...

    def plan_prompts(self, prompts: Sequence[Prompt]) -> Iterator[list[list[int]]]:
        """As `plan`. Raises UserError if this backend does not generate."""
        ...

    def score(self, batches: Sequence[Sequence[ScoreRequest]], n_loops: int) -> list[list[TokenScores]]:
        """Collective: the scores of a round, on every rank."""
        ...

    def generate(self, batches: Sequence[Sequence[Prompt]], n_loops: int) -> list[list[list[int]]]:
        """Collective: the new tokens of a round, on every rank."""
        ...


class _Work(NamedTuple):
    """What rank 0 sends to all ranks; no batches: nothing is left to do."""

    batches: Sequence[Sequence[ScoreRequest]] | Sequence[Sequence[Prompt]] = ()
    n_loops: int = 0
    problems: Sequence[str] = ()  # of the UserError that rank 0 ended with


class Scorer:
    """Rank 0's access to the model, through the cache."""

    def __init__(self, backend: Backend, cache: Cache, progress: Progress | None = None):
        """progress: called with the requests that are done and their number, after every round."""
        self.max_length = backend.max_length
        self.computed = 0  # requests that were not in the cache
        self._backend, self._cache, self._progress = backend, cache, progress

    def score(self, requests: Sequence[ScoreRequest], n_loops: int) -> list[TokenScores]:
        """The scores of requests, in their order."""
        return cast(list[TokenScores], self._results(requests, self._backend.plan(requests), n_loops))

    def generate(self, prompts: Sequence[Prompt], n_loops: int) -> list[list[int]]:
        """The greedy continuations of prompts, in their order. Raises UserError if the backend does not generate."""
        return cast(list[list[int]], self._results(prompts, self._backend.plan_prompts(prompts), n_loops))

    def _results(self, requests: Sequence[Any], rounds: Iterator[list[list[int]]], n_loops: int) -> list[Result]:
        keys = [request.key for request in requests]
        done = 0
        for batches in rounds:
            # Of equal requests, one.
            first = {keys[i]: i for batch in reversed(batches) for i in reversed(batch)}
            missing = [
                [i for i in batch if first[keys[i]] == i and self._cache.get(n_loops, keys[i]) is None]
                for batch in batches
            ]
            missing = [batch for batch in missing if batch]
            if missing:
                work = _Work([[requests[i] for i in batch] for batch in missing], n_loops)
                indices = [i for batch in missing for i in batch]
                self._cache.add(n_loops, zip((keys[i] for i in indices), _run(self._backend, _send(work)), strict=True))
                self.computed += len(indices)
            done += sum(map(len, batches))
            if self._progress:
                self._progress(done, len(requests))
        return [cast(Result, self._cache.get(n_loops, key)) for key in keys]


def evaluate_on_all_ranks(
    backend: Backend, cache: Cache, evaluate: Callable[[Scorer], T], progress: Progress | None = None
) -> T | None:
    """`evaluate(scorer)` on rank 0, None on the others, which compute their shares. Collective.

    cache, progress: used on rank 0. A UserError of rank 0 is raised on all ranks. Any other exception is not sent: the
    launcher or the watchdog ends the other ranks.
    """
    if dist.get_rank() > 0:
        while (work := _send(None)).batches:
            _run(backend, work)
        if work.problems:
            raise UserError(work.problems)
        return None
    try:
        result = evaluate(Scorer(backend, cache, progress))
    except UserError as error:
        _send(_Work(problems=[str(error)]))
        raise
    finally:
        cache.close()
    _send(_Work())
    return result


def _send(work: _Work | None) -> _Work:
    """Broadcast from rank 0; returns its work on every rank."""
    box = [work]
    dist.broadcast_object_list(box)
    return cast(_Work, box[0])


def _run(backend: Backend, work: _Work) -> Iterator[Result]:
    """Compute a round; returns the results of all batches, one after the other."""
    batches: Any = work.batches
    compute = backend.generate if isinstance(batches[0][0], Prompt) else backend.score
    return itertools.chain.from_iterable(compute(batches, work.n_loops))
