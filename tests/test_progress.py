"""Progress: a bar with rate and time left on a terminal, nothing elsewhere; results as JSON.

A terminal is a stream that says that it is one. What bars count is compared with the sizes of the files.
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.small_checkpoint import write_run
from helpers.small_run import REPOSITORY
from safetensors.torch import load_file

from mythos_dist import progress
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.commands import COMMANDS
from mythos_dist.commands import main as mythos
from mythos_dist.progress import Bar


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """What is written to standard error, which is a terminal."""
    stream = Terminal()
    # Not sys.stderr itself: pytest sets it after the fixtures.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(words…)` runs `mythos WORDS` in this process; returns standard output. The exit code must be 0."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mythos", *map(str, words)])
        try:
            mythos.main()
        except SystemExit as exited:
            assert not exited.code
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def run_dir(config, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("progress") / "run", config)


# --- the bar


def test_a_removed_bar_leaves_the_cursor_at_the_begin_of_its_line(monkeypatch):
    """Also where standard error is buffered, as during training: what standard output prints next begins there."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(io.BufferedWriter(written), encoding="utf-8", newline="")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    with Bar("loading", 10) as shown:
        shown.update(10)
    cleared = written.getvalue().decode()
    assert "loading" in cleared and re.search(r"\r +\r$", cleared)


def test_a_bar_shows_share_rate_and_time_left(terminal, monkeypatch):
    """300 of 1,200 units in 3 s: 25 %, 100 per second, 9 s left."""
    now = [50.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar = Bar("checking", 1200, unit=" units")
    bar._bar._time = lambda: now[0]
    now[0] += 3
    bar.update(300)
    shown = terminal.getvalue().split("\r")[-1]
    assert re.match(r"checking:  25%\|.*\| 300/1200 \[00:03<00:0[89], 100.00 units/s\]", shown), shown
    bar.close()
    assert terminal.getvalue().endswith("\r") and not terminal.getvalue().split("\r")[-2].strip()  # it is removed


def test_a_resumed_bar_does_not_count_earlier_units_in_its_rate(terminal, monkeypatch):
    now = [50.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar = Bar("checking", 1000, unit=" units", initial=500)
    bar._bar._time = lambda: now[0]
    now[0] += 5
    bar.show(600, rates="3 files/s")
    assert re.search(r" 60%\|.*\| 600/1000 \[00:05<00:(?:20|19), 20.00 units/s, 3 files/s\]", terminal.getvalue())


def test_a_second_count_of_the_same_bar_begins_at_zero(terminal, monkeypatch):
    """An evaluation counts the requests of one number of loops after the other."""
    now = [50.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar = Bar("evaluating", unit=" requests")
    bar._bar._time = lambda: now[0]
    for seconds, done, total in ((1, 50, 100), (1, 100, 100), (1, 10, 80), (1, 20, 80)):
        now[0] += seconds
        bar.show(done, total)
    assert re.search(r"25%\|.*\| 20/80 \[00:01<00:0\d, ", terminal.getvalue().split("\r")[-1])


@pytest.mark.parametrize("stream", [io.StringIO(), None], ids=["file", "closed"])
def test_without_a_terminal_nothing_is_written(stream, monkeypatch):
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Bar("checking", 10) as bar:
        bar.describe("another check")
        bar.update(3)
        bar.show(10, rates="much")
        assert bar.done == 10
    assert stream is None or stream.getvalue() == ""


def test_a_quiet_bar_shows_nothing_on_a_terminal(terminal):
    with Bar("checking", 10, quiet=True, log_lines=True) as bar:
        bar.update(10)
    assert terminal.getvalue() == ""


def test_lines_of_a_log_have_share_rate_and_time_left(monkeypatch, capsys):
    """2 MB of 8 MB in 4 s, after 1 MB that an earlier process had done."""
    now = [50.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Bar("converting", 8e6, initial=1e6, log_lines=True)
    now[0] += 4
    bar.update(1e6)
    assert capsys.readouterr().err == ""  # a minute has not passed
    monkeypatch.setattr(bar, "_next_line", 0.0)
    bar.show(3e6, rates="1 file/s")
    assert capsys.readouterr().err == "converting: 38 %, 0.5 MB/s, 1 file/s, 00:10 left\n"


# --- the commands


@pytest.mark.launch
@pytest.mark.parametrize(("on_terminal", "lines"), [(True, 1), (False, 0)])
def test_training_says_at_once_that_it_starts_but_only_on_a_terminal(on_terminal, lines, tmp_path):
    """Before PyTorch is imported, which takes seconds. Standard error is one end of a pseudo-terminal, or a file."""
    reader, terminal = os.openpty()
    file = os.open(tmp_path / "err", os.O_CREAT | os.O_RDWR)
    command = [sys.executable, "-m", "mythos_dist.train", "tiny_cpu", "data.path=missing", f"run.dir={tmp_path}/run"]
    result = subprocess.run(command, stderr=terminal if on_terminal else file, cwd=tmp_path, timeout=240)
    shown = os.read(reader, 10_000).decode() if on_terminal else (tmp_path / "err").read_text()
    for descriptor in (reader, terminal, file):
        os.close(descriptor)
    assert result.returncode == 2 and "missing: no such folder" in shown
    assert shown.count("starting: imports") == lines


def commands_with_bars(run_dir: Path, shards: Path, out: Path) -> dict[str, tuple[list[object], set[str]]]:
    """Command -> its arguments, and the bars that it shows."""
    loading = {"verifying", "loading"}
    return {
        "generate": ([run_dir, "--prompt", "The", "--max-new-tokens", 2], loading),
        "depth-sweep": ([run_dir, "--loops", "1,3", "--samples", 4, "--out", out / "sweep"], {*loading, "evaluating"}),
        "decoding-quality": ([run_dir, "--cache", "all", "--samples", 2, "--tokens", 8], {*loading, "decoding"}),
        "export": ([run_dir, "--out", out / "exported"], {"exporting"}),
        "average": ([run_dir, run_dir, "--out", out / "mean"], {"averaging"}),
        "reshape": ([run_dir, "--out", out / "run"], {"writing"}),
        "inspect": ([run_dir], {"verifying"}),
        "verify": ([shards, "--workers", 0], {"verifying"}),
    }


BARS = "generate depth-sweep decoding-quality export average reshape inspect verify".split()


@pytest.mark.parametrize("name", BARS)
def test_a_command_shows_its_bars_on_a_terminal(name, run, run_dir, shards, tmp_path, terminal):
    arguments, bars = commands_with_bars(run_dir, shards, tmp_path)[name]
    run(name, *arguments)
    shown = terminal.getvalue()
    finished = re.findall(r"\r([a-z ]+): 100%\|[^\r]*\[\d\d:\d\d<", shown)
    assert set(finished) == bars, shown


@pytest.mark.parametrize("name", BARS)
def test_a_command_shows_no_bar_without_a_terminal(name, run, run_dir, shards, tmp_path, monkeypatch):
    arguments, _ = commands_with_bars(run_dir, shards, tmp_path)[name]
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    run(name, *arguments)
    assert stream.getvalue() == ""


@pytest.mark.launch
def test_a_report_counts_the_bytes_of_all_runs(run, run_dir, tmp_path, terminal):
    """Two files of two and three megabytes: the bar ends at their sum."""
    line = json.dumps({"step": 1, "loss": 2.0}) + "\n"
    folders = []
    for name, size in (("a", 2 << 20), ("b", 3 << 20)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "writer.json").write_text(json.dumps({"start": 1, "state": "completed", "host": "node1"}))
        (folders[-1] / "metrics.jsonl").write_text(line * (size // len(line)))
    run("report", *folders, "--out", tmp_path / "report.html")
    total = sum((folder / "metrics.jsonl").stat().st_size for folder in folders)
    assert re.search(rf"reading: +\d+%\|.*/{total / 1e6:.2f}M", terminal.getvalue())


@pytest.mark.launch
def test_a_dry_run_counts_to_a_hundred_percent(run, terminal):
    """Of the planned FLOPs, which for this layout are those that it executes; a pipeline runs a step before."""
    layout = "parallel.pipe=2 train.global_batch=16".split()
    run("plan", REPOSITORY / "configs" / "tiny_cpu.yaml", *layout, "--gpus", 4, "--as-is", "--dry-run")
    shown = terminal.getvalue()
    percent = [int(one) for one in re.findall(r"dry run of a step: +(\d+)%", shown)]
    assert percent == sorted(percent) and percent[-1] >= 90, shown
    assert "building the rank" in shown


# --- JSON

JSON_COMMANDS = [
    *("plan", "doctor", "status", "shards", "import tokens", "verify", "tokenizer", "inspect", "export", "import hf"),
    "retrofit",
    *("import deepspeed", "import open-mythos", "average", "reshape", "generate", "evaluate", "depth-sweep"),
]


@pytest.mark.parametrize("name", JSON_COMMANDS)
def test_commands_that_programs_read_have_json(name):
    (command,) = [command for command in COMMANDS if command.name == name]
    assert "--json" in command.load_parser().format_help()


def test_json_of_an_export_a_mean_and_an_import_is_what_is_in_their_files(run, run_dir, tmp_path):
    """Bytes of the files; parameters of the tensors in them."""
    for name, arguments in {
        "export": [run_dir],
        "average": [run_dir, run_dir],
        "import hf": [tmp_path / "hf"],
    }.items():
        if name == "import hf":
            run("export", run_dir, "--out", tmp_path / "hf", "--format", "hf", "--quiet")
        out = tmp_path / name
        result = json.loads(run(*name.split(), *arguments, "--out", out, "--json"))
        files = list(out.glob("*.safetensors"))
        assert (result["out"], result["bytes"]) == (str(out), sum(file.stat().st_size for file in files))
        tensors = {key: value for file in files for key, value in load_file(file).items()}
        buffers = sum(value.numel() for key, value in tensors.items() if key.endswith("router.bias"))
        assert result["parameters"] == sum(value.numel() for value in tensors.values()) - buffers, name
        assert isinstance(result["notes"], list)


def test_json_of_a_rewritten_checkpoint_names_the_new_one(run, run_dir, tmp_path):
    result = json.loads(run("reshape", run_dir, "--out", tmp_path / "run", "--json"))
    assert Checkpoint(Path(result["out"])).manifest.step == result["step"] == 3
    assert Path(result["out"]).parent.parent == tmp_path / "run"
