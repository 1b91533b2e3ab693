"""The results of an evaluation: scores with standard errors, as a table, as JSON and as a plot over loops."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mythos_dist.train.plots import loops_axis, save_plot

PANELS = 6  # the most in a plot


class Score(NamedTuple):
    """One value of one task at one number of loops."""

    task: str
    metric: str
    value: float
    stderr: float | None  # None: unknown
    samples: int  # documents, or tokens
    panel: str  # scores of one panel of the plot share an axis
    line: str  # the label of its line


Results = Mapping[int, Sequence[Score]]  # by the number of loops


def to_json(results: Results) -> dict[str, Any]:
    """task -> metric -> loops -> value, standard error and number of samples; values that are not finite are null."""
    content: dict[str, Any] = {}
    for n_loops, scores in results.items():
        for one in scores:
            entry = {"value": _finite(one.value), "stderr": _finite(one.stderr), "samples": one.samples}
            content.setdefault(one.task, {}).setdefault(one.metric, {})[str(n_loops)] = entry
    return content


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def score_table(results: Results) -> str:
    """A row per task and metric, a column per number of loops."""
    loops = sorted(results)
    rows: dict[tuple[str, str], dict[int, Score]] = {}
    for n in loops:
        for one in results[n]:
            rows.setdefault((one.task, one.metric), {})[n] = one
    cells = [["task", "metric", "samples", *(f"loops={n}" for n in loops)]]
    for (task, metric), values in rows.items():
        samples = max(one.samples for one in values.values())
        cells.append([task, metric, str(samples), *(_cell(values.get(n)) for n in loops)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    return f"{score.value:.4f}{error}"


def draw(file: Path, results: Results, trained: int) -> None:
    """Plot scores over the number of loops, a panel per metric, with one standard error to each side (PNG).

    trained: the mean number of loops in training.
    """
    loops = sorted(results)
    lines: dict[str, dict[str, dict[int, Score]]] = {}
    for n in loops:
        for one in results[n]:
            if math.isfinite(one.value):
                lines.setdefault(one.panel, {}).setdefault(one.line, {})[n] = one
    shown = list(lines.items())[:PANELS]
    with save_plot(file, max(1, len(shown)), (5.5 * max(1, len(shown)), 4.2)) as panels:
        for panel, (title, of_panel) in zip(panels, shown, strict=False):
            for label, scores in of_panel.items():
                at = sorted(scores)
                errors = [scores[n].stderr or 0.0 for n in at]
                panel.errorbar(
                    at, [scores[n].value for n in at], errors, marker="o", markersize=4, capsize=3, label=label
                )
            panel.axvline(trained, color="gray", linestyle=":", label=f"trained with {trained} on average")
            loops_axis(panel, loops)
            panel.set_ylabel(title)
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
