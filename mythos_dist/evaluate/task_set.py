"""The tasks of an evaluation, built-in ones and those of lm-evaluation-harness, loaded on rank 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_dist.config.schema import Config
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.evaluate import perplexity
from mythos_dist.evaluate.report import Score
from mythos_dist.evaluate.scorer import Scorer
from mythos_dist.train.sweep import open_sequences, read_sequences

if TYPE_CHECKING:  # lm_eval takes seconds to import, and the built-in tasks do not need it
    from mythos_dist.evaluate.tasks import Tasks


@dataclass
class TaskSet:
    """Tasks with their data."""

    builtin: list[str]
    sequences: perplexity.HeldOutSequences | None  # of the built-in tasks
    tasks: "Tasks | None"  # of lm_eval

    def generating(self) -> list[str]:
        """Names of the tasks that need generated text."""
        return self.tasks.generating() if self.tasks else []

    def run(self, scorer: Scorer, tokenizer: Tokenizer, n_loops: int, limit: int | None = None) -> list[Score]:
        """All scores at one number of loops. limit: the most documents of a task of lm_eval; None: all."""
        scores = []
        if self.sequences:
            for name in self.builtin:
                scores += perplexity.evaluate_perplexity(name, self.sequences, scorer, n_loops)
        if self.tasks:
            from mythos_dist.evaluate.tasks import evaluate_tasks

            scores += evaluate_tasks(self.tasks, scorer, tokenizer, n_loops, limit)
        return scores


def load_task_set(names: Sequence[str], config: Config, samples: int, data: Path | None = None) -> TaskSet:
    """Load tasks by name or file. samples: held-out sequences of the built-in tasks, from the run's shards or `data`.

    Raises UserError for tasks and data that cannot be loaded.
    """
    builtin = [name for name in names if name in perplexity.TASKS]
    others = [name for name in names if name not in perplexity.TASKS]
    sequences = tasks = None
    if builtin:
        stream, _ = open_sequences(config, data, 1)
        batches = list(read_sequences(stream, min(samples, stream.num_samples), 1))
        sequences = perplexity.HeldOutSequences(batches, stream.eos_id, config.data.document_mask)
    if others:
        require_harness()
        from mythos_dist.evaluate.tasks import load_tasks

        tasks = load_tasks(others)
    return TaskSet(builtin, sequences, tasks)


def task_names() -> list[str]:
    """All names: the built-in tasks, then those that lm_eval ships. Raises UserError without lm_eval."""
    require_harness()
    from mythos_dist.evaluate.tasks import names

    return [*perplexity.TASKS, *names()]


def require_harness() -> None:
    """Raises UserError if lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("tasks need lm-evaluation-harness: pip install 'mythos_dist[eval]'")
