"""AdamW against Muon, schedules, and averages of the weights, at equal FLOPs on the demo's text.

First one seed per learning rate, with the cosine schedule: each optimizer then gets its best rate. Writes
optimizers.json and optimizers.md, the tables in docs/recipes.md.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.trials import (
    SAMPLE,
    Trial,
    check_counts,
    check_rates,
    check_sample,
    mean_and_stdev,
    run_all,
    steps_for,
    total_flops,
)
from mythos_dist.files import read_json_lines, write_atomically

STEPS = 400  # of AdamW; Muon gets as many FLOPs, its own included
BASE = (
    f"data.path={SAMPLE} train.global_batch=8 train.micro_batch=8 train.eval_samples=64 optim.warmup_steps=40 "
    "checkpoint.every=1000000 loops.telemetry_every=0 average.kind=mean average.every=4 average.last=10 "
    "average.evaluate=true"
).split()
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = {
    "cosine": "optim.schedule=cosine",
    "wsd": "optim.schedule=wsd optim.decay=1-sqrt optim.decay_steps={fifth}",
    "constant": "optim.schedule=constant",
}
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


class HeldOutLosses(NamedTuple):
    """Held-out losses in nats after the last step."""

    weights: float
    average: float  # of the mean of the last ten snapshots of the weights, one in four steps


class Study:
    """Trials in a folder that differ in optimizer, schedule, learning rate and seed."""

    def __init__(self, config: Path, out: Path, jobs: int | None, overrides: Sequence[str]):
        self.config, self.out, self.jobs = config, out, jobs
        self.overrides = (*BASE, f"train.steps={STEPS}", *overrides)
        self.flops = total_flops(self.trial("adamw", "cosine", RATES[0], 0).load())
        self.steps = {
            optimizer: steps_for(self.trial(optimizer, "cosine", RATES[0], 0).load(), self.flops)
            for optimizer in OPTIMIZERS
        }

    def trial(self, optimizer: str, schedule: str, rate: float, seed: int, steps: int | None = None) -> Trial:
        """`steps`: None for as many as AdamW's."""
        folder = self.out / optimizer / f"{schedule}-{rate:g}" / f"seed-{seed}"
        settings = [f"optim.name={optimizer}", f"optim.lr={rate}", f"run.seed={seed}"]
        if steps is not None:
            settings += [f"train.steps={steps}", *SCHEDULES[schedule].format(fifth=max(1, steps // 5)).split()]
        return Trial(self.config, folder, (*self.overrides, *settings))

    def run(self, cases: Sequence[tuple[str, str, float, int]]) -> dict[tuple[str, str, float, int], HeldOutLosses]:
        """The losses of (optimizer, schedule, rate, seed)."""
        trials = {case: self.trial(*case, steps=self.steps[case[0]]) for case in cases}
        return {case: HeldOutLosses(*losses) for case, losses in run_all(trials, measure, self.jobs).items()}


def measure(case: Any, trial: Trial) -> tuple[HeldOutLosses, str]:
    """The last evaluation of a run, and a line about it."""
    line = read_json_lines(trial.run_dir / "eval.jsonl")[-1]
    losses = HeldOutLosses(line["heldout_loss"], line["heldout_loss_average"])
    return losses, f"{trial.run_dir}: held-out loss {losses.weights:.3f}, of the average {losses.average:.3f}"


def run_study(
    config: Path, out: Path, seeds: range, rates: Sequence[float], jobs: int | None, overrides: Sequence[str]
) -> None:
    """Train all runs, `jobs` at a time, and write the results. Raises UserError."""
    from mythos_dist.train.sweep import write_json

    check_counts(seeds, jobs)
    check_rates(rates)
    check_sample()
    study = Study(config, out, jobs, overrides)
    tried = study.run([(optimizer, "cosine", rate, seeds[0]) for optimizer in OPTIMIZERS for rate in rates])
    best = {
        name: min(rates, key=lambda rate, name=name: tried[name, "cosine", rate, seeds[0]].weights)
        for name in OPTIMIZERS
    }
    groups = list(itertools.product(OPTIMIZERS, SCHEDULES))
    done = study.run([(name, schedule, best[name], seed) for seed in seeds for name, schedule in groups])
    summary: dict[str, Any] = {
        "flops": study.flops,
        "steps": study.steps,
        "rates": {name: {f"{r:g}": tried[name, "cosine", r, seeds[0]].weights for r in rates} for name in OPTIMIZERS},
        "best_rates": best,
        "losses": {
            f"{name}, {schedule}": [done[name, schedule, best[name], seed]._asdict() for seed in seeds]
            for name, schedule in groups
        },
    }
    write_json(out / "optimizers.json", summary)
    text = "\n".join(tables(summary))
    write_atomically(out / "optimizers.md", text + "\n")
    print(text)
    print(f"{out / 'optimizers.json'}, {out / 'optimizers.md'}")


def tables(summary: dict[str, Any]) -> list[str]:
    """Markdown: the losses by learning rate, and those of all combinations with mean and standard deviation."""
    rates = list(summary["rates"][OPTIMIZERS[0]])
    lines = [
        "| held-out loss, nats, at a learning rate of | " + " | ".join(rates) + " |",
        "|---|" + "--:|" * len(rates),
    ]
    for name, losses in summary["rates"].items():
        lines.append(
            f"| {name}, {summary['steps'][name]} steps | " + " | ".join(f"{x:.3f}" for x in losses.values()) + " |"
        )
    lines += [
        "",
        "| held-out loss, nats | learning rate | weights | average of the last 40 steps |",
        "|---|--:|--:|--:|",
    ]
    for name, seeds in summary["losses"].items():
        rate = summary["best_rates"][name.partition(",")[0]]
        values = [_mean_and_spread([seed[key] for seed in seeds]) for key in HeldOutLosses._fields]
        lines.append(f"| {name} | {rate:g} | " + " | ".join(values) + " |")
    return lines


def _mean_and_spread(values: Sequence[float]) -> str:
    mean, stdev = mean_and_stdev(values)
    return f"{mean:.3f} ± {stdev:.3f}" if len(values) > 1 else f"{mean:.3f}"
