"""Calls from the training loop to code outside the core; `ops/hooks.py` implements them. These do nothing."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos_dist.train.engine import Engine


class Hooks:
    """Every rank calls the same hooks in the same order, so hooks may hold collectives, except `check_config` and
    `end_run`."""

    def check_config(self) -> None:
        """Before anything is written. Raises UserError on any rank; no collectives."""

    def begin_run(self, start: int) -> None:
        """The run folder is claimed. `start` counts the starts of the run, from 1."""

    def before_step(self, step: int, profile: bool) -> None:
        """Before the step's batch is read. profile: a profile was requested (stop.py)."""

    def during_step(self, step: int, batch: int, engine: "Engine") -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward passes of a step on batch number `batch` (from 0)."""
        return contextlib.nullcontext()

    def evaluate_tasks(self, engine: "Engine", heartbeat: Callable[[], None]) -> dict[str, Any]:
        """The results of `train.tasks` for eval.jsonl, on rank 0; training must not change.

        heartbeat: to be called while it makes progress.
        """
        return {}

    def after_step(self, seconds: float, is_last: bool) -> tuple[dict[str, Any], str]:
        """Entries for the step's line in metrics.jsonl, and a line for the console; both may be empty."""
        return {}, ""

    def end_steps(self) -> str:
        """No step follows in this start, or in this stage. Returns a line for the console, which may be empty."""
        return ""

    def end_run(self) -> None:
        """The run is done, and its folder is complete; no collectives: other ranks may have left."""
