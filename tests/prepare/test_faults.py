"""Conversions that are killed, interrupted or run out of disk space resume and write the same bytes.

The tool runs in its own processes, as users run it; only parts are small, so that there are many.
"""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest
from helpers.conversion import contents, ended
from helpers.disk import enlarge, small_disk

from mythos_dist.prepare.convert import convert

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).parents[2]
# tools/make_shards.py with parts of one row group. SLOW: seconds that each part takes longer, so that the tool can be
# interrupted between two parts on any machine.
TOOL = """
import os, runpy, sys, time
import mythos_dist.prepare.convert as shards
import mythos_dist.prepare.part
mythos_dist.prepare.part.MIN_PART_BYTES = 1
convert_part = shards.convert_part
def slow_part(*arguments):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return convert_part(*arguments)
shards.convert_part = slow_part
sys.argv = [sys.argv[1], *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def task(data_folder, tokenizer, tmp_path_factory):
    """(arguments, output folder of an uninterrupted conversion): 60 parts, held-out documents, duplicates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    work = tmp_path_factory.mktemp("faults")
    texts = [topics[name] for name in sorted(topics)]
    pq.write_table(pa.table({"text": (texts * 8)[:600]}), work / "corpus.parquet", row_group_size=10)
    arguments = [
        *("--input", str(work / "corpus.parquet"), "--tokenizer", str(tokenizer.path), "--seq-len", "64"),
        *("--heldout", "0.1", "--dedup", "--workers", "2"),
    ]
    result = run([*arguments, "--out", str(work / "uninterrupted"), "--json"])
    assert result.returncode == 0, result.stderr
    manifest = json.loads(result.stdout)
    assert manifest["documents"]["duplicate"] > 300 and manifest["seconds"] > 0 and manifest["tokens_per_second"] > 0
    return arguments, work / "uninterrupted"


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-c", TOOL, str(REPOSITORY / "tools/make_shards.py"), *arguments]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command(arguments), capture_output=True, text=True, timeout=240, cwd=REPOSITORY)


def wait_for(condition, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def test_conversion_and_verification_import_neither_torch_nor_streaming():
    """These take 700 MB in each worker."""
    code = "import mythos_dist.prepare.convert, mythos_dist.prepare.verify, sys\n"
    code += "print({*sys.modules} & {'torch', 'streaming'})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=REPOSITORY)
    assert result.stdout == "set()\n", result.stderr


@pytest.mark.timeout(800)
@pytest.mark.parametrize("times", [4, pytest.param(10, marks=pytest.mark.long)])
def test_a_conversion_killed_at_random_writes_the_same_bytes(task, tmp_path, seed, times):
    """kill -9 of the tool only; its workers end by themselves, so the next run has no concurrent writer."""
    arguments, uninterrupted = task
    draw = random.Random(seed)
    out, kills = tmp_path / "out", 0

    def records() -> int:
        return len(list(out.glob("unfinished/*")))

    while kills < times:
        job = subprocess.Popen(command([*arguments, "--out", str(out), "--quiet"]), cwd=REPOSITORY)
        if kills % 2:  # half of the kills are after some parts were written
            enough = records() + draw.randrange(12)
            wait_for(lambda: job.poll() is not None or records() > enough)  # noqa: B023
        time.sleep(draw.random() * 0.7)
        if job.poll() is not None:  # it completed before the kill
            assert job.returncode == 0 and contents(out) == contents(uninterrupted), f"{kills} kills"
            shutil.rmtree(out)
            continue
        family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        job.kill()
        job.wait()
        assert ended(family, 240), "a worker outlived its parent"
        kills += 1
    result = run([*arguments, "--out", str(out)])
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(uninterrupted)


def test_a_killed_worker_does_not_change_the_result(task, tmp_path):
    arguments, uninterrupted = task
    out = tmp_path / "out"
    job = subprocess.Popen(
        command([*arguments, "--out", str(out), "--quiet"]),
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLOW": "0.1"},
    )
    wait_for(lambda: len(list(out.glob("unfinished/part-*.json"))) > 5)
    psutil.Process(job.pid).children()[0].kill()
    _, errors = job.communicate(timeout=240)
    assert (job.returncode, errors) == (0, "")
    assert contents(out) == contents(uninterrupted)


def test_ctrl_c_prints_one_line_and_the_same_command_resumes(task, tmp_path):
    arguments, uninterrupted = task
    out = tmp_path / "out"
    job = subprocess.Popen(
        command([*arguments, "--out", str(out)]),
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "SLOW": "0.1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    wait_for(lambda: len(list(out.glob("unfinished/part-*.json"))) > 5)
    os.killpg(job.pid, signal.SIGINT)  # a terminal signals all processes of a job
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 130
    assert errors == "stopped; run the same command again to resume\n"
    result = run([*arguments, "--out", str(out)])
    assert result.returncode == 0 and re.search(r"converting: resuming, \d+ % already done", result.stderr)
    assert contents(out) == contents(uninterrupted)


# For about half of the parts; for the first ones; for nearly all.
@pytest.mark.parametrize("kilobytes", [160, *(pytest.param(size, marks=pytest.mark.long) for size in (64, 300))])
def test_a_full_disk_loses_nothing(task, tmp_path, kilobytes):
    arguments, uninterrupted = task
    size = sum(len(content) for content in contents(uninterrupted).values())
    assert size > 320_000, size
    with small_disk(tmp_path / "disk", kilobytes):
        out = tmp_path / "disk" / "out"
        result = run([*arguments, "--out", str(out)])
        assert result.returncode == 2
        assert "No space left on device" in result.stderr and "it resumes where it stopped" in result.stderr
        assert "Traceback" not in result.stderr and not (out / "manifest.json").exists()
        enlarge(tmp_path / "disk")
        result = run([*arguments, "--out", str(out)])
        assert result.returncode == 0, result.stderr
        assert contents(out) == contents(uninterrupted)


def test_output_without_a_terminal(task, tmp_path):
    """No progress bar. The summary is on standard output, unless --quiet is given."""
    arguments, _ = task
    result = run([*arguments, "--out", str(tmp_path / "out")])
    assert result.stderr == "" and "documents read, left out: " in result.stdout and "windows of 64" in result.stdout
    quiet = run([*arguments, "--out", str(tmp_path / "quiet"), "--quiet"])
    assert (quiet.stdout, quiet.stderr) == ("", "")
    again = run([*arguments, "--out", str(tmp_path / "out")])
    assert "already converted with these settings; nothing to do" in again.stderr


def test_progress_lines_are_printed_periodically_without_a_terminal(task, tokenizer, tmp_path, monkeypatch, capsys):
    from mythos_dist import progress

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    convert(task[0][1], tokenizer, 64, tmp_path / "out")
    *_, line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("converting")]
    assert re.fullmatch(r"converting: \d+ %, [\d.]+ MB/s, [\d.]+ Mtok/s, [\d.]+ GB on disk, 00:\d\d left", line)


def test_a_terminal_shows_a_progress_bar_with_rate_and_time_left(task, tmp_path):
    arguments, _ = task
    controller, terminal = pty.openpty()
    subprocess.run(["stty", "rows", "40", "cols", "150"], stdin=terminal, check=True)
    job = subprocess.Popen(command([*arguments, "--out", str(tmp_path / "out")]), cwd=REPOSITORY, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(controller, 4096):
            shown += piece
    except OSError:  # the tool has exited and closed the terminal
        pass
    os.close(controller)
    assert job.wait(timeout=120) == 0
    text = shown.decode()
    assert "finding duplicates" in text
    assert re.search(r"converting: +\d+%\|.*\[\d\d:\d\d<.*B/s, [\d.]+ Mtok/s, [\d.]+ GB on disk\]", text), text[-500:]


def test_invalid_options_exit_with_code_2_and_without_a_traceback(task, tmp_path):
    arguments, _ = task
    for more, message in [
        (["--seq-len", "0"], "seq_len=0 must be at least 1"),
        (["--heldout", "1.5"], "heldout=1.5 is a share"),
        (["--compression", "zip"], "compression=zip is not supported"),
        (["--input", "/absent/*.parquet"], "matches nothing"),
        (["--tokenizer", "/absent.model"], "no such file; train a tokenizer"),
        (["--text-column", "body"], "no column 'body'; the columns are text"),
        (["--min-score", "3"], "no column 'score'; the columns are text"),
    ]:
        result = run([*arguments, "--out", str(tmp_path / "out"), *more])
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
