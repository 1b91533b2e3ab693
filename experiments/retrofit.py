"""Does a pretrained model gain more from loops than from further training? A Qwen3 that has learned questions of up to
2 hops (experiments.pretrain) continues with questions of up to 4 hops, as it is or as a looped model (`mythos
retrofit`), for equal FLOPs, and is evaluated on questions of 5 to 8 hops.

Both see the same stories in the same order. Each row gets its best learning rate on the first seed.
Writes summary.json, summary.md and summary.png.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from experiments.hops import BEYOND, LONG_HOPS, PEOPLE, TRAINED, TRAINED_HOPS, TRAINED_LOOPS, measure_hops
from experiments.story_task import ensure_story_task
from experiments.trials import Trial, check_counts, check_rates, mean_and_stdev, run_all, steps_for, training_flops
from mythos_dist.checkpoint.retrofit import CONFIG_FILE, Cut, PretrainedWeights, retrofit
from mythos_dist.errors import UserError
from mythos_dist.files import write_atomically
from mythos_dist.progress import Bar
from mythos_dist.train.plots import save_plot

CUT = Cut(prelude=1, first=1, last=2, coda=1)
RATES = (1e-3, 2e-3)
BASE = (
    "train.steps=1000 train.seq_len=101 train.global_batch=32 train.micro_batch=32 train.dtype=fp32 "
    "train.eval_samples=64 optim.schedule=wsd optim.warmup_steps=50 optim.decay_steps=300 "
    "optim.weight_decay=0.0 loops.telemetry_every=0 loops.curriculum=none checkpoint.every=1000000 "
    "faults.preflight=false run.report=false run.wandb=disabled"
)


class Row(NamedTuple):
    """A way to continue the training."""

    loops: int  # of `mythos retrofit`
    overrides: str
    evaluated: tuple[int, ...]  # numbers of loops
    shown: int  # of them, in the table


LOOPED, ORIGINAL = "retrofit", "original"
ROWS = {
    LOOPED: Row(
        TRAINED_LOOPS,
        "loops.distribution=uniform_set loops.mean=null loops.set=[1,2,3,4]",
        (1, 2, 3, 4, 6, 8, 12, 16),
        2 * TRAINED_LOOPS,
    ),
    ORIGINAL: Row(1, "loops.distribution=fixed loops.mean=null", (1,), 1),
}
Values = dict[str, Any]  # of one run, by number of loops


class _Study:
    def __init__(self, out: Path, jobs: int | None, overrides: Sequence[str]):
        self.out, self.jobs, self.overrides = out, jobs, overrides
        # Rows of targets within reach of the loops of a step, or the last of them only: the same stories.
        data = out / "data"
        self.data = {
            LOOPED: ensure_story_task(data / "stories", people=PEOPLE, hops=TRAINED_HOPS),
            ORIGINAL: ensure_story_task(data / "stories-final", people=PEOPLE, hops=TRAINED_HOPS, rows=1),
        }
        self.long = ensure_story_task(
            data / "stories-long", people=PEOPLE, hops=LONG_HOPS, questions=1, stories=1, heldout=1000
        )

    def pretrain(self, seeds: range) -> None:
        """Make the original model of each seed, and cut it for each row."""
        folders = [self.out / "pretrained" / f"seed-{seed}" for seed in seeds]
        with (
            ThreadPoolExecutor(self.jobs or os.cpu_count()) as pool,
            Bar("pretraining", len(seeds), unit=" models") as bar,
        ):
            for _ in pool.map(_pretrain, folders, seeds):
                bar.update(1)
        for (name, row), seed, folder in itertools.product(ROWS.items(), seeds, folders):
            if not (to := self._cut(name, seed)).exists():
                retrofit(PretrainedWeights(folder, CUT, loops=row.loops), to)

    def _cut(self, row: str, seed: int) -> Path:
        return self.out / "cut" / row / f"seed-{seed}"

    def trial(self, row: str, rate: float, seed: int) -> Trial:
        """A run. Of the looped model's FLOPs, if its number of steps is not given."""
        cut = self._cut(row, seed)
        run_dir = self.out / row / f"{rate:g}" / f"seed-{seed}"
        own = (
            f"{BASE} {ROWS[row].overrides} data.path={self.data[row]} start_from={cut} optim.lr={rate} run.seed={seed}"
        )
        return Trial(cut / CONFIG_FILE, run_dir, (*own.split(), *self.overrides))

    def run(self, cases: Sequence[tuple[str, float, int]]) -> dict[tuple[str, float, int], Values]:
        """The values of (row, rate, seed)."""
        looped = self.trial(LOOPED, *cases[0][1:]).load()
        self.flops = sum(itertools.islice(training_flops(looped), looped.train.steps))
        self.steps = {
            LOOPED: looped.train.steps,
            ORIGINAL: steps_for(self.trial(ORIGINAL, *cases[0][1:]).load(), self.flops),
        }
        trials = [self.trial(*case) for case in cases]
        trials = [
            trial._replace(overrides=(*trial.overrides, f"train.steps={self.steps[case[0]]}"))
            for trial, case in zip(trials, cases, strict=True)
        ]
        row_of = {trial.run_dir: case[0] for trial, case in zip(trials, cases, strict=True)}

        def measure(trial: Trial) -> tuple[Values, str]:
            row = ROWS[row_of[trial.run_dir]]
            by_loops = measure_hops(trial.run_dir, self.long, row.evaluated)
            one = by_loops[str(row.shown)]
            return by_loops, f"{trial.run_dir}: up to {TRAINED_HOPS} hops {one[TRAINED]:.1%}, beyond {one[BEYOND]:.1%}"

        return dict(zip(cases, run_all(trials, measure, self.jobs), strict=True))


def _pretrain(folder: Path, seed: int) -> None:
    """Raises UserError."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(folder.name + ".log")
    command = [sys.executable, "-m", "experiments.pretrain", str(folder), "--seed", str(seed)]
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1]).returncode
    if code:
        raise UserError(f"pretraining ended with exit code {code}; its output is in {log}")


def run_retrofit_study(
    out: Path, seeds: range, rates: Sequence[float], jobs: int | None, overrides: Sequence[str]
) -> None:
    """Pretrain, continue and write the results, `jobs` runs at a time. Raises UserError."""
    from mythos_dist.train.sweep import write_json

    check_counts(seeds, jobs)
    check_rates(rates)
    study, first = _Study(out, jobs, overrides), seeds[0]
    study.pretrain(seeds)
    done = study.run([(row, rate, first) for row in ROWS for rate in rates])

    def accuracy(row: str, rate: float) -> float:
        return done[row, rate, first][str(ROWS[row].shown)][TRAINED]

    best = {row: max(rates, key=lambda rate, row=row: accuracy(row, rate)) for row in ROWS}
    done |= study.run([(row, best[row], seed) for seed in seeds for row in ROWS])
    summary = {
        "flops": study.flops,
        "rows": {
            row: {
                "steps": study.steps[row],
                "rate": best[row],
                "by_rate": {f"{rate:g}": accuracy(row, rate) for rate in rates},
                "seeds": {str(seed): done[row, best[row], seed] for seed in seeds},
            }
            for row in ROWS
        },
    }
    summary |= worst_differences(summary["rows"])
    write_json(out / "summary.json", summary)
    text = "\n".join(table(summary))
    write_atomically(out / "summary.md", text + "\n")
    draw(out / "summary.png", summary)
    print(f"\n{text}\n\n{out / 'summary.json'}, {out / 'summary.md'}, {out / 'summary.png'}")


def worst_differences(rows: dict[str, Any]) -> dict[str, float]:
    """The least gain in accuracy of the retrofit over the original, of all seeds, by kind of question."""

    def least(kind: str) -> float:
        seeds = rows[LOOPED]["seeds"]
        return min(_value(rows, LOOPED, seed, kind) - _value(rows, ORIGINAL, seed, kind) for seed in seeds)

    return {f"least_gain_of_{kind}": least(kind) for kind in (TRAINED, BEYOND)}


def _value(rows: dict[str, Any], row: str, seed: str, kind: str) -> float:
    return rows[row]["seeds"][seed][str(ROWS[row].shown if kind == BEYOND else ROWS[row].loops)][kind]


def table(summary: dict[str, Any]) -> list[str]:
    """A Markdown table of accuracy: at trained hops with the trained loops, and beyond with twice the loops."""
    rows = summary["rows"]
    lines = [f"| | steps | rate | 1 to {TRAINED_HOPS} hops, as trained | {TRAINED_HOPS + 1} to {LONG_HOPS} hops |"]
    lines.append("|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        values = [[_value(rows, name, seed, kind) for seed in row["seeds"]] for kind in (TRAINED, BEYOND)]
        cells = [f"{100 * mean:.1f} ± {100 * stdev:.1f} %" for mean, stdev in map(mean_and_stdev, values)]
        loops = f"{ROWS[name].loops} loops, beyond {ROWS[name].shown}" if name == LOOPED else "no loops"
        lines.append(f"| {name}, {loops} | {row['steps']:,} | {row['rate']:g} | " + " | ".join(cells) + " |")
    return lines


def draw(file: Path, summary: dict[str, Any]) -> None:
    """Accuracy over hops of the original, and of the retrofit by number of loops; means and single seeds."""
    from matplotlib.ticker import PercentFormatter

    hops = range(1, LONG_HOPS + 1)
    curves = [(ORIGINAL, 1), *((LOOPED, n) for n in (1, 2, 4, 8))]
    with save_plot(file, 1, (7, 4.6)) as (panel,):
        for i, (row, n) in enumerate(curves):
            seeds = [[one[str(n)]["hops"][str(k)] for k in hops] for one in summary["rows"][row]["seeds"].values()]
            color = "black" if row == ORIGINAL else f"C{i - 1}"
            label = "original" if row == ORIGINAL else f"retrofit, {n} loop{'s' * (n > 1)}"
            panel.plot(
                hops, [sum(column) / len(column) for column in zip(*seeds, strict=True)], color=color, label=label
            )
            for seed in seeds:
                panel.plot(hops, seed, color=color, alpha=0.25, linewidth=1)
        panel.axvline(TRAINED_HOPS, color="grey", linestyle=":")
        panel.set_ylim(0, 1.02)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_xlabel("hops (dotted: most in training)")
        panel.set_title("accuracy after equal FLOPs")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
