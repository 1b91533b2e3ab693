"""Run many trainings in parallel, one core each, to compare settings.

Each is `mythos train` in its own process, so a finished one ends at once and an interrupted one resumes:
the same command resumes a study.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mythos_dist.config.arguments import add_overrides
from mythos_dist.config.dump import dump_stages
from mythos_dist.config.load import load_config, load_stages
from mythos_dist.config.schema import BY_MODE, Config
from mythos_dist.errors import UserError
from mythos_dist.files import write_atomically
from mythos_dist.parallel.mesh import SINGLE
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.progress import Bar, log
from mythos_dist.train.schedule import loops_at

Result = TypeVar("Result")
Case = TypeVar("Case")
ByLoops = dict[str, dict[str, Any]]  # by number of loops: the accuracy by hops, and the means
RatedCase = tuple[str, float, int]  # row, learning rate, seed

# Overrides that give any config the loops of OpenMythos as shipped, except for their number.
_REFERENCE_MODEL = [f"model.{key}={str(value).lower()}" for key, value in BY_MODE["reference"].items()]
AS_OPEN_MYTHOS = " ".join(["model.mode=reference", *_REFERENCE_MODEL, "act.mode=reference"])


SAMPLE = Path("data/sample")  # shards of the demo's text


class Trial(NamedTuple):
    """One training run: a config file, its overrides and its run folder."""

    config: Path
    run_dir: Path
    overrides: tuple[str, ...]

    def load(self) -> Config:
        """The complete config. Raises UserError."""
        return load_config(self.config, [*self.overrides, f"run.dir={self.run_dir}"])

    def settings(self) -> str:
        """All settings, of every stage, as YAML. Raises UserError."""
        return dump_stages(load_stages(self.config, [*self.overrides, f"run.dir={self.run_dir}"]))

    def run(self, exit_codes: Collection[int] = ()) -> None:
        """Train. Raises UserError with the end of the output if it fails, but for `exit_codes`; all of the output is in
        `run_dir`.log."""
        command = [sys.executable, "-m", "mythos_dist.train", str(self.config), f"run.dir={self.run_dir}"]
        run_logged([*command, *self.overrides], self.run_dir, exit_codes, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_logged(command: Sequence[str], folder: Path, exit_codes: Collection[int] = (), **options: Any) -> None:
    """Run a command that writes to `folder`, with all of its output in `folder`.log. options: of subprocess.run.

    Raises UserError with the end of the output if it fails, but for `exit_codes`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(folder.name + ".log")
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **options).returncode
    if code and code not in exit_codes:
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise UserError(f"the run ended with exit code {code}; its output is in {log}:\n{tail}")


def check_names(option: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raises UserError if a value of `option` is not known."""
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} names {unknown}; choose from {list(known)}")


def add_study_options(parser: argparse.ArgumentParser, out: str, seeds_of: str, seeds: int = 3) -> None:
    """The options of every study. seeds_of: what each seed is of."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help="output folder (%(default)s)")
    add("--seeds", type=int, default=seeds, help=f"seeds per {seeds_of} (%(default)s)")
    add("--jobs", type=int, help="runs in parallel, one core each (default: number of cores)")
    add_overrides(parser, "config overrides for every run, such as train.steps=50")


def add_rates(parser: argparse.ArgumentParser, default: Sequence[float], what: str) -> None:
    """The option `--rates`, a list of numbers. what: they are."""
    shown = ",".join(f"{rate:g}" for rate in default)
    parser.add_argument("--rates", type=_rates, default=list(default), help=f"{what} ({shown})")


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def check_rates(rates: Sequence[float]) -> None:
    """Raises UserError for learning rates that nothing learns with."""
    if not rates or min(rates) <= 0:
        raise UserError(f"--rates={','.join(map(str, rates))}: give numbers above 0")


def check_counts(seeds: Collection[int], jobs: int | None) -> None:
    """Raises UserError if nothing would be run."""
    problems = [] if seeds else [f"--seeds={len(seeds)} must be at least 1"]
    if jobs is not None and jobs < 1:
        problems.append(f"--jobs={jobs} must be at least 1")
    if problems:
        raise UserError(problems)


def check_sample() -> None:
    """Raises UserError if the demo's text is not there."""
    if not SAMPLE.exists():
        raise UserError(f"{SAMPLE} does not exist; make it with `mythos sample-data`")


def mean_and_stdev(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; of one seed 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def run_all(
    trials: Mapping[Case, Trial],
    measure: Callable[[Case, Trial], tuple[Any, str]],
    jobs: int | None = None,
    exit_codes: Collection[int] = (),
) -> dict[Case, Any]:
    """Run trials, `jobs` at a time (None: one per core). Returns the results of `measure`, as JSON has them.

    measure: called after each run, returns (result, line to print). Both are kept beside the folder of the run: a study
    that is started again neither trains nor measures again, unless the settings of the run have changed.
    exit_codes: of trials that ended early and are measured like others.
    Raises UserError for the first trial that fails, after running ones end.
    """
    import torch

    torch.set_num_threads(1)  # `measure` runs in several threads of this process
    settings = {case: trial.settings() for case, trial in trials.items()}  # find an error in the last before the first
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool, Bar("training", len(trials), unit=" runs") as shown:

        def run_one(case: Case, trial: Trial) -> Any:
            file = trial.run_dir.with_name(f"{trial.run_dir.name}.result.json")
            kept = json.loads(file.read_text()) if file.exists() else {}
            if kept.get("settings") != settings[case]:
                trial.run(exit_codes)
                result, line = measure(case, trial)
                text = json.dumps({"settings": settings[case], "result": result, "line": line})
                write_atomically(file, text + "\n")
                kept = json.loads(text)
            log(kept["line"], sys.stdout)
            shown.update(1)
            return kept["result"]

        futures = {case: pool.submit(run_one, case, trial) for case, trial in trials.items()}
        try:
            return {case: future.result() for case, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_at_best_rates(
    rows: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    run: Callable[[Sequence[RatedCase]], dict[RatedCase, Result]],
    score: Callable[[str, Result], float],
) -> tuple[dict[str, float], dict[RatedCase, Result]]:
    """Run the first seed of each row at each rate, and the other seeds at the rate with the row's highest score.

    Returns that rate of each row, and all results.
    """
    first, *others = seeds
    done = run([(row, rate, first) for row in rows for rate in rates])
    best = {row: max(rates, key=lambda rate, row=row: score(row, done[row, rate, first])) for row in rows}
    return best, done | run([(row, best[row], seed) for seed in others for row in rows])


def total_flops(config: Config) -> float:
    """The FLOPs of one process in all steps of a run."""
    return sum(itertools.islice(training_flops(config), config.train.steps))


def training_flops(config: Config) -> Iterator[float]:
    """The FLOPs of one process in step 1, 2, …, without end, with the number of loops that is drawn for each step, and
    those of Muon."""
    from mythos_dist.model.flops import executed_flops  # it imports torch, and --help does not need that
    from mythos_dist.ops.plan.chunks import expected_rows
    from mythos_dist.ops.plan.muon import muon_flops

    model, train = config.model, config.train
    rows = expected_rows(train.micro_batch * train.seq_len, model.n_experts_per_tok, model.n_experts, 1)
    of_optimizer = muon_flops(config, SINGLE, StageSpec.full(model))
    known: dict[tuple[int, int], float] = {}
    for step in itertools.count(1):
        n_loops, no_grad_loops, _ = loops_at(config, step)
        if (n_loops, no_grad_loops) not in known:
            fixed = replace(config, loops=replace(config.loops, distribution="fixed", mean=n_loops, set=()))
            flops = executed_flops(fixed, SINGLE, StageSpec.full(model), range(n_loops), no_grad_loops, rows.pairs)
            known[n_loops, no_grad_loops] = flops / train.micro_batch
        yield known[n_loops, no_grad_loops] * train.batch_size_at(step) + of_optimizer


def steps_for(config: Config, budget: float) -> int:
    """The smallest number of steps that needs at least `budget` FLOPs."""
    totals = itertools.accumulate(training_flops(config))
    return next(step for step, total in enumerate(totals, 1) if total >= budget)
