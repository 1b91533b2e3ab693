"""Does a pretrained model gain more from loops than from further training? A Qwen3 that has learned questions of up to
2 hops (experiments.pretrain) continues with questions of up to 4 hops, as it is or as a looped model (`mythos
retrofit`), for equal FLOPs, and is evaluated on questions of 5 to 8 hops.

Both see the same stories in the same order. Each row gets its best learning rate on the first seed.
Writes summary.json, summary.md and summary.png.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from experiments.hops import BEYOND, LONG_HOPS, PEOPLE, TRAINED, TRAINED_HOPS, TRAINED_LOOPS, measure_hops
from experiments.story_task import ensure_story_task
from experiments.trials import (
    ByLoops,
    RatedCase,
    Trial,
    check_counts,
    check_rates,
    mean_and_stdev,
    run_all,
    run_at_best_rates,
    run_logged,
    steps_for,
    total_flops,
)
from mythos_dist.files import write_atomically
from mythos_dist.progress import Bar
from mythos_dist.train.plots import save_plot, share_axis

CUT = (1, 1, 2, 1)  # layers of the prelude, first and last of the block, of the coda
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


class _Study:
    """Both rows of all seeds, from pretrained models that are made first."""

    def __init__(self, out: Path, seeds: range, jobs: int | None, overrides: Sequence[str]):
        """Raises UserError."""
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
        pretrain_all({seed: out / "pretrained" / f"seed-{seed}" for seed in seeds}, jobs)
        for seed in seeds:
            cut_pretrained(out / "pretrained" / f"seed-{seed}", {row: self._cut(row, seed) for row in ROWS})
        looped, original = (self.trial(row, RATES[0], seeds[0]).load() for row in (LOOPED, ORIGINAL))
        self.flops = total_flops(looped)
        self.steps = {LOOPED: looped.train.steps, ORIGINAL: steps_for(original, self.flops)}

    def _cut(self, row: str, seed: int) -> Path:
        return self.out / "cut" / row / f"seed-{seed}"

    def trial(self, row: str, rate: float, seed: int, *last: str) -> Trial:
        """A run, for the looped model's number of steps unless `last` has another."""
        from mythos_dist.checkpoint.retrofit import CONFIG_FILE

        cut = self._cut(row, seed)
        run_dir = self.out / row / f"{rate:g}" / f"seed-{seed}"
        own = (
            f"{BASE} {ROWS[row].overrides} data.path={self.data[row]} start_from={cut} optim.lr={rate} run.seed={seed}"
        )
        return Trial(cut / CONFIG_FILE, run_dir, (*own.split(), *self.overrides, *last))

    def run(self, cases: Sequence[RatedCase]) -> dict[RatedCase, ByLoops]:
        """The accuracies of runs, by number of loops."""

        def measure(case: RatedCase, trial: Trial) -> tuple[ByLoops, str]:
            row = case[0]
            by_loops = measure_hops(trial.run_dir, self.long, ROWS[row].evaluated)
            trained, beyond = (accuracy(row, by_loops, kind) for kind in (TRAINED, BEYOND))
            return by_loops, f"{trial.run_dir}: up to {TRAINED_HOPS} hops {trained:.1%}, beyond {beyond:.1%}"

        trials = {case: self.trial(*case, f"train.steps={self.steps[case[0]]}") for case in cases}
        return run_all(trials, measure, self.jobs)


def pretrain_all(folders: Mapping[int, Path], jobs: int | None) -> None:
    """Pretrain the models of seeds that have no folder yet. Raises UserError."""

    def pretrain(seed: int) -> None:
        command = [sys.executable, "-m", "experiments.pretrain", str(folders[seed]), "--seed", str(seed)]
        run_logged(command, folders[seed], cwd=Path(__file__).parents[1])

    missing = [seed for seed, folder in folders.items() if not folder.exists()]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool, Bar("pretraining", len(missing), unit=" models") as shown:
        for _ in pool.map(pretrain, missing):
            shown.update(1)


def cut_pretrained(folder: Path, cuts: Mapping[str, Path]) -> None:
    """Cut a pretrained model for each row, to the folder that `cuts` has for it; one that exists is kept."""
    from mythos_dist.checkpoint.retrofit import Cut, PretrainedWeights, retrofit

    for row, to in cuts.items():
        if not to.exists():
            retrofit(PretrainedWeights(folder, Cut(*CUT), loops=ROWS[row].loops), to)


def accuracy(row: str, by_loops: ByLoops, kind: str) -> float:
    """With the trained loops for trained hops, and with twice as many, if the row has loops, for those beyond."""
    return by_loops[str(ROWS[row].shown if kind == BEYOND else ROWS[row].loops)][kind]


def run_retrofit_study(
    out: Path, seeds: range, rates: Sequence[float], jobs: int | None, overrides: Sequence[str]
) -> None:
    """Pretrain, continue and write the results, `jobs` runs at a time. Raises UserError."""
    from mythos_dist.train.sweep import write_json

    check_counts(seeds, jobs)
    check_rates(rates)
    study, rows = _Study(out, seeds, jobs, overrides), list(ROWS)
    best, done = run_at_best_rates(
        rows, rates, seeds, study.run, lambda row, by_loops: accuracy(row, by_loops, TRAINED)
    )
    summary = {
        "flops": study.flops,
        "rows": {
            row: {
                "steps": study.steps[row],
                "rate": best[row],
                "by_rate": {f"{rate:g}": accuracy(row, done[row, rate, seeds[0]], TRAINED) for rate in rates},
                "seeds": {str(seed): done[row, best[row], seed] for seed in seeds},
            }
            for row in rows
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
        return min(
            accuracy(LOOPED, seeds[seed], kind) - accuracy(ORIGINAL, rows[ORIGINAL]["seeds"][seed], kind)
            for seed in seeds
        )

    return {f"least_gain_of_{kind}": least(kind) for kind in (TRAINED, BEYOND)}


def table(summary: dict[str, Any]) -> list[str]:
    """A Markdown table of accuracy: at trained hops with the trained loops, and beyond with twice the loops."""
    rows = summary["rows"]
    lines = [f"| | steps | rate | 1 to {TRAINED_HOPS} hops, as trained | {TRAINED_HOPS + 1} to {LONG_HOPS} hops |"]
    lines.append("|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        values = [[accuracy(name, seed, kind) for seed in row["seeds"].values()] for kind in (TRAINED, BEYOND)]
        cells = [f"{100 * mean:.1f} ± {100 * stdev:.1f} %" for mean, stdev in map(mean_and_stdev, values)]
        loops = f"{ROWS[name].loops} loops, beyond {ROWS[name].shown}" if name == LOOPED else "no loops"
        lines.append(f"| {name}, {loops} | {row['steps']:,} | {row['rate']:g} | " + " | ".join(cells) + " |")
    return lines


def draw(file: Path, summary: dict[str, Any]) -> None:
    """Accuracy over hops of the original, and of the retrofit by number of loops; means and single seeds."""
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
        share_axis(panel)
        panel.set_xlabel("hops (dotted: most in training)")
        panel.set_title("accuracy after equal FLOPs")
        panel.legend(fontsize=8)
