"""Which loops train at which learning rate: small models on the demo's text, by switch, number of loops and rate.

A cell is one training with a fixed number of loops. It diverged if its gradients became non-finite, or if its held-out
loss is no better than guessing (ln of the vocabulary). Writes stability.json, stability.md and stability.png; a cell
that has its file is not trained again.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.trials import SAMPLE, Trial, check_counts, check_names, check_rates, check_sample, run_all
from mythos_dist.files import read_json_lines, write_atomically
from mythos_dist.train.plots import save_plot
from mythos_dist.units import count

SWITCHES = {
    "default": "",
    "residual 1/sqrt(N)": "model.residual_scale=inverse_sqrt",
    "residual 1/N": "model.residual_scale=inverse",
    "normed states": "model.state_norm=true",
    "fixed point": "loops.fixed_point=0.1",
    "no injection": "model.injection=none model.initial_state=e",
    "no injection, 1/sqrt(N)": "model.injection=none model.initial_state=e model.residual_scale=inverse_sqrt",
    "no injection, 1/N": "model.injection=none model.initial_state=e model.residual_scale=inverse",
}
LOOPS = (1, 4, 16, 64)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
DIVERGED = 5  # exit code of a run whose gradients stay non-finite
BASE = (
    f"data.path={SAMPLE} train.steps=150 train.seq_len=64 train.global_batch=8 train.micro_batch=8 "
    "optim.warmup_steps=15 train.eval_samples=64 model.dim=32 model.n_experts=4 loops.distribution=fixed "
    "loops.telemetry_every=0 checkpoint.every=1000000 faults.preflight=false faults.retry=false "
    "faults.roll_back_after=1 faults.max_rollbacks=0 run.report=false"
)


class Cell(NamedTuple):
    """One training."""

    switch: str
    n_loops: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        switch = self.switch.replace(", ", "-").replace(" ", "-").replace("/", "-over-")
        return f"{switch}-{self.n_loops}-{self.rate:g}-{self.seed}"


def run_stability(
    config: Path,
    out: Path,
    switches: Sequence[str],
    loops: Sequence[int],
    rates: Sequence[float],
    seeds: range,
    jobs: int | None,
    overrides: Sequence[str],
) -> None:
    """Train all cells of the file `config` that have no result, `jobs` at a time; write the map. Raises UserError."""
    from mythos_dist.train.sweep import write_json

    check_names("--only", switches, SWITCHES)
    check_counts(seeds, jobs)
    check_rates(rates)
    check_sample()
    # A penalty on the last loop's change has no meaning for one loop.
    cells = [
        Cell(*cell)
        for cell in itertools.product(switches, loops, rates, seeds)
        if not (cell[0] == "fixed point" and cell[1] == 1)
    ]
    trials = {cell: _trial(cell, config, out, overrides) for cell in cells}

    def measure(cell: Cell, trial: Trial) -> tuple[float | None, str]:
        losses = [line["heldout_loss"] for line in read_json_lines(trial.run_dir / "eval.jsonl")]
        loss = losses[-1] if len(losses) > 1 else None
        return loss, f"{cell.name}: held-out loss {loss or math.nan:.3f}"

    losses = run_all(trials, measure, jobs, {DIVERGED})
    vocab_size = trials[cells[0]].load().model.vocab_size
    results = [{**cell._asdict(), "loss": losses[cell]} for cell in cells]
    summary = summarize(results, math.log(vocab_size))
    write_json(out / "stability.json", {"cells": results, "switches": summary})
    text = "\n".join(table(summary))
    write_atomically(out / "stability.md", text + "\n")
    print(text)
    draw(out / "stability.png", summary)
    print(f"{out / 'stability.json'}, {out / 'stability.md'}, {out / 'stability.png'}")


def _trial(cell: Cell, config: Path, out: Path, overrides: Sequence[str]) -> Trial:
    own = (
        f"{BASE} {SWITCHES[cell.switch]} model.max_loop_iters={cell.n_loops} optim.lr={cell.rate} run.seed={cell.seed}"
    )
    return Trial(config, out / "runs" / cell.name, (*own.split(), *overrides))


def summarize(results: Sequence[dict[str, Any]], guessing: float) -> dict[str, Any]:
    """By switch and number of loops: for each rate the mean loss of the seeds that did not diverge (None: all did) and
    the number that did, and the rate with the least loss at which none did. `guessing`: the loss above which a run
    counts as diverged, nats."""
    summary: dict[str, Any] = {}
    for result in results:
        row = summary.setdefault(result["switch"], {}).setdefault(str(result["n_loops"]), {"rates": {}})
        row["rates"].setdefault(f"{result['rate']:g}", []).append(result["loss"])
    for rows in summary.values():
        for row in rows.values():
            for rate, losses in row["rates"].items():
                good = [loss for loss in losses if loss is not None and math.isfinite(loss) and loss < guessing]
                mean = statistics.mean(good) if good else None
                row["rates"][rate] = {"loss": mean, "diverged": len(losses) - len(good), "seeds": len(losses)}
            stable = {rate: one["loss"] for rate, one in row["rates"].items() if not one["diverged"]}
            row["best_rate"] = float(min(stable, key=lambda rate: stable[rate])) if stable else None
            row["best_loss"] = min(stable.values()) if stable else None
    return summary


def table(summary: dict[str, Any]) -> list[str]:
    """Markdown: for each switch and number of loops its best rate, the loss there, and diverged runs of all rates."""
    lines = ["| | loops | best rate | loss there, nats | diverged runs | at rates |", "|---|--:|--:|--:|--:|---|"]
    for switch, rows in summary.items():
        for n_loops, row in rows.items():
            diverged = {rate: one["diverged"] for rate, one in row["rates"].items() if one["diverged"]}
            runs = sum(one["seeds"] for one in row["rates"].values())
            best = "none" if row["best_rate"] is None else f"{row['best_rate']:g} | {row['best_loss']:.3f}"
            best = best if "|" in best else f"{best} |"
            lines.append(
                f"| {switch} | {n_loops} | {best} | {sum(diverged.values())} of {runs} | {', '.join(diverged)} |"
            )
    return lines


def draw(file: Path, summary: dict[str, Any]) -> None:
    """A panel for each switch: loss over the learning rate, a line for each number of loops; crosses where runs
    diverged."""
    finite = [one["loss"] for rows in summary.values() for row in rows.values() for one in row["rates"].values()]
    highest = max((loss for loss in finite if loss is not None), default=1.0)
    with save_plot(file, len(summary), (3.6 * len(summary), 3.6)) as panels:
        for panel, (switch, rows) in zip(panels, summary.items(), strict=True):
            for i, (n_loops, row) in enumerate(rows.items()):
                rates = [float(rate) for rate in row["rates"]]
                losses = [math.nan if one["loss"] is None else one["loss"] for one in row["rates"].values()]
                panel.plot(rates, losses, marker="o", markersize=3, color=f"C{i}", label=count(int(n_loops), "loop"))
                bad = [float(rate) for rate, one in row["rates"].items() if one["diverged"]]
                panel.scatter(bad, [highest] * len(bad), marker="x", color=f"C{i}", zorder=3)
            panel.set_xscale("log")
            panel.set_ylim(top=highest * 1.02)
            panel.set_title(switch, fontsize=9)
            panel.set_xlabel("learning rate")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("held-out loss, nats")
        panels[0].legend(fontsize=7)
