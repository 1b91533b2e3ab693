"""Which switches of the loops pay? Each is changed alone, at equal FLOPs, on the demo's text and on the task of
`make depth-demo`. The defaults of model.mode=train follow from the table in docs/loops.md that this makes.

Writes ablation.json, ablation.md and ablation.png.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments.depth_task import have_depth_task
from experiments.trials import (
    AS_OPEN_MYTHOS,
    Trial,
    must_be_known,
    must_be_positive,
    run_all,
    steps_for,
    training_flops,
)
from mythos_dist.errors import UserError
from mythos_dist.files import write_atomically
from mythos_dist.train.depth import ACCURACY_RANGE, LOSS_RANGE
from mythos_dist.train.pictures import picture, value_axis
from mythos_dist.units import count

SAMPLE = Path("data/sample")

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
    "initial state e": "model.initial_state=e",
    "initial state random": "model.initial_state=random",
    "no qk_norm": "model.qk_norm=false",
    "init reference": "model.init=reference",
    "as OpenMythos": AS_OPEN_MYTHOS + " {fixed}",
}


class Text:
    """The demo's text: held-out loss in nats, lower is better."""

    name, config, unit, better = "text", "tiny_cpu.yaml", "nats", "lower"
    what = "held-out loss, nats"
    loops = (1, 2, 4, 8, 16, 32)  # of the sweep
    judged = (4, 32)  # at the mean of training, and at four times its maximum
    words: ClassVar = {  # of SWITCHES
        "half": "2",
        "fixed": "loops.distribution=fixed loops.mean=4 loops.maximum=null",
        "drawn": "loops.distribution=poisson loops.mean=4 loops.maximum=8",
    }
    base = (
        f"data.path={SAMPLE} train.steps=300 train.global_batch=8 train.micro_batch=8 train.eval_samples=8 "
        f"optim.lr=4e-3 optim.warmup_steps=30 checkpoint.every=1000000 {words['drawn']}"
    ).split()

    def __init__(self, out: Path):
        if not SAMPLE.exists():
            raise UserError(f"{SAMPLE} is not there; make it with `python tools/make_sample_data.py`")

    def measure(self, run_dir: Path) -> dict[int, float]:
        from mythos_dist.train.sweep import sweep

        return {n: found.loss for n, found in sweep(run_dir, self.loops, samples=64).curve.items()}


class Task:
    """Products of 9 to 16 permutations by models that learned to multiply 8, from the final target: accuracy, higher is
    better."""

    name, config, unit, better = "task", "depth_task.yaml", "share", "higher"
    what = "accuracy at 9 to 16 hops"
    loops = (4, 8, 16, 32)
    judged = (16, 32)
    words: ClassVar = {
        "half": "4",
        "fixed": "loops.curriculum=none",
        "drawn": "loops.curriculum=none loops.mean=null loops.distribution=uniform_set loops.set=[1,2,3,4,5,6,7,8]",
    }
    base = "train.steps=1000 loops.curriculum_steps=600 checkpoint.every=1000000".split()

    def __init__(self, out: Path):
        short = have_depth_task(out / "data" / "s3-8-reached", hops=8, sequences=100_000, targets="reached")
        self.long = have_depth_task(out / "data" / "s3-16", hops=16, sequences=1, heldout=500)
        self.base = [*self.base, f"data.path={short}"]

    def measure(self, run_dir: Path) -> dict[int, float]:
        from mythos_dist.train.sweep import sweep

        found = sweep(run_dir, self.loops, data=self.long, samples=500, batch=250).by_position
        return {n: statistics.mean(accuracy[9:17]) for n, accuracy in found.items()}


DATA = {kind.name: kind for kind in (Text, Task)}


def compare(
    configs: Path,
    out: Path,
    data: Sequence[str],
    switches: Sequence[str],
    seeds: range,
    jobs: int | None,
    overrides: Sequence[str],
) -> None:
    """All runs, of files in the folder `configs`, on all data, `jobs` at a time; then the files. Raises UserError."""
    from mythos_dist.train.sweep import write_json

    must_be_known("--data", data, DATA)
    must_be_known("--only", switches, SWITCHES)
    must_be_positive(seeds, jobs)
    for name in data:  # a mistake is found before the data is made
        Trial(configs / DATA[name].config, out, (f"data.path={SAMPLE}", *overrides)).load()
    found = {name: DATA[name](out) for name in data}
    summary = {name: on(one, configs, out, switches, seeds, overrides, jobs) for name, one in found.items()}
    write_json(out / "ablation.json", summary)
    text = "\n".join(line for name in data for line in table(DATA[name], summary[name]))
    write_atomically(out / "ablation.md", text + "\n")
    print(text)
    draw(out / "ablation.png", summary)
    print(f"{out / 'ablation.json'}, {out / 'ablation.md'}, {out / 'ablation.png'}")


def on(
    data: Text | Task,
    configs: Path,
    out: Path,
    switches: Sequence[str],
    seeds: range,
    more: Sequence[str],
    jobs: int | None,
) -> dict[str, Any]:
    """By switch: its settings, its steps, and what each seed's run found by the number of loops."""
    config = configs / data.config
    changes = {switch: words.format(**data.words).split() for switch, words in SWITCHES.items()}
    switches = [s for s in switches if s == "base" or not set(changes[s]) <= {*data.base}]  # else it is the base

    def trial(switch: str, seed: int, *last: str) -> Trial:
        folder = out / data.name / switch.replace(" ", "-").replace("'", "") / f"seed-{seed}"
        return Trial(config, folder, (*BASE, *data.base, *more, *changes[switch], f"run.seed={seed}", *last))

    base = trial("base", 0).load()
    budget = sum(flops for flops, _ in zip(training_flops(base), range(base.train.steps), strict=False))
    steps = {switch: steps_for(trial(switch, 0).load(), budget) for switch in switches}
    cases = [(switch, seed) for seed in seeds for switch in switches]
    trials = [trial(switch, seed, f"train.steps={steps[switch]}") for switch, seed in cases]

    def look(one: Trial) -> tuple[dict[str, float], str]:
        found = data.measure(one.run_dir)
        words = "  ".join(f"{n}: {value:.3f}" for n, value in found.items())
        return {str(n): value for n, value in found.items()}, f"{one.run_dir} ({data.unit} by loops)  {words}"

    found = dict(zip(cases, run_all(trials, look, jobs), strict=True))
    return {
        "flops": budget,
        "switches": {
            switch: {
                "overrides": " ".join(changes[switch]),
                "steps": steps[switch],
                "seeds": [found[switch, seed] for seed in seeds],
            }
            for switch in switches
        },
    }


def spread(seeds: Sequence[dict[str, float]], n: int) -> tuple[float, float]:
    """Mean, and standard deviation between seeds."""
    values = [seed[str(n)] for seed in seeds]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(data: type[Text] | type[Task], found: dict[str, Any]) -> list[str]:
    """Markdown, the best at the first of the judged numbers of loops first."""
    rows = []
    for switch, one in found["switches"].items():
        values = [spread(one["seeds"], n) for n in data.judged]
        rows.append((values[0][0], switch, one["steps"], values))
    lines = ["", f"**{data.name}** ({data.unit}, {data.better} is better; {found['flops']:.2e} FLOPs a run)", ""]
    lines.append("| | steps | " + " | ".join(count(n, "loop") for n in data.judged) + " |")
    lines.append("|---|---:|" + "---:|" * len(data.judged))
    for _, switch, steps, values in sorted(rows, reverse=data.better == "higher"):
        lines.append(f"| {switch} | {steps} | " + " | ".join(f"{mean:.3f} ± {sd:.3f}" for mean, sd in values) + " |")
    return lines


def draw(file: Path, summary: dict[str, Any]) -> None:
    """A bar for each switch with a dot for each seed, the base's mean as a line."""
    with picture(file, len(summary), (6.5 * len(summary), 6)) as panels:
        for panel, (name, found) in zip(panels, summary.items(), strict=True):
            data, n = DATA[name], DATA[name].judged[0]
            switches = sorted(found["switches"], key=lambda s: spread(found["switches"][s]["seeds"], n)[0])
            if data.better == "lower":
                switches.reverse()
            for i, switch in enumerate(switches):
                seeds = found["switches"][switch]["seeds"]
                panel.barh(i, spread(seeds, n)[0], color="C1" if switch == "base" else "C0", alpha=0.5)
                panel.scatter([seed[str(n)] for seed in seeds], [i] * len(seeds), color="black", s=12, zorder=3)
            panel.set_yticks(range(len(switches)), switches)
            values = [seed[str(n)] for one in found["switches"].values() for seed in one["seeds"]]
            if data.better == "lower":
                panel.set_xlim(min(values) * 0.98, max(values) * 1.02)
            value_axis(panel, LOSS_RANGE * max(values) if data.better == "lower" else ACCURACY_RANGE, "x")
            panel.set_title(f"{name}: {data.what}, {count(n, 'loop')}")
            panel.grid(axis="x", alpha=0.3)
