"""Trainings of one core each, side by side: what comparisons of settings are made of.

Each is `python -m mythos_dist.train` in a process of its own, so one that was done ends at once and one that was
stopped goes on: a comparison is resumed by the same command.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import BY_MODE, Config
from mythos_dist.errors import UserError
from mythos_dist.model.flops import executed_flops
from mythos_dist.ops.plan.routing import expected_rows
from mythos_dist.parallel.mesh import SINGLE
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.train.schedule import loops_at

Found = TypeVar("Found")

# The loops of OpenMythos as shipped, but for their number: changes to any config.
AS_OPEN_MYTHOS = " ".join(
    [
        "model.mode=reference",
        *(f"model.{key}={str(value).lower()}" for key, value in BY_MODE["reference"].items()),
        "act.mode=reference",
    ]
)


class Trial(NamedTuple):
    """One training: a config file, changes to it, and the folder that it writes."""

    config: Path
    run_dir: Path
    overrides: tuple[str, ...]

    def load(self) -> Config:
        """The whole config. Raises UserError."""
        return load_config(self.config, [*self.overrides, f"run.dir={self.run_dir}"])

    def run(self) -> None:
        """Train. Raises UserError with the end of what the training said; all of that is beside `run_dir`."""
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        log = self.run_dir.with_name(self.run_dir.name + ".log")
        command = [sys.executable, "-m", "mythos_dist.train", str(self.config), f"run.dir={self.run_dir}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            ended = subprocess.run([*command, *self.overrides], stdout=file, stderr=subprocess.STDOUT, env=environment)
        if ended.returncode:
            tail = "\n".join(log.read_text().splitlines()[-5:])
            raise UserError(f"the run ended with exit code {ended.returncode}; all that it said is in {log}:\n{tail}")


def must_be_known(option: str, names: Sequence[str], there: Collection[str]) -> None:
    """Raises UserError if `option` names what is not there."""
    if unknown := [name for name in names if name not in there]:
        raise UserError(f"{option} names {unknown}; there are {list(there)}")


def must_be_positive(seeds: Collection[int], jobs: int | None) -> None:
    """Raises UserError for numbers with which nothing would be run."""
    problems = [] if seeds else [f"--seeds={len(seeds)} must be at least 1"]
    if jobs is not None and jobs < 1:
        problems.append(f"--jobs={jobs} must be at least 1")
    if problems:
        raise UserError(problems)


def run_all(
    trials: Sequence[Trial], then: Callable[[Trial], tuple[Found, str]], jobs: int | None = None
) -> list[Found]:
    """Run them, `jobs` at a time (None: one per core); of each, what `then` finds when it is done. Its words are shown.

    Raises UserError for the first that fails, when those under way have ended.
    """
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)  # of this process, whose threads look at what was trained
    for trial in trials:
        trial.load()  # a mistake in the last one is found before the first one runs
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool, tqdm(total=len(trials), unit="run", disable=None) as bar:

        def one(trial: Trial) -> Found:
            trial.run()
            found, words = then(trial)
            bar.write(words)
            bar.update()
            return found

        futures = [pool.submit(one, trial) for trial in trials]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def training_flops(config: Config) -> Iterator[float]:
    """What one process executes in step 1, 2, ... without end, with the loops that are drawn for each."""
    c, train = config.model, config.train
    rows = expected_rows(train.micro_batch * train.seq_len, c.n_experts_per_tok, c.n_experts, 1)
    known: dict[tuple[int, int], float] = {}
    for step in itertools.count(1):
        n_loops, frozen, _ = loops_at(config, step)
        if (n_loops, frozen) not in known:
            as_drawn = replace(config, loops=replace(config.loops, distribution="fixed", mean=n_loops, set=()))
            flops = executed_flops(as_drawn, SINGLE, StageSpec.full(c), range(n_loops), frozen, rows.pairs)
            known[n_loops, frozen] = flops * train.global_batch / train.micro_batch
        yield known[n_loops, frozen]


def steps_for(config: Config, budget: float) -> int:
    """The fewest steps that take so many FLOPs."""
    done = itertools.accumulate(training_flops(config))
    return next(step for step, flops in enumerate(done, 1) if flops >= budget)
