"""Does thinking longer help? Small models learn to multiply 8 permutations in at most 8 loops, and are asked for 9 to
16 with more loops.

Three settings: targets for each loop; the final target only, of more elements as the loops become more; and the loops
of OpenMythos as shipped. Writes summary.json (accuracy by setting, seed, hops and loops) and summary.png.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.depth_task import Targets, have_depth_task
from experiments.trials import AS_OPEN_MYTHOS, Trial, must_be_known, must_be_positive, run_all
from mythos_dist.train.pictures import loops_axis, picture
from mythos_dist.units import count


class Setting(NamedTuple):
    """Which targets the data has (experiments.depth_task), and what is not as in the config."""

    targets: Targets
    overrides: str


SETTINGS = {
    "per-loop targets": Setting(
        "per_loop",  # of which a step sees the one of its last loop
        "loops.distribution=uniform_set loops.set=[1,2,3,4,5,6,7,8] loops.mean=null loops.curriculum=none "
        "train.global_batch=32 train.micro_batch=32 train.steps=2200",
    ),
    "final target": Setting("reached", ""),
    "reference": Setting("final", f"{AS_OPEN_MYTHOS} loops.curriculum=none"),
}
TRAINED, LOOPS, SHORT, LONG = 8, (2, 4, 8, 12, 16, 24, 32), 8, 16  # LOOPS of the sweep; hops in training and behind it


def demonstrate(
    config: Path, out: Path, settings: Sequence[str], seeds: range, jobs: int | None, overrides: Sequence[str]
) -> None:
    """All runs of the file `config`, `jobs` at a time, then summary.json and summary.png in `out`. Raises UserError."""
    from mythos_dist.train.sweep import write_json

    must_be_known("--settings", settings, SETTINGS)
    must_be_positive(seeds, jobs)
    data = {name: out / "data" / f"s3-{SHORT}-{SETTINGS[name].targets}" for name in settings}
    cases = [(name, seed) for seed in seeds for name in settings]
    trials = [
        Trial(
            config,
            out / name.replace(" ", "-") / f"seed-{seed}",
            (*SETTINGS[name].overrides.split(), f"data.path={data[name]}", f"run.seed={seed}", *overrides),
        )
        for name, seed in cases
    ]
    for trial in trials:
        trial.load()  # a mistake is found before the data is made
    for name, folder in data.items():
        have_depth_task(folder, hops=SHORT, sequences=100_000, targets=SETTINGS[name].targets)
    long = have_depth_task(out / "data" / f"s3-{LONG}", hops=LONG, sequences=1, heldout=1000)

    def look(trial: Trial) -> tuple[dict[int, dict[str, Any]], str]:
        found = measure(trial.run_dir, long)
        accuracy = "  ".join(f"{n}: {found[n]['mean']:.0%}" for n in (8, 16, 32))
        return found, f"{trial.run_dir}: accuracy at {SHORT + 1} to {LONG} hops by loops  {accuracy}"

    results = dict(zip(cases, run_all(trials, look, jobs), strict=True))
    summary: dict[str, Any] = {
        "task": "prefix products in S3, trained on 8 hops with at most 8 loops",
        "chance": 1 / 6,
        "settings": {
            name: {
                **SETTINGS[name]._asdict(),
                "seeds": {str(seed): results[name, seed] for seed in seeds},
                "mean": {str(n): statistics.mean(results[name, seed][n]["mean"] for seed in seeds) for n in LOOPS},
            }
            for name in settings
        },
    }
    write_json(out / "summary.json", summary)
    draw(out / "summary.png", summary)
    print(f"\naccuracy at {SHORT + 1} to {LONG} hops, mean over {count(len(seeds), 'seed')} (chance 17 %)")
    print(f"{'loops':24s}" + "".join(f"{n:7d}" for n in LOOPS))
    for name, found in summary["settings"].items():
        print(f"{name:24s}" + "".join(f"{found['mean'][str(n)]:7.1%}" for n in LOOPS))
    print(f"{out / 'summary.json'}, {out / 'summary.png'}")


def measure(run_dir: Path, shards: Path) -> dict[int, dict[str, Any]]:
    """By the number of loops: accuracy at each number of hops, and its mean behind those of training."""
    from mythos_dist.train.sweep import sweep

    found = sweep(run_dir, LOOPS, data=shards, samples=1000, batch=250)
    return {
        n: {
            "mean": statistics.mean(accuracy[SHORT + 1 : LONG + 1]),
            "hops": {str(i): accuracy[i] for i in range(1, LONG + 1)},
        }
        for n, accuracy in found.by_position.items()
    }


def draw(file: Path, summary: dict[str, Any]) -> None:
    """Accuracy over loops for each setting and seed, and over hops for the first setting."""
    from matplotlib.ticker import PercentFormatter

    with picture(file, 2, (12, 4.6)) as (left, right):
        for i, (name, found) in enumerate(summary["settings"].items()):
            for seed in found["seeds"].values():
                left.plot(LOOPS, [seed[n]["mean"] for n in LOOPS], color=f"C{i}", alpha=0.3, linewidth=1)
            left.plot(LOOPS, [found["mean"][str(n)] for n in LOOPS], color=f"C{i}", marker="o", label=name)
        left.axvline(TRAINED, color="grey", linestyle=":", label="most loops in training")
        loops_axis(left, LOOPS)
        left.set_title(f"accuracy at {SHORT + 1} to {LONG} hops (trained on {SHORT})")
        left.legend()
        name, found = next(iter(summary["settings"].items()))
        hops = range(1, LONG + 1)
        for n in LOOPS:
            seeds = [seed[n]["hops"] for seed in found["seeds"].values()]
            right.plot(hops, [statistics.mean(one[str(i)] for one in seeds) for i in hops], label=str(n))
        right.axvline(SHORT, color="grey", linestyle=":")
        right.set_xlabel("hops")
        right.set_title(f"{name}: accuracy by hops, mean over seeds")
        right.legend(title="loops")
        for panel in (left, right):
            panel.set_ylim(0, 1.02)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
            panel.axhline(summary["chance"], color="black", linewidth=0.5)
            panel.grid(alpha=0.3)
