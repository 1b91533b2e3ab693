"""Do more loops answer questions of more hops? Small models learn to find a person in stories of few people, then read
stories with questions of up to 4 hops, and are asked questions of 5 to 8 hops with more loops than in training.

Writes summary.json (accuracy by seed, loops and hops), summary.md and summary.png.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.story_task import ensure_story_task, example_of
from experiments.trials import ByLoops, Trial, check_counts, run_all
from mythos_dist.config.dump import dump_stages
from mythos_dist.config.load import load_stages
from mythos_dist.files import write_atomically
from mythos_dist.train.plots import loops_axis, save_plot, share_axis

PEOPLE, TRAINED_HOPS, LONG_HOPS, TRAINED_LOOPS = 10, 4, 8, 4
FIRST_PEOPLE = 4  # in the stories of the first stage
LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)  # of the evaluation
CHANCE = 1 / (PEOPLE - 1)  # anyone but the person that the question begins with
CHANCE_BEYOND = 1 / (PEOPLE - 1 - TRAINED_HOPS)  # of more hops, if the people of all trained hops are known
TRAINED, BEYOND = "accuracy_at_trained_hops", "accuracy_beyond_trained_hops"
WORST = f"{BEYOND}_at_twice_the_loops"


def run_hop_study(config: Path, out: Path, seeds: range, jobs: int | None, overrides: Sequence[str]) -> None:
    """Train one run per seed of the file `config`, `jobs` at a time, and write the results. Raises UserError."""
    from mythos_dist.train.sweep import write_json

    check_counts(seeds, jobs)
    lookups, data, long = (out / "data" / f"stories-{hops}" for hops in (1, TRAINED_HOPS, LONG_HOPS))
    # Finds errors before the data is made.
    trials = {str(seed): _trial(config, out, seed, lookups, data, overrides) for seed in seeds}
    ensure_story_task(lookups, people=FIRST_PEOPLE, questions=FIRST_PEOPLE, hops=1)
    ensure_story_task(data, people=PEOPLE, hops=TRAINED_HOPS)
    ensure_story_task(long, people=PEOPLE, hops=LONG_HOPS, questions=1, stories=1, heldout=1000)
    print(f"a story, and a question of {LONG_HOPS} hops:\n{example_of(PEOPLE, LONG_HOPS)}\n")

    def measure(seed: str, trial: Trial) -> tuple[ByLoops, str]:
        by_loops = measure_hops(trial.run_dir, long)
        shown = "  ".join(f"{n}: {one[BEYOND]:.1%}" for n, one in by_loops.items())
        return by_loops, f"{trial.run_dir}: accuracy at {TRAINED_HOPS + 1} to {LONG_HOPS} hops by loops  {shown}"

    summary = summarize(run_all(trials, measure, jobs))
    write_json(out / "summary.json", summary)
    write_atomically(out / "summary.md", "\n".join(table(summary)) + "\n")
    draw(out / "summary.png", summary)
    print("\n" + "\n".join(table(summary)))
    print(f"\n{out / 'summary.json'}, {out / 'summary.md'}, {out / 'summary.png'}")


def _trial(config: Path, out: Path, seed: int, lookups: Path, data: Path, overrides: Sequence[str]) -> Trial:
    """A run of both stages, each on its own shards, with its config beside it. Raises UserError."""
    run_dir = out / f"seed-{seed}"
    first, second = load_stages(config, [f"data.path={data}", f"run.seed={seed}", f"run.dir={run_dir}", *overrides])
    first = replace(first, data=replace(first.data, path=str(lookups)))
    file = out / f"seed-{seed}.yaml"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump_stages([first, second]))
    return Trial(file, run_dir, ())


def measure_hops(run_dir: Path, shards: Path, loops: Sequence[int] = LOOPS) -> ByLoops:
    """By number of `loops`: the accuracy at each number of hops, and its means over trained and over more hops."""
    from mythos_dist.train.sweep import sweep

    by_position = sweep(run_dir, loops, data=shards, samples=1000, batch=250).by_position
    by_loops = {}
    for n, accuracy in by_position.items():
        hops = [accuracy[position] for position in answer_positions()]
        by_loops[str(n)] = {
            TRAINED: statistics.mean(hops[:TRAINED_HOPS]),
            BEYOND: statistics.mean(hops[TRAINED_HOPS:]),
            "hops": {str(i): one for i, one in enumerate(hops, 1)},
        }
    return by_loops


def answer_positions() -> range:
    """Positions of the answers of 1, 2, … hops in a story with one question: every second token from the first
    "someone" on."""
    first = 1 + 4 * PEOPLE + 2
    return range(first, first + 2 * LONG_HOPS, 2)


def summarize(results: dict[str, ByLoops]) -> dict[str, Any]:
    """The content of summary.json; results: by seed."""

    def over_seeds(loops: int, kind: str) -> list[float]:
        return [by_loops[str(loops)][kind] for by_loops in results.values()]

    twice = 2 * TRAINED_LOOPS
    return {
        "task": f"questions of up to {LONG_HOPS} hops over stories of {PEOPLE} people, trained on up to {TRAINED_HOPS} "
        f"hops with at most {TRAINED_LOOPS} loops",
        "chance": CHANCE,
        "chance_beyond_known_hops": CHANCE_BEYOND,
        "trained_hops": TRAINED_HOPS,
        "trained_loops": TRAINED_LOOPS,
        f"{BEYOND}_at_the_trained_loops": max(over_seeds(TRAINED_LOOPS, BEYOND)),  # of the seed nearest to the other
        WORST: min(over_seeds(twice, BEYOND)),
        f"{BEYOND}_at_four_times_the_loops": min(over_seeds(2 * twice, BEYOND)),
        f"{TRAINED}_at_the_trained_loops": min(over_seeds(TRAINED_LOOPS, TRAINED)),
        "mean": {str(n): {kind: statistics.mean(over_seeds(n, kind)) for kind in (TRAINED, BEYOND)} for n in LOOPS},
        "seeds": results,
    }


def table(summary: dict[str, Any]) -> list[str]:
    """A Markdown table: accuracy over loops at trained and at more hops, of each seed."""
    lines = [f"| accuracy, {TRAINED_HOPS + 1} to {LONG_HOPS} hops | " + " | ".join(f"{n} loops" for n in LOOPS) + " |"]
    lines.append("|---|" + "---:|" * len(LOOPS))
    for seed, by_loops in summary["seeds"].items():
        lines.append(f"| seed {seed} | " + " | ".join(f"{by_loops[str(n)][BEYOND]:.1%}" for n in LOOPS) + " |")
    for kind, name in ((BEYOND, "mean"), (TRAINED, f"mean, 1 to {TRAINED_HOPS} hops")):
        lines.append(f"| {name} | " + " | ".join(f"{summary['mean'][str(n)][kind]:.1%}" for n in LOOPS) + " |")
    worst = f"{summary[WORST]:.1%}"
    chance = f"Chance is {CHANCE:.0%}, or {CHANCE_BEYOND:.0%} if the people of the first {TRAINED_HOPS} hops are known"
    return [*lines, "", f"{chance}; worst seed at {2 * TRAINED_LOOPS} loops, {worst}."]


def draw(file: Path, summary: dict[str, Any]) -> None:
    """Accuracy over loops for each number of hops, and over hops for each number of loops; means over seeds."""
    seeds = list(summary["seeds"].values())

    def mean_of(loops: int, hops: int) -> float:
        return statistics.mean(by_loops[str(loops)]["hops"][str(hops)] for by_loops in seeds)

    all_hops = range(1, LONG_HOPS + 1)
    with save_plot(file, 2, (12, 4.6)) as (left, right):
        for hops in all_hops:
            trained = hops <= TRAINED_HOPS
            left.plot(
                LOOPS,
                [mean_of(n, hops) for n in LOOPS],
                color=f"C{hops - 1}",
                linestyle="--" if trained else "-",
                marker=None if trained else "o",
                label=f"{hops}, trained" if trained else str(hops),
            )
        left.axvline(TRAINED_LOOPS, color="grey", linestyle=":")
        loops_axis(left, LOOPS)
        left.set_title("accuracy by loops (dotted: most in training)")
        left.legend(title="hops")
        for n in LOOPS:
            (line,) = right.plot(all_hops, [mean_of(n, hops) for hops in all_hops], label=str(n))
            for by_loops in seeds:
                values = [by_loops[str(n)]["hops"][str(hops)] for hops in all_hops]
                right.plot(all_hops, values, color=line.get_color(), alpha=0.25, linewidth=1)
        right.axvline(TRAINED_HOPS, color="grey", linestyle=":")
        right.set_xlabel("hops")
        right.set_title("accuracy by hops (dotted: most in training)")
        right.legend(title="loops")
        for panel in (left, right):
            panel.axhline(CHANCE_BEYOND, color="black", linewidth=0.5)
            share_axis(panel)
