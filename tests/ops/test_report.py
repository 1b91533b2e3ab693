"""The report of a run: its page in a real browser, its values against the lines that the run wrote."""

import json
import math
import os
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from helpers.browser import CHROMIUM, HINT, evaluate, screenshot
from helpers.small_run import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.errors import UserError
from mythos_dist.ops.report import metrics_file
from mythos_dist.ops.report.command import distinct_names, run, write_report
from mythos_dist.ops.report.metrics_file import envelope, quantiles, ranges, read_metrics
from mythos_dist.ops.report.page import render, summary
from mythos_dist.ops.report.run import page_data, read_run

browser = pytest.mark.skipif(CHROMIUM is None, reason=HINT)
LOAD = {"counts": [[3, 1], [2, 2]]}  # (loops, experts) tokens
CONFIG = "train: {steps: 100000, seq_len: 32, global_batch: 4}\noptim: {lr: 0.001}\n"
A, B = ({"name": name, "fingerprint": 2 * name, "sequences": 60} for name in "ab")
DATA = {"seq_len": 32, "corpora": [A, B]}


def line_of(step: int) -> dict:
    """A line of metrics.jsonl: every value is another function of the step."""
    return {
        "step": step, "time": 1.7e9 + 2 * step, "loss": 8 / (1 + step / 50), "grad_norm": 1 + 1 / step,
        "lr": step * 1e-6,
        "phase": "warmup" if step < 4 else "decay", "n_loops": 4, "backprop": 4, "tokens": 128 * step,
        "tokens_total": 128 * step, "step_seconds": 1 + (step % 7) / 10, "tokens_per_second": 128.0, "mfu": 0.4,
        "objective": 8.0, "expert_load_max": 1.5, "experts_idle": 0, "skipped": False, "data_wait_seconds": 0.01,
        "memory_gb": 1 + step / 1e6, "by_corpus": [3, 1], **({"data": DATA} if step == 1 else {}),
    }  # fmt: skip


def write_run(folder, steps: int, change=lambda line: line, **files: str):
    """A run folder as training leaves it, with `steps` lines, each after `change`."""
    folder.mkdir(parents=True)
    writer = {"start": 2, "state": "completed", "why": "", "host": "node1", "step": steps, "time": 1.7e9}
    files = {"writer.json": json.dumps(writer), "COMPLETED": f"{steps}\n", "config.yaml": CONFIG} | files
    for name, text in files.items():
        (folder / name).write_text(text)
    with (folder / "metrics.jsonl").open("w") as stream:
        stream.writelines(json.dumps(change(line_of(step))) + "\n" for step in range(1, steps + 1))
    return folder


@browser
@pytest.mark.launch
@pytest.mark.parametrize("steps", [1, 40, 30_000])
def test_the_page_draws_the_values_of_metrics_jsonl(steps, tmp_path):
    """In Chromium without a network: each point of a short run; of a long one its ends, its extremes and its means.
    Also memory beside the plan, the load of the experts, checkpoints with their sizes, and tokens by corpus."""
    spike = steps // 2 + 1

    def change(line):
        last = {"planned": {"memory_gb": 2.5, "measured_memory_gb": 1.5}} if line["step"] == steps else {}
        return line | ({"grad_norm": 1000.0} if line["step"] == spike else {}) | last

    evaluations = [{"step": step, "heldout_loss": 9 - step / steps, "accuracy": 0.1} for step in (0, steps)]
    files = {
        "eval.jsonl": "\n".join(map(json.dumps, evaluations)),
        "expert_load.json": json.dumps(LOAD | {"step": steps}),
    }
    folder = write_run(tmp_path / "run", steps, change, **files)
    saved = folder / "checkpoints" / f"step-{steps:08d}"
    saved.mkdir(parents=True)
    (saved / "checkpoint.json").write_bytes(b"header\n{}")
    (saved / "values").write_bytes(bytes(1_500_000))
    write_report([folder], tmp_path / "report.html")
    script = (
        "[...['loss', 'grad_norm', 'lr', 'memory_gb'].map(id => document.getElementById(id).data.map(t => "
        "[t.name, t.x, t.y])), document.getElementById('experts-0').data[0].z, "
        "[...document.querySelectorAll('table tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))]"
    )
    loss, norm, lr, memory, load, rows = evaluate(tmp_path / "report.html", script)
    lines = [change(line_of(step)) for step in range(1, steps + 1)]
    assert load == [[1.5, 0.5], [1, 1]]
    assert ["run", f"{steps}", "1.5MB"] in rows, "the checkpoint"
    assert [row[3] for row in rows if row[:2] in (["run", "a"], ["run", "b"])] == ["75.0 %", "25.0 %"]
    assert ["run", "peak memory of a rank", "2.5 GB", "1.5 GB", "0.60"] in rows
    held = {name: y for name, _, y in memory if name}
    assert held["planned"] == [2.5, 2.5]
    assert max(held["memory"]) == pytest.approx(1 + steps / 1e6, rel=1e-4)
    drawn = {name: (x, y) for name, x, y in loss if name}
    assert drawn["held out"] == ([0, steps], [9, 8])
    assert drawn["training"][0][-1] == steps
    (curve,) = (y for name, _, y in lr if name == "learning rate")
    if steps <= metrics_file.POINTS:
        assert drawn["training"][0] == list(range(1, steps + 1))
        assert drawn["training"][1] == pytest.approx([line["loss"] for line in lines], rel=1e-8)
        assert curve == pytest.approx([line["lr"] for line in lines], rel=1e-8)
    else:
        width = steps // metrics_file.POINTS
        means = np.reshape([line["loss"] for line in lines], (-1, width)).mean(1)
        assert drawn["training"][1] == pytest.approx(means.tolist(), rel=1e-8)
    assert max(value for _, _, y in norm for value in y if value is not None) == 1000, "a spike is not averaged away"


@browser
@pytest.mark.launch
def test_the_page_is_light_or_dark_as_the_reader_prefers(tmp_path):
    """The image is mostly background, and has curves in their color."""
    folder = write_run(tmp_path / "run", 40)
    write_report([folder], tmp_path / "report.html")
    for dark, background in ((False, (255, 255, 255)), (True, (0x14, 0x17, 0x1D))):
        option = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        image = screenshot(tmp_path / "report.html", tmp_path / f"{dark}.png", option)
        assert (image[0, 0] == background).all()
        assert (np.abs(image.astype(int) - (0x2A, 0x6F, 0xDB)).max(-1) < 12).sum() > 500, "pixels of curves"


@browser
@pytest.mark.launch
def test_words_in_tables_are_not_broken_on_a_phone(tmp_path):
    """At a width of 340 pixels: a word has one rectangle. Only what does not fit is scrolled, not the page."""
    planned = {"planned": {"memory_gb": 2.5, "measured_memory_gb": 1.5}}
    folder = write_run(tmp_path / "run", 40, lambda line: line | (planned if line["step"] == 40 else {}))
    write_report([folder], tmp_path / "report.html")
    script = """(document.body.style.width = "340px", [[...document.querySelectorAll("table")].map(table =>
        [...table.querySelectorAll("tbody td")].map(cell => cell.firstChild).filter(text => text && text.length < 12 &&
        !text.data.includes(" ")).map(text => { const range = document.createRange(); range.selectNodeContents(text);
        return range.getClientRects().length })).flat(), document.querySelectorAll(".scroll > table").length ===
        document.querySelectorAll("table").length])"""
    rectangles, can_scroll = evaluate(tmp_path / "report.html", script, "--window-size=500,1800")
    assert len(rectangles) > 4 and set(rectangles) <= {0, 1} and can_scroll  # 0: in a section that is closed


@browser
@pytest.mark.launch
def test_markup_in_a_runs_files_is_text(tmp_path):
    evil = (
        "</script><script>document.body.dataset.owned = 1</script><img src=x onerror='document.body.dataset.owned=1'>"
    )
    restart = {"start": 2, "from_step": 3, "why": evil, "seconds_lost": 5.0, "seconds_idle": 0.0}
    config = CONFIG + f"run: {{dir: {json.dumps(evil)}}}\n"
    files = {"restarts.jsonl": json.dumps(restart), "config.yaml": config}
    folder = write_run(tmp_path / "run", 5, lambda line: line | {"decision": evil}, **files)
    (tmp_path / "report.html").write_text(render([read_run(folder, evil)]))
    owned, heading, text = evaluate(
        tmp_path / "report.html",
        "[document.body.dataset.owned || null, document.querySelector('h1').textContent, document.body.textContent]",
    )
    assert owned is None and heading == evil and text.count(evil) > 5


def test_events_are_marked_with_their_reasons(tmp_path):
    def change(line):
        return line | ({"skipped": True} if line["step"] == 7 else {}) | ({"stage": "late"} if line["step"] > 8 else {})

    restart = {"start": 2, "from_step": 5, "why": "rank 0 received SIGTERM", "seconds_lost": 61.0, "seconds_idle": 4.0}
    report = read_run(write_run(tmp_path / "run", 10, change, **{"restarts.jsonl": json.dumps(restart)}))
    assert [(event.step, event.kind) for event in report.events] == [
        (4, "phase"), (5, "restart"), (7, "skipped"), (9, "stage"),
    ]  # fmt: skip
    page = render([report])
    assert "start 2: rank 0 received SIGTERM" in page
    assert summary(report)["lost to restarts"] == "1 min 1 s"


def test_data_seen_is_the_sum_over_starts_and_stages(tmp_path):
    """10 steps of 3 sequences of a and 1 of b, at first of 32 tokens. At step 6 the run resumed with another folder for
    the shards of a; from step 9 on a stage reads b and c in sequences of 64 tokens, 30 and 20 of them."""
    moved = {"seq_len": 32, "corpora": [A | {"name": "moved/a"}, B]}
    stage = {
        "seq_len": 64,
        "corpora": [B | {"sequences": 30}, {"name": "c", "fingerprint": "cc", "sequences": 20}],
    }
    entries = {6: {"data": moved}, 9: {"data": stage}, 10: {"by_corpus": ["3", 1, None]}}
    report = read_run(write_run(tmp_path / "run", 10, lambda line: line | entries.get(line["step"], {})))
    seen = {name: (one.name, one.tokens, round(one.epochs, 6)) for name, one in report.metrics.corpora.items()}
    assert seen == {
        "aa": ("moved/a", 8 * 3 * 32, 0.4),
        "bb": ("b", 8 * 32 + 3 * 64, round(8 / 60 + 3 / 30, 6)),
        "cc": ("c", 64, 0.05),
    }
    damaged = read_run(write_run(tmp_path / "damaged", 3, lambda line: line | {"data": {"corpora": [3]}}))
    assert not damaged.metrics.corpora and "Data seen" not in render([damaged])


def test_a_comparison_lists_the_settings_that_differ(tmp_path):
    first = write_run(tmp_path / "x" / "run", 5)
    second = write_run(tmp_path / "y" / "run", 5, **{"config.yaml": CONFIG.replace("0.001", "0.002")})
    assert distinct_names([first, second]) == ["x/run", "y/run"]
    write_report([first, second], tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    differences = page[page.index("Differences of the settings") : page.index("All settings")]
    assert "optim.lr" in differences and "0.002" in differences and "train.seq_len" not in differences
    headings = re.findall(r"<h2>([^<]+)</h2><div class=cards>", page)
    assert headings == ["x/run", "y/run"], "which run the values are of"
    write_report([first], tmp_path / "one.html")
    assert "<div class=cards>" in (one := (tmp_path / "one.html").read_text()) and "</h2><div class=cards>" not in one


def test_a_damaged_or_unfinished_run_is_shown_as_far_as_it_can_be_read(tmp_path):
    folder = write_run(tmp_path / "run", 5, **{"config.yaml": "a: [", "expert_load.json": '{"counts": 3}'})
    os.remove(folder / "COMPLETED")
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(b'\xff\n[]\n{"step": true}\n\n{"step": 6, "loss": null}\n{"step": 7, "lo')
    report = read_run(folder)
    assert len(report.metrics) == 6 and report.metrics.invalid == 4
    assert math.isnan(report.metrics.columns["loss"][-1])
    page = render([report])
    for problem in ("4 lines that are not steps", "config.yaml cannot be read", "expert_load.json cannot be read"):
        assert problem in page


@pytest.mark.launch
def test_infinite_numbers_and_deep_nesting_in_a_runs_files_are_no_values(tmp_path):
    deep, infinite = (
        "[" * 5000,
        '{"step": 1e400}\n{"step": 3, "heldout_loss": NaN, "by_loops": {"2": {"loss": 1e999}}}\n',
    )
    files = {
        "config.yaml": deep,
        "expert_load.json": deep,
        "eval.jsonl": infinite,
        "restarts.jsonl": '{"from_step": 1e400}\n',
    }
    report = read_run(write_run(tmp_path / "run", 2, lambda line: line | {"depth": {"failures": None}}, **files))
    assert len(report.problems) == 2 and report.events == []
    assert [line["step"] for line in report.evaluations] == [3]
    assert '"heldout_loss": null' in render([report])


def test_a_run_without_a_step_has_a_page(tmp_path):
    report = read_run(write_run(tmp_path / "run", 0))
    assert page_data(report)["x"]["step"] == [] and "<h1>run</h1>" in render([report])


def test_a_folder_that_is_no_run_is_refused_and_all_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError) as error:
        write_report([tmp_path / name for name in ("empty", "missing", "circle")], tmp_path / "report.html")
    assert len(error.value.problems) == 3 and not (tmp_path / "report.html").exists()


@pytest.mark.launch
def test_the_tool_writes_the_page_and_needs_no_torch(tmp_path):
    """--watch ends with the run. A login node may not have the memory to import torch."""
    folder = write_run(tmp_path / "run", 3)
    code = (
        f"import sys, runpy; sys.argv = ['report.py', {str(folder)!r}, '--watch', '1']\n"
        "try: runpy.run_path('tools/report.py', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.html") and (folder / "report.html").stat().st_size > 1e6


def test_a_page_is_written_to_a_new_folder(tmp_path):
    run([write_run(tmp_path / "run", 3)], tmp_path / "new" / "report.html", None)
    assert (tmp_path / "new" / "report.html").stat().st_size > 1e6


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=60), st.integers(1, 20))
def test_an_envelope_has_the_extremes_and_means_of_its_ranges(values, points):
    """Against Python's min, max and sum over each range."""
    array = np.array(values, dtype=np.float64)
    begins = ranges(len(array), points)
    assert len(begins) == min(points, len(array))
    curve = envelope(array, begins)
    (median,) = quantiles(array, begins, (0.5,))
    for i, part in enumerate(np.split(array, begins[1:]) if len(array) else []):
        finite = sorted(x for x in part.tolist() if math.isfinite(x))
        if not finite:
            assert all(math.isnan(x) for x in (curve.mean[i], curve.low[i], curve.high[i], median[i]))
            continue
        assert (curve.low[i], curve.high[i]) == (finite[0], finite[-1])
        assert curve.mean[i] == pytest.approx(math.fsum(finite) / len(finite), rel=1e-9, abs=1e-6)
        assert finite[(len(finite) - 1) // 2] <= median[i] <= finite[len(finite) // 2]


@pytest.mark.launch
def test_memory_grows_so_slowly_that_a_million_steps_take_less_than_500_mb(tmp_path):
    """By the growth from 5,000 to 10,000 steps, both with more steps than points: at most 300 bytes per step, so 300 MB
    beside Python's and NumPy's own 60; `benchmarks/report_page.py` measures a million."""
    peaks = []
    for steps in (5_000, 10_000):
        folder = write_run(tmp_path / str(steps), steps)
        tracemalloc.start()
        page_data(read_run(folder))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    columns = 8 * len(metrics_file.COLUMNS)  # bytes per step
    assert 0.8 * columns < (peaks[1] - peaks[0]) / 5_000 < 300


def test_probes_of_a_long_run_are_thinned_out_evenly(tmp_path):
    steps = 8 * metrics_file.MAX_PROBES + 1
    folder = write_run(
        tmp_path / "run", steps, lambda line: line | {"depth": {"act_mass": [1.0], "failures": ["growth"]}}
    )
    metrics = read_metrics(folder / "metrics.jsonl")
    distances = np.diff([probe.step for probe in metrics.probes])
    assert metrics_file.MAX_PROBES <= len(metrics.probes) < 2 * metrics_file.MAX_PROBES
    assert set(distances.tolist()) == {distances[0]} and metrics.probes[0].step == 1
    assert metrics.failures == {"growth": steps}
