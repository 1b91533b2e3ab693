"""Do more loops help at inference? Small models learn to multiply 8 permutations in at most 8 loops, and are evaluated
on 9 to 16 permutations with more loops.

Three settings: a target for each loop; the final target only, with the sequence growing as the loops do (curriculum);
and the loops of OpenMythos as shipped. Writes summary.json (accuracy by setting, seed, hops and loops) and summary.png.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.depth_task import Targets, ensure_depth_task
from experiments.trials import AS_OPEN_MYTHOS, ByLoops, Trial, check_counts, check_names, run_all
from mythos_dist.train.plots import loops_axis, save_plot, share_axis
from mythos_dist.units import count

TRAINED_HOPS, LONG_HOPS, MAX_TRAINED_LOOPS = 8, 16, 8
LOOPS = (2, 4, 8, 12, 16, 24, 32)  # of the evaluation


class Setting(NamedTuple):
    """The targets of the data (experiments.depth_task), and overrides of the config."""

    targets: Targets
    overrides: str


SETTINGS = {
    "per-loop targets": Setting(
        "per_loop",  # a step uses the target of its last loop
        "loops.distribution=uniform_set loops.set=[1,2,3,4,5,6,7,8] loops.mean=null loops.curriculum=none "
        "train.global_batch=32 train.micro_batch=32 train.steps=2200",
    ),
    "final target": Setting("reached", ""),
    "reference": Setting("final", f"{AS_OPEN_MYTHOS} loops.curriculum=none"),
}


def run_depth_study(
    config: Path, out: Path, settings: Sequence[str], seeds: range, jobs: int | None, overrides: Sequence[str]
) -> None:
    """Train all runs of the file `config`, `jobs` at a time; write summary.json and summary.png. Raises UserError."""
    from mythos_dist.train.sweep import write_json

    check_names("--settings", settings, SETTINGS)
    check_counts(seeds, jobs)
    data = {name: out / "data" / f"s3-{TRAINED_HOPS}-{SETTINGS[name].targets}" for name in settings}
    trials = {}
    for seed, name in itertools.product(seeds, settings):
        run_dir = out / name.replace(" ", "-") / f"seed-{seed}"
        own = [*SETTINGS[name].overrides.split(), f"data.path={data[name]}", f"run.seed={seed}"]
        trials[name, seed] = Trial(config, run_dir, (*own, *overrides))
    for trial in trials.values():
        trial.load()  # find errors before the data is made
    for name, folder in data.items():
        ensure_depth_task(folder, hops=TRAINED_HOPS, sequences=100_000, targets=SETTINGS[name].targets)
    long = ensure_depth_task(out / "data" / f"s3-{LONG_HOPS}", hops=LONG_HOPS, sequences=1, heldout=1000)

    def measure(case: tuple[str, int], trial: Trial) -> tuple[ByLoops, str]:
        by_loops = measure_accuracy(trial.run_dir, long)
        accuracy = "  ".join(f"{n}: {by_loops[str(n)]['mean']:.0%}" for n in (8, 16, 32))
        return by_loops, f"{trial.run_dir}: accuracy at {TRAINED_HOPS + 1} to {LONG_HOPS} hops by loops  {accuracy}"

    summary = _summarize(settings, seeds, run_all(trials, measure, jobs))
    write_json(out / "summary.json", summary)
    draw(out / "summary.png", summary)
    seeds_text = count(len(seeds), "seed")
    print(f"\naccuracy at {TRAINED_HOPS + 1} to {LONG_HOPS} hops, mean over {seeds_text} (chance 17 %)")
    print(f"{'loops':24s}" + "".join(f"{n:7d}" for n in LOOPS))
    for name, result in summary["settings"].items():
        print(f"{name:24s}" + "".join(f"{result['mean'][str(n)]:7.1%}" for n in LOOPS))
    print(f"{out / 'summary.json'}, {out / 'summary.png'}")


def _summarize(settings: Sequence[str], seeds: range, results: dict[tuple[str, int], ByLoops]) -> dict[str, Any]:
    """The content of summary.json."""
    summary: dict[str, Any] = {
        "task": "prefix products in S3, trained on 8 hops with at most 8 loops",
        "chance": 1 / 6,
        "settings": {},
    }
    for name in settings:
        summary["settings"][name] = {
            **SETTINGS[name]._asdict(),
            "seeds": {str(seed): results[name, seed] for seed in seeds},
            "mean": {str(n): statistics.mean(results[name, seed][str(n)]["mean"] for seed in seeds) for n in LOOPS},
        }
    return summary


def measure_accuracy(run_dir: Path, shards: Path) -> ByLoops:
    """By number of loops: accuracy at each number of hops, and the mean over more hops than in training."""
    from mythos_dist.train.sweep import sweep

    by_position = sweep(run_dir, LOOPS, data=shards, samples=1000, batch=250).by_position
    return {
        str(n): {
            "mean": statistics.mean(accuracy[TRAINED_HOPS + 1 : LONG_HOPS + 1]),
            "hops": {str(i): accuracy[i] for i in range(1, LONG_HOPS + 1)},
        }
        for n, accuracy in by_position.items()
    }


def draw(file: Path, summary: dict[str, Any]) -> None:
    """Accuracy over loops for each setting and seed, and over hops for the first setting."""
    with save_plot(file, 2, (12, 4.6)) as (left, right):
        for i, (name, result) in enumerate(summary["settings"].items()):
            for seed in result["seeds"].values():
                left.plot(LOOPS, [seed[str(n)]["mean"] for n in LOOPS], color=f"C{i}", alpha=0.3, linewidth=1)
            left.plot(LOOPS, [result["mean"][str(n)] for n in LOOPS], color=f"C{i}", marker="o", label=name)
        left.axvline(MAX_TRAINED_LOOPS, color="grey", linestyle=":", label="most loops in training")
        loops_axis(left, LOOPS)
        left.set_title(f"accuracy at {TRAINED_HOPS + 1} to {LONG_HOPS} hops (trained on {TRAINED_HOPS})")
        left.axhline(summary["chance"], color="black", linewidth=0.5, label="chance")
        left.legend()
        name, result = next(iter(summary["settings"].items()))
        hops = range(1, LONG_HOPS + 1)
        for n in LOOPS:
            seeds = [seed[str(n)]["hops"] for seed in result["seeds"].values()]
            right.plot(hops, [statistics.mean(one[str(i)] for one in seeds) for i in hops], label=str(n))
        right.axvline(TRAINED_HOPS, color="grey", linestyle=":")
        right.set_xlabel("hops")
        right.set_title(f"{name}: accuracy by hops, mean over seeds")
        right.legend(title="loops")
        right.axhline(summary["chance"], color="black", linewidth=0.5)
        for panel in (left, right):
            share_axis(panel)
