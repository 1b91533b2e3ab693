"""Ablation of the loop settings: each is changed alone, at equal FLOPs, on the demo's text and on the depth task.

The defaults of model.mode=train follow from its table in docs/loops.md. Writes ablation.json, ablation.md and
ablation.png.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments.depth import LONG_HOPS, TRAINED_HOPS
from experiments.depth_task import ensure_depth_task
from experiments.trials import (
    AS_OPEN_MYTHOS,
    SAMPLE,
    Trial,
    check_counts,
    check_names,
    check_sample,
    mean_and_stdev,
    run_all,
    steps_for,
    total_flops,
)
from mythos_dist.files import write_atomically
from mythos_dist.train.evaluation import ACCURACY_RANGE, LOSS_RANGE
from mythos_dist.train.plots import save_plot, value_axis
from mythos_dist.units import count

BASE = (
    "model.loop_signal=false model.lora=none model.injection=parcae model.initial_state=zero model.qk_norm=true "
    "model.init=depth_scaled act.mode=off loops.backprop=null loops.objective=final loops.per=step"
).split()
SWITCHES = {
    "base": "",
    "every loop's loss": "loops.objective=per_loop",
    "fixed loops": "{fixed}",
    "drawn loops": "{drawn}",
    "a number of loops per sequence": "{drawn} loops.per=sequence",
    "gradient through half of the loops": "loops.backprop={half}",
    "act reference": "act.mode=reference",
    "act safe": "act.mode=safe",
    "act ponder": "act.mode=ponder act.kl=0.01 loops.objective=per_loop",
    "loop signal": "model.loop_signal=true",
    "lora shared": "model.lora=shared",
    "lora per loop": "model.lora=per_loop",
    "injection reference": "model.injection=reference",
    "kv every 2 loops": "model.kv_sharing=every:2",
    "kv of the first loop": "model.kv_sharing=first",
    "initial state e": "model.initial_state=e",
    "initial state random": "model.initial_state=random",
    "no qk_norm": "model.qk_norm=false",
    "init reference": "model.init=reference",
    "as OpenMythos": AS_OPEN_MYTHOS + " {fixed}",
}


class TextData:
    """The demo's text: held-out loss in nats, lower is better."""

    name, config, unit, better = "text", "tiny_cpu.yaml", "nats", "lower"
    metric = "held-out loss, nats"
    loops = (1, 2, 4, 8, 16, 32)  # of the sweep
    table_loops = (4, 32)  # the mean of training, and four times its maximum
    placeholders: ClassVar = {  # of SWITCHES
        "half": "2",
        "fixed": "loops.distribution=fixed loops.mean=4 loops.maximum=null",
        "drawn": "loops.distribution=poisson loops.mean=4 loops.maximum=8",
    }
    base = (
        f"data.path={SAMPLE} train.steps=300 train.global_batch=8 train.micro_batch=8 train.eval_samples=8 "
        f"optim.lr=4e-3 optim.warmup_steps=30 checkpoint.every=1000000 {placeholders['drawn']}"
    ).split()

    def __init__(self, out: Path):
        check_sample()

    def measure(self, run_dir: Path) -> dict[int, float]:
        from mythos_dist.train.sweep import sweep

        return {n: result.loss for n, result in sweep(run_dir, self.loops, samples=64).curve.items()}


class DepthTaskData:
    """Products of 9 to 16 permutations by models trained on 8, with the final target: accuracy, higher is better."""

    name, config, unit, better = "task", "depth_task.yaml", "share", "higher"
    metric = "accuracy at 9 to 16 hops"
    loops = (4, 8, 16, 32)
    table_loops = (16, 32)
    placeholders: ClassVar = {
        "half": "4",
        "fixed": "loops.curriculum=none",
        "drawn": "loops.curriculum=none loops.mean=null loops.distribution=uniform_set loops.set=[1,2,3,4,5,6,7,8]",
    }
    base = "train.steps=1000 loops.curriculum_steps=600 checkpoint.every=1000000".split()

    def __init__(self, out: Path):
        short = ensure_depth_task(
            out / "data" / "s3-8-reached", hops=TRAINED_HOPS, sequences=100_000, targets="reached"
        )
        self.long = ensure_depth_task(out / "data" / "s3-16", hops=LONG_HOPS, sequences=1, heldout=500)
        self.base = [*self.base, f"data.path={short}"]

    def measure(self, run_dir: Path) -> dict[int, float]:
        from mythos_dist.train.sweep import sweep

        by_position = sweep(run_dir, self.loops, data=self.long, samples=500, batch=250).by_position
        return {n: statistics.mean(accuracy[TRAINED_HOPS + 1 : LONG_HOPS + 1]) for n, accuracy in by_position.items()}


DATA = {kind.name: kind for kind in (TextData, DepthTaskData)}


def run_ablation(
    configs: Path,
    out: Path,
    data: Sequence[str],
    switches: Sequence[str],
    seeds: range,
    jobs: int | None,
    overrides: Sequence[str],
) -> None:
    """Train all runs on all data, `jobs` at a time, and write the results. `configs`: the folder of config files.

    Raises UserError.
    """
    from mythos_dist.train.sweep import write_json

    check_names("--data", data, DATA)
    check_names("--only", switches, SWITCHES)
    check_counts(seeds, jobs)
    for name in data:  # find errors before the data is made
        Trial(configs / DATA[name].config, out, (f"data.path={SAMPLE}", *overrides)).load()
    prepared = {name: DATA[name](out) for name in data}
    summary = {name: _compare(one, configs, out, switches, seeds, overrides, jobs) for name, one in prepared.items()}
    write_json(out / "ablation.json", summary)
    text = "\n".join(line for name in data for line in table(DATA[name], summary[name]))
    write_atomically(out / "ablation.md", text + "\n")
    print(text)
    draw(out / "ablation.png", summary)
    print(f"{out / 'ablation.json'}, {out / 'ablation.md'}, {out / 'ablation.png'}")


def _compare(
    data: TextData | DepthTaskData,
    configs: Path,
    out: Path,
    switches: Sequence[str],
    seeds: range,
    overrides: Sequence[str],
    jobs: int | None,
) -> dict[str, Any]:
    """For each switch: its overrides, its steps, and the result of each seed by number of loops."""
    config = configs / data.config
    changes = {switch: template.format(**data.placeholders).split() for switch, template in SWITCHES.items()}
    # A switch that changes nothing on this data is the base.
    switches = [s for s in switches if s == "base" or not set(changes[s]) <= set(data.base)]

    def trial(switch: str, seed: int, *last: str) -> Trial:
        folder = out / data.name / switch.replace(" ", "-").replace("'", "") / f"seed-{seed}"
        all_overrides = (*BASE, *data.base, *overrides, *changes[switch], f"run.seed={seed}", *last)
        return Trial(config, folder, all_overrides)

    budget = total_flops(trial("base", 0).load())
    steps = {switch: steps_for(trial(switch, 0).load(), budget) for switch in switches}
    cases = [(switch, seed) for seed in seeds for switch in switches]
    trials = {(switch, seed): trial(switch, seed, f"train.steps={steps[switch]}") for switch, seed in cases}

    def measure(case: tuple[str, int], one: Trial) -> tuple[dict[int, float], str]:
        by_loops = data.measure(one.run_dir)
        values = "  ".join(f"{n}: {value:.3f}" for n, value in by_loops.items())
        return by_loops, f"{one.run_dir} ({data.unit} by loops)  {values}"

    results = run_all(trials, measure, jobs)
    by_switch = {
        switch: {
            "overrides": " ".join(changes[switch]),
            "steps": steps[switch],
            "seeds": [results[switch, seed] for seed in seeds],
        }
        for switch in switches
    }
    return {"flops": budget, "switches": by_switch}


def with_loops(seeds: Sequence[dict[str, float]], n: int) -> list[float]:
    """The result of each seed with `n` loops."""
    return [seed[str(n)] for seed in seeds]


def table(data: type[TextData] | type[DepthTaskData], summary: dict[str, Any]) -> list[str]:
    """A Markdown table, sorted by the first of `data.table_loops`, best first."""
    rows = []
    for switch, one in summary["switches"].items():
        values = [mean_and_stdev(with_loops(one["seeds"], n)) for n in data.table_loops]
        rows.append((values[0][0], switch, one["steps"], values))
    title = f"**{data.name}** ({data.unit}, {data.better} is better; {summary['flops']:.2e} FLOPs per run)"
    lines = ["", title, ""]
    lines.append("| | steps | " + " | ".join(count(n, "loop") for n in data.table_loops) + " |")
    lines.append("|---|---:|" + "---:|" * len(data.table_loops))
    for _, switch, steps, values in sorted(rows, reverse=data.better == "higher"):
        lines.append(f"| {switch} | {steps} | " + " | ".join(f"{mean:.3f} ± {sd:.3f}" for mean, sd in values) + " |")
    return lines


def draw(file: Path, summary: dict[str, Any]) -> None:
    """A bar for each switch with a dot for each seed."""
    with save_plot(file, len(summary), (6.5 * len(summary), 6)) as panels:
        for panel, (name, result) in zip(panels, summary.items(), strict=True):
            data, n = DATA[name], DATA[name].table_loops[0]
            seeds_of = {switch: one["seeds"] for switch, one in result["switches"].items()}
            switches = sorted(seeds_of, key=lambda switch: statistics.mean(with_loops(seeds_of[switch], n)))
            if data.better == "lower":
                switches.reverse()
            values = []
            for i, switch in enumerate(switches):
                seed_values = with_loops(seeds_of[switch], n)
                values += seed_values
                panel.barh(i, statistics.mean(seed_values), color="C1" if switch == "base" else "C0", alpha=0.5)
                panel.scatter(seed_values, [i] * len(seed_values), color="black", s=12, zorder=3)
            panel.set_yticks(range(len(switches)), switches)
            if data.better == "lower":
                panel.set_xlim(min(values) * 0.98, max(values) * 1.02)
            value_axis(panel, LOSS_RANGE * max(values) if data.better == "lower" else ACCURACY_RANGE, "x")
            panel.set_title(f"{name}: {data.metric}, {count(n, 'loop')}")
            panel.grid(axis="x", alpha=0.3)
