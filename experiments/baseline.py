"""Do loops pay? A looped model against plain transformers of the same block, on the demo's text and on the depth task.

One block (attention and a dense FFN) is used everywhere: in prelude and coda, in the loops, and as a layer of the plain
models. So a plain model of equal depth computes per token what the looped one does, but with weights of its own in each
layer; a plain model of equal parameters is shallower, and is trained for as many steps, or for as many FLOPs. All rows
see the same samples in the same order. Each row gets its best learning rate on the first seed.
Writes summary.json, summary.md and summary.png.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from experiments.depth import LONG_HOPS, TRAINED_HOPS
from experiments.depth_task import ensure_depth_task
from experiments.trials import (
    SAMPLE,
    RatedCase,
    Trial,
    check_counts,
    check_names,
    check_rates,
    check_sample,
    mean_and_stdev,
    run_all,
    run_at_best_rates,
    steps_for,
    total_flops,
)
from mythos_dist.config.schema import Config
from mythos_dist.files import write_atomically
from mythos_dist.train.plots import save_plot, share_axis

RATES = (2e-3, 4e-3, 8e-3)
# One expert without a router's choice is the dense FFN of the other blocks (MythosConfig.ffn_dim).
DENSE = "model.n_experts=1 model.n_experts_per_tok=1 model.n_shared_experts=0 model.expert_dim=85 act.mode=off"
QUIET = "checkpoint.every=1000000 loops.telemetry_every=0 train.eval_samples=8 faults.preflight=false run.report=false"
PLAIN = (
    "model.injection=none model.lora=none model.initial_state=e model.max_loop_iters=1 loops.distribution=fixed "
    "loops.mean=null loops.maximum=null loops.curriculum=none"
)
LOOPED = "looped"
Values = dict[str, float]  # what a run is measured by


class Candidate(NamedTuple):
    """A model of the comparison."""

    overrides: str
    equal_flops: bool = False  # trained for the FLOPs of the looped model, not for its steps


class TextComparison:
    """The demo's text, on which held-out loss is measured in nats."""

    name, config, best, unit = "text", "tiny_cpu.yaml", "loss", ".3f"
    columns: ClassVar = {"loss": "held-out loss, nats", "loss, 16 loops": "16 loops"}
    rows: ClassVar = {
        LOOPED: Candidate("loops.distribution=poisson loops.mean=4 loops.maximum=8"),
        "plain, equal depth": Candidate(f"{PLAIN} model.prelude_layers=3 model.coda_layers=2"),
        "plain, equal parameters": Candidate(PLAIN),
        "plain, equal parameters and FLOPs": Candidate(PLAIN, equal_flops=True),
    }
    loops = (1, 2, 4, 8, 16)  # of the looped model; trained with 4 on average
    base = (
        f"data.path={SAMPLE} train.steps=300 train.global_batch=8 train.micro_batch=8 optim.warmup_steps=30 "
        "model.max_loop_iters=4"
    )

    def __init__(self, out: Path):
        check_sample()

    def overrides(self, row: str) -> str:
        return f"{self.base} {self.rows[row].overrides}"

    def measure(self, row: str, run_dir: Path) -> Values:
        from mythos_dist.train.sweep import sweep

        loops = self.loops if row == LOOPED else (1,)
        curve = {n: result.loss for n, result in sweep(run_dir, loops, samples=64).curve.items()}
        by_loops = {f"loss, {n} loops": loss for n, loss in curve.items()} if row == LOOPED else {}
        return {"loss": curve[4 if row == LOOPED else 1], **by_loops}


class TaskComparison:
    """Products of up to 16 permutations by models trained on 8: accuracy."""

    name, config, best, unit = "task", "depth_task.yaml", "trained", ".1%"
    columns: ClassVar = {"trained": "2 to 8 hops, as trained", "longer": "9 to 16 hops"}
    rows: ClassVar = {
        LOOPED: Candidate(""),
        "plain, equal depth": Candidate(f"{PLAIN} model.prelude_layers=8"),
        "plain, equal parameters": Candidate(PLAIN),
        "plain, equal parameters and FLOPs": Candidate(PLAIN, equal_flops=True),
    }
    loops = (8, 16)  # of the looped model; trained with 8
    base = ""

    def __init__(self, out: Path):
        # `reached` is what the looped model's curriculum needs: targets within reach of the loops of a step, at its end
        # those of `final`. Both have the same sequences.
        settings: dict[str, Any] = {"hops": TRAINED_HOPS, "sequences": 100_000}
        self.reached = ensure_depth_task(out / "data" / "s3-8-reached", targets="reached", **settings)
        self.final = ensure_depth_task(out / "data" / "s3-8-final", targets="final", **settings)
        self.long = ensure_depth_task(out / "data" / "s3-16", hops=LONG_HOPS, sequences=1, heldout=500)

    def overrides(self, row: str) -> str:
        return f"{self.base} data.path={self.reached if row == LOOPED else self.final} {self.rows[row].overrides}"

    def measure(self, row: str, run_dir: Path) -> Values:
        from mythos_dist.train.sweep import sweep

        trained, most = self.loops if row == LOOPED else (1, 1)
        by_loops = sweep(run_dir, sorted({trained, most}), data=self.long, samples=500, batch=250).by_position
        by_hops = {f"{hops} hops": by_loops[most][hops] for hops in range(1, LONG_HOPS + 1)}
        return {
            "trained": statistics.mean(by_loops[trained][2 : TRAINED_HOPS + 1]),
            "longer": statistics.mean(by_loops[most][TRAINED_HOPS + 1 : LONG_HOPS + 1]),
            **by_hops,
        }


DATA = {kind.name: kind for kind in (TextComparison, TaskComparison)}


def run_baseline(
    configs: Path,
    out: Path,
    data: Sequence[str],
    seeds: range,
    rates: Sequence[float],
    jobs: int | None,
    overrides: Sequence[str],
) -> None:
    """Train all runs, `jobs` at a time, and write the results. `configs`: the folder of config files.

    Raises UserError.
    """
    from mythos_dist.train.sweep import write_json

    check_names("--data", data, DATA)
    check_counts(seeds, jobs)
    check_rates(rates)
    for name in data:  # find errors before the data is made
        Trial(configs / DATA[name].config, out, (f"data.path={SAMPLE}", *overrides)).load()
    comparisons = {name: _Comparison(DATA[name](out), configs, out, rates, jobs, overrides) for name in data}
    summary = {name: comparison.run(seeds) for name, comparison in comparisons.items()}
    write_json(out / "summary.json", summary)
    text = "\n".join(line for name in data for line in table(name, summary[name]))
    write_atomically(out / "summary.md", text + "\n")
    print(text)
    draw(out / "summary.png", summary)
    print(f"{out / 'summary.json'}, {out / 'summary.md'}, {out / 'summary.png'}")


class _Comparison:
    """All rows on one kind of data."""

    def __init__(
        self,
        data: TextComparison | TaskComparison,
        configs: Path,
        out: Path,
        rates: Sequence[float],
        jobs: int | None,
        overrides: Sequence[str],
    ):
        self.data, self.config, self.out = data, configs / data.config, out
        self.rates, self.jobs, self.overrides = rates, jobs, overrides
        self.flops = total_flops(self._trial(LOOPED, rates[0], 0).load())
        self.steps = {row: self._steps_of(row) for row in data.rows}

    def _steps_of(self, row: str) -> int:
        config = self._trial(row, self.rates[0], 0).load()
        return steps_for(config, self.flops) if self.data.rows[row].equal_flops else config.train.steps

    def _trial(self, row: str, rate: float, seed: int, *last: str) -> Trial:
        folder = self.out / self.data.name / row.replace(", ", "-").replace(" ", "-") / f"{rate:g}" / f"seed-{seed}"
        own = f"{DENSE} {QUIET} {self.data.overrides(row)} optim.lr={rate} run.seed={seed}".split()
        return Trial(self.config, folder, (*own, *self.overrides, *last))

    def _run(self, cases: Sequence[RatedCase]) -> dict[RatedCase, Values]:
        def measure(case: RatedCase, trial: Trial) -> tuple[Values, str]:
            values = self.data.measure(case[0], trial.run_dir)
            shown = "  ".join(f"{name}: {values[name]:.3f}" for name in self.data.columns if name in values)
            return values, f"{trial.run_dir}  {shown}"

        trials = {case: self._trial(*case, f"train.steps={self.steps[case[0]]}") for case in cases}
        return run_all(trials, measure, self.jobs)

    def run(self, seeds: range) -> dict[str, Any]:
        """The results of all rows: of the first seed at each rate, of the others at the best one."""
        rows, first = list(self.data.rows), seeds[0]
        sign = -1 if self.data.best == "loss" else 1
        best, done = run_at_best_rates(
            rows, self.rates, seeds, self._run, lambda row, values: sign * values[self.data.best]
        )
        return {
            "rows": {
                row: {
                    **self._size(self._trial(row, best[row], first, f"train.steps={self.steps[row]}").load()),
                    "overrides": self.data.rows[row].overrides,
                    "rate": best[row],
                    "by_rate": {f"{rate:g}": done[row, rate, first][self.data.best] for rate in self.rates},
                    "seeds": [done[row, best[row], seed] for seed in seeds],
                }
                for row in rows
            }
        }

    def _size(self, config: Config) -> dict[str, float]:
        from mythos_dist.model.parameter_table import count_parameters

        return {
            "parameters": count_parameters(config.model),
            "layers": config.model.prelude_layers + config.loops.mean_of(config.model) + config.model.coda_layers,
            "steps": config.train.steps,
            "flops": total_flops(config),
        }


def values_of(row: dict[str, Any], column: str) -> list[float]:
    """The values of a row's seeds; empty if it is not measured by this column."""
    return [seed[column] for seed in row["seeds"] if column in seed]


def table(name: str, summary: dict[str, Any]) -> list[str]:
    """A Markdown table: size, FLOPs, learning rate, and each column's mean and standard deviation over seeds."""
    data = DATA[name]
    lines = ["", f"| {name} | layers | parameters | steps | FLOPs | rate | " + " | ".join(data.columns.values()) + " |"]
    lines.append("|---|" + "--:|" * (5 + len(data.columns)))
    for row, one in summary["rows"].items():
        size = f"{one['layers']} | {one['parameters']:,} | {one['steps']:,} | {one['flops']:.2e} | {one['rate']:g}"
        cells = [spread(values_of(one, column), data.unit) for column in data.columns]
        lines.append(f"| {row} | {size} | " + " | ".join(cells) + " |")
    return lines


def spread(values: Sequence[float], unit: str) -> str:
    """Mean and standard deviation; of one value the value, of none nothing."""
    if not values:
        return ""
    mean, stdev = mean_and_stdev(values)
    return f"{mean:{unit}} ± {stdev:{unit}}" if len(values) > 1 else f"{mean:{unit}}"


def draw(file: Path, summary: dict[str, Any]) -> None:
    """Text: a bar for each row with a dot for each seed, and the looped model's loss over loops. Task: accuracy over
    hops."""
    with save_plot(file, len(summary), (7 * len(summary), 4.2)) as panels:
        for panel, (name, result) in zip(panels, summary.items(), strict=True):
            (_draw_text if name == TextComparison.name else _draw_task)(panel, result["rows"])


def _draw_text(panel: Any, rows: dict[str, Any]) -> None:
    names = list(rows)[::-1]
    everything = [loss for name in names for loss in values_of(rows[name], "loss")]
    for i, name in enumerate(names):
        losses = values_of(rows[name], "loss")
        panel.barh(i, statistics.mean(losses), color="C1" if name == LOOPED else "C0", alpha=0.5)
        panel.scatter(losses, [i] * len(losses), color="black", s=12, zorder=3)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlim(min(everything) * 0.98, max(everything) * 1.02)
    panel.set_title("text: held-out loss, nats (lower is better)")
    panel.grid(axis="x", alpha=0.3)


def _draw_task(panel: Any, rows: dict[str, Any]) -> None:
    hops = range(1, LONG_HOPS + 1)
    for i, (name, row) in enumerate(rows.items()):
        means = [statistics.mean(values_of(row, f"{n} hops")) for n in hops]
        panel.plot(hops, means, color="C1" if name == LOOPED else f"C{(0, 2, 3)[(i - 1) % 3]}", marker=".", label=name)
        for seed in row["seeds"]:
            panel.plot(hops, [seed[f"{n} hops"] for n in hops], color=panel.lines[-1].get_color(), alpha=0.25)
    panel.axvline(TRAINED_HOPS, color="grey", linestyle=":")
    panel.axhline(1 / 6, color="black", linewidth=0.5)
    share_axis(panel)
    panel.set_xlabel("hops (trained up to 8); looped with 16 loops")
    panel.set_title("task: accuracy, mean and single seeds")
    panel.legend(fontsize=8)
