"""Tasks inside a run (`train.tasks`), at any layout: scored by the engine, in windows of the run's shape.

Pipeline stages exchange tensors of one shape, so sequences are packed as documents into windows of `train.seq_len`
tokens, `train.micro_batch` of them per replica and pass. The engine has no key-value cache, so tasks that generate text
are refused.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mythos_dist.config.schema import Config
from mythos_dist.data.stream import MicroBatch
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.data.tokenizer_files import evaluation_tokenizer
from mythos_dist.errors import UserError
from mythos_dist.evaluate.cache import Cache
from mythos_dist.evaluate.report import to_json
from mythos_dist.evaluate.requests import (
    Prompt,
    ScoreRequest,
    TokenScores,
    num_scored,
    pack_windows,
    packed_batch,
    split_scores,
)
from mythos_dist.evaluate.scorer import evaluate_on_all_ranks
from mythos_dist.evaluate.task_set import TaskSet, load_task_set
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.progress import Bar
from mythos_dist.train.engine import Engine

PASSES = 16  # per round: each pipeline stage holds the inputs of all passes of a round


class RunTasks:
    """The tasks of one run. On ranks other than 0 it only takes part."""

    def __init__(self, config: Config):
        """Raises UserError on rank 0 for tasks that cannot be loaded or need generated text."""
        self._config = config
        self._task_set: TaskSet | None = None
        self._tokenizer: Tokenizer | None = None
        if dist.get_rank() > 0:
            return
        self._tokenizer = evaluation_tokenizer(config, Path(config.run.dir))
        self._task_set = load_task_set(config.train.tasks, config, config.train.eval_samples)
        if generating := self._task_set.generating():
            raise UserError(
                f"train.tasks: {', '.join(generating)} generates text, which runs do not; evaluate it with "
                "`mythos evaluate`, and keep tasks of log-likelihoods here"
            )

    def evaluate(self, engine: Engine, heartbeat: Callable[[], None]) -> dict[str, Any]:
        """Collective: task -> metric -> value and standard error, on rank 0; empty on the others."""
        n_loops = self._config.loops.mean_of(self._config.model)

        def run(scorer) -> dict[str, Any]:
            assert self._task_set and self._tokenizer
            scores = self._task_set.run(scorer, self._tokenizer, n_loops)
            return {
                task: {metric: by_loops[str(n_loops)] for metric, by_loops in metrics.items()}
                for task, metrics in to_json({n_loops: scores}).items()
            }

        with Bar("evaluating tasks", unit=" requests", quiet=dist.get_rank() > 0) as shown:
            return evaluate_on_all_ranks(EngineBackend(engine, heartbeat), Cache(), run, shown.show) or {}


class EngineBackend:
    """A run's engine as a `Backend`; every replica computes its rows of each pass."""

    def __init__(self, engine: Engine, heartbeat: Callable[[], None]):
        self._engine, self._heartbeat = engine, heartbeat
        self.max_length = engine.config.train.seq_len

    def plan(self, requests: Sequence[ScoreRequest]) -> Iterator[list[list[int]]]:
        """As `Backend.plan`: one batch a round, of as many windows as PASSES hold."""
        windows = pack_windows([len(request.inputs) for request in requests], self.max_length)
        size = PASSES * self._rows
        for first in range(0, len(windows), size):
            yield [[i for window in windows[first : first + size] for i in window]]

    def plan_prompts(self, prompts: Sequence[Prompt]) -> Iterator[list[list[int]]]:
        """Raises UserError."""
        raise UserError("a run does not generate text; evaluate such tasks with `mythos evaluate`")

    def generate(self, batches: Sequence[Sequence[Prompt]], n_loops: int) -> list[list[list[int]]]:
        """Never called: nothing is planned."""
        raise NotImplementedError

    def score(self, batches: Sequence[Sequence[ScoreRequest]], n_loops: int) -> list[list[TokenScores]]:
        """As `Backend.score`."""
        results = []
        for requests in batches:
            windows = pack_windows([len(request.inputs) for request in requests], self.max_length)
            total = self._engine.score_tokens(self._passes(windows, requests), num_scored(requests), n_loops)
            self._heartbeat()
            results.append(split_scores(total, requests))
        return results

    @property
    def _rows(self) -> int:
        """Windows per pass, of all replicas."""
        return self._engine.config.train.micro_batch * self._mesh.data.size

    @property
    def _mesh(self) -> Mesh:
        return self._engine.mesh

    def _passes(self, windows: list[list[int]], requests: Sequence[ScoreRequest]) -> Iterator[tuple[MicroBatch, Any]]:
        """This replica's micro-batches; all replicas have the same number, the last ones may hold padding only."""
        num_passes = -(-len(windows) // self._rows)
        batch = packed_batch(windows, requests, num_passes * self._rows, self.max_length)
        size = self._engine.config.train.micro_batch
        for i in range(num_passes):
            first = i * self._rows + self._mesh.data.rank * size
            ids, labels, documents, columns = (field[first : first + size] for field in batch)
            yield MicroBatch(ids, labels, documents, columns[:, 0]), columns
