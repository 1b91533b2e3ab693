"""The report as one HTML page that needs no network: Plotly, the data and the tables are in it.

All text is escaped, and the script reads the data as JSON, so nothing in a run's files is markup.

Decisions: PROJECT-5.
"""

import html
import json
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from mythos_dist.errors import redact
from mythos_dist.ops.report.run import RunReport, page_data
from mythos_dist.units import format_duration, short, short_bytes

_MARKS = {"decision", "skipped", "restart"}
MAX_ROWS = 200  # of the table of events


def render(reports: Sequence[RunReport], refresh: int | None = None) -> str:
    """The page. `refresh`: seconds after which a browser reads it again, unless its reader has zoomed."""
    from plotly.offline import get_plotlyjs  # 5 MB

    resources = files("mythos_dist.ops.report")
    title = html.escape(" · ".join(report.name for report in reports))
    controls = (
        "<label>x axis <select id=x><option value=step>steps</option><option value=tokens>tokens</option>"
        "<option value=hours>hours</option></select></label>"
        "<label>smooth <input id=smooth type=range min=1 max=100 value=1></label>"
        "<label><input id=log type=checkbox> loss on a log scale</label><button id=theme type=button></button>"
    )
    body = [
        f"<header><h1>{title}</h1><div class=controls>{controls}</div></header>",
        *(_state(report, len(reports) > 1) for report in reports),
        *(_cards(report, len(reports) > 1) for report in reports),
        "<div id=charts class=charts></div>",
        _events(reports),
        _planned(reports),
        _checkpoints(reports),
        _corpora(reports),
        _config(reports),
        _environment(reports),
    ]
    data = json.dumps(finite([page_data(report) for report in reports]), allow_nan=False).replace("<", "\\u003c")
    attributes = f' data-refresh="{refresh}"' if refresh else ""
    return "\n".join(
        [
            f'<!doctype html><html lang="en"{attributes}><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{resources.joinpath('page.css').read_text(encoding='utf-8')}</style></head><body>",
            *filter(None, body),
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{resources.joinpath('page.js').read_text(encoding='utf-8')}</script></body></html>",
        ]
    )


def _state(report: RunReport, several: bool) -> str:
    name = f"{report.name}: " if several else ""
    problems = [
        *report.problems,
        *(f"{name} (last seen at step {step})" for name, step in report.metrics.failures.items()),
    ]
    lines = [f"<p class=state>{html.escape(name + '; '.join(filter(None, (report.state, report.why))))}</p>"]
    return "".join(lines + [f"<p class=problem>{html.escape(name + problem)}</p>" for problem in problems])


def summary(report: RunReport) -> dict[str, str]:
    """The most important values, as text."""
    columns, facts = report.metrics.columns, {}
    if not len(report.metrics):
        return {"steps": "0"}
    steps = report.config.get("train.steps")
    step = int(columns["step"][-1])
    facts["steps"] = f"{step:,}" + (f" of {steps:,}" if isinstance(steps, int) and step <= steps else "")
    if tokens := _last(columns["tokens_total"]):
        facts["tokens"] = short(tokens)
    if (loss := _last(columns["loss"])) is not None:
        facts["training loss"] = f"{loss:.4f}"
    heldout = [one for line in report.evaluations if isinstance(one := line.get("heldout_loss"), (int, float))]
    if heldout:
        facts["held-out loss"] = f"{heldout[-1]:.4f}"
        facts["best held-out loss"] = f"{min(heldout):.4f}"
    seconds = columns["step_seconds"][np.isfinite(columns["step_seconds"])]
    if len(seconds):
        half, most, last = np.quantile(seconds, (0.5, 0.95, 0.99))
        facts["step time, median"] = f"{half:.3g} s"
        facts["step time, p95 / p99"] = f"{most:.3g} / {last:.3g} s"
        facts["time in steps"] = format_duration(float(seconds.sum()))
        waits = np.nan_to_num(columns["data_wait_seconds"]).sum()
        facts["waiting for data"] = f"{100 * waits / seconds.sum():.2g} %"
    for name, label, scale, unit in (
        ("tokens_per_second", "tokens/s, median", 1, ""),
        ("mfu", "MFU, median", 100, " %"),
    ):
        values = columns[name][np.isfinite(columns[name])]
        if len(values):
            value = float(np.median(values)) * scale
            facts[label] = (f"{value:.1f}" if unit else short(value)) + unit
    facts["restarts"] = str(len(report.restarts))
    lost = [one for line in report.restarts if isinstance(one := line.get("seconds_lost"), (int, float))]
    if lost:
        facts["lost to restarts"] = format_duration(sum(lost))
    if skipped := sum(event.kind in ("skipped", "decision") for event in report.metrics.events):
        facts["skipped or repeated steps"] = str(skipped)
    return facts


def finite(value: Any) -> Any:
    """JSON data without NaN and infinity, which files may have and JSON does not: null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last(values: np.ndarray) -> float | None:
    numbers = values[np.isfinite(values)]
    return float(numbers[-1]) if len(numbers) else None


def _cards(report: RunReport, several: bool) -> str:
    cards = "".join(f"<div class=card><span>{key}</span><b>{value}</b></div>" for key, value in summary(report).items())
    name = f"<h2>{html.escape(report.name)}</h2>" if several else ""
    return f"{name}<div class=cards>{cards}</div>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = (), attributes: str = ""
) -> str:
    def cells(row: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in numbers else ''}>{html.escape(str(value))}</{tag}>"
            for i, value in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    table = f"<table{attributes}><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


def _section(title: str, content: str, folded: bool = False) -> str:
    if folded:
        return f"<h2>{title}</h2><details><summary>show</summary>{content}</details>"
    return f"<h2>{title}</h2>{content}"


def _events(reports: Sequence[RunReport]) -> str:
    rows = [
        (report.name, event.step, event.kind, event.text)
        for report in reports
        for event in report.events
        if event.kind in _MARKS
    ]
    if not rows:
        return ""
    left_out = len(rows) - MAX_ROWS + sum(report.metrics.events_left_out for report in reports)
    note = f"<p class=state>{left_out} more are not listed</p>" if left_out > 0 else ""
    table = _table(("run", "step", "kind", "reason"), rows[:MAX_ROWS], (1,))
    return _section("Restarts, skipped and repeated steps", table + note)


def _planned(reports: Sequence[RunReport]) -> str:
    rows = []
    for report in reports:
        planned = report.metrics.planned
        for name, key, unit in (("peak memory of a rank", "memory_gb", "GB"), ("step time", "step_seconds", "s")):
            measured = planned.get(f"measured_{key}")
            if isinstance(measured, (int, float)):
                plan = planned.get(key)
                known = isinstance(plan, (int, float))
                ratio = f"{measured / plan:.2f}" if known and plan else ""
                rows.append(
                    (
                        report.name,
                        name,
                        f"{plan:.4g} {unit}" if known else "not planned",
                        f"{measured:.4g} {unit}",
                        ratio,
                    )
                )
    table = _table(("run", "", "planned", "measured", "measured / planned"), rows, (2, 3, 4))
    note = "memory is planned for tensors; measured is PyTorch's allocator on a GPU, and the whole process on a CPU"
    return _section("Planned and measured", f"{table}<p class=state>{note}</p>") if rows else ""


def _checkpoints(reports: Sequence[RunReport]) -> str:
    rows = [(report.name, one.step, short_bytes(one.bytes)) for report in reports for one in report.checkpoints]
    return _section("Checkpoints", _table(("run", "step", "size"), rows, (1, 2))) if rows else ""


def _corpora(reports: Sequence[RunReport]) -> str:
    rows = []
    for report in reports:
        total = sum(one.tokens for one in report.metrics.corpora.values())
        rows += [
            (report.name, one.name, short(one.tokens), f"{100 * one.tokens / total:.1f} %", f"{one.epochs:.3g}")
            for one in report.metrics.corpora.values()
            if total
        ]
    table = _table(("run", "corpus", "tokens", "share", "epochs"), rows, (2, 3, 4))
    return _section("Data seen", table) if rows else ""


def _config(reports: Sequence[RunReport]) -> str:
    keys = list(dict.fromkeys(key for report in reports for key in report.config))
    if not keys:
        return ""
    texts = {
        key: ["" if key not in report.config else redact(str(report.config[key])) for report in reports] for key in keys
    }
    head = ("setting", *(report.name for report in reports))
    differing = [key for key in keys if len(set(texts[key])) > 1]
    parts = [_table(head, [(key, *texts[key]) for key in differing])] if differing else []
    every = _table(head, [(key, *texts[key]) for key in keys], attributes=" id=settings")
    search = '<p class=controls><label>filter <input id=filter type=search placeholder="optim."></label></p>'
    title = "Differences of the settings" if differing else ""
    first = _section(title, parts[0]) if differing else ""
    return first + _section("All settings", search + every, folded=True)


def _environment(reports: Sequence[RunReport]) -> str:
    keys = list(dict.fromkeys(key for report in reports for key in report.environment))
    rows = [(key, *(report.environment.get(key, "") for report in reports)) for key in keys]
    return _section("Environment", _table(("", *(report.name for report in reports)), rows), folded=True)
