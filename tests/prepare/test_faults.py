"""Conversions that are killed, interrupted or run out of disk go on where they were, and the result is the same bytes.

The tool runs as its users run it, in processes of its own; only the size of parts is small, so that there are many.
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
# tools/make_shards.py with parts of one row group, as a user's command otherwise. With SLOW a part takes as long as a
# larger one would: long enough to interrupt the tool between two of them on any machine.
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
    """(arguments, the folder that an undisturbed conversion makes): 60 parts, held-out documents, duplicates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    work = tmp_path_factory.mktemp("faults")
    texts = [topics[name] for name in sorted(topics)]
    pq.write_table(pa.table({"text": (texts * 8)[:600]}), work / "corpus.parquet", row_group_size=10)
    arguments = [
        *("--input", str(work / "corpus.parquet"), "--tokenizer", str(tokenizer.path), "--seq-len", "64"),
        *("--heldout", "0.1", "--dedup", "--workers", "2"),
    ]
    told = run([*arguments, "--out", str(work / "whole"), "--json"])
    assert told.returncode == 0, told.stderr
    manifest = json.loads(told.stdout)
    assert manifest["documents"]["duplicate"] > 300 and manifest["seconds"] > 0 and manifest["tokens_per_second"] > 0
    return arguments, work / "whole"


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-c", TOOL, str(REPOSITORY / "tools/make_shards.py"), *arguments]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command(arguments), capture_output=True, text=True, timeout=240, cwd=REPOSITORY)


def wait_for(condition, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def test_nothing_that_converts_imports_torch_or_streaming():
    """They take 700 MB in each worker."""
    code = "import mythos_dist.prepare.convert, mythos_dist.prepare.verify, sys\n"
    code += "print({*sys.modules} & {'torch', 'streaming'})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=REPOSITORY)
    assert told.stdout == "set()\n", told.stderr


@pytest.mark.timeout(800)
def test_killed_ten_times_at_random_moments_it_ends_with_the_same_bytes(task, tmp_path, seed):
    """kill -9 of the tool alone; its workers end by themselves, so the next run has the folder for itself."""
    arguments, whole = task
    draw = random.Random(seed)
    out, kills = tmp_path / "out", 0

    def records() -> int:
        return len(list(out.glob("unfinished/*")))

    while kills < 10:
        job = subprocess.Popen(command([*arguments, "--out", str(out), "--quiet"]), cwd=REPOSITORY)
        if kills % 2:  # half of the kills come once there is something to lose
            enough = records() + draw.randrange(12)
            wait_for(lambda: job.poll() is not None or records() > enough)  # noqa: B023
        time.sleep(draw.random() * 0.7)
        if job.poll() is not None:  # it was faster
            assert job.returncode == 0 and contents(out) == contents(whole), f"{kills} kills"
            shutil.rmtree(out)
            continue
        family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        job.kill()
        job.wait()
        assert ended(family, 240), "a worker outlived its parent"
        kills += 1
    told = run([*arguments, "--out", str(out)])
    assert told.returncode == 0, told.stderr
    assert contents(out) == contents(whole)


def test_a_killed_worker_costs_nothing_but_time(task, tmp_path):
    arguments, whole = task
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
    assert contents(out) == contents(whole)


def test_ctrl_c_says_one_line_and_the_same_command_goes_on(task, tmp_path):
    arguments, whole = task
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
    told = run([*arguments, "--out", str(out)])
    assert told.returncode == 0 and re.search(r"converting: resuming, \d+ % already done", told.stderr)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("kilobytes", [64, 160, 300])  # for the first parts, for about half, for nearly all
def test_a_full_disk_loses_nothing(task, tmp_path, kilobytes):
    arguments, whole = task
    size = sum(len(content) for content in contents(whole).values())
    assert size > 320_000, size
    with small_disk(tmp_path / "disk", kilobytes):
        out = tmp_path / "disk" / "out"
        told = run([*arguments, "--out", str(out)])
        assert told.returncode == 2
        assert "No space left on device" in told.stderr and "it resumes where it stopped" in told.stderr
        assert "Traceback" not in told.stderr and not (out / "manifest.json").exists()
        enlarge(tmp_path / "disk")
        told = run([*arguments, "--out", str(out)])
        assert told.returncode == 0, told.stderr
        assert contents(out) == contents(whole)


def test_a_batch_jobs_log_is_quiet_on_request(task, tmp_path):
    """Not a terminal: no bar either way. What is found goes to standard output."""
    arguments, _ = task
    told = run([*arguments, "--out", str(tmp_path / "said")])
    assert told.stderr == "" and "documents read, left out: " in told.stdout and "windows of 64" in told.stdout
    quiet = run([*arguments, "--out", str(tmp_path / "quiet"), "--quiet"])
    assert (quiet.stdout, quiet.stderr) == ("", "")
    again = run([*arguments, "--out", str(tmp_path / "said")])
    assert "already converted with these settings; nothing to do" in again.stderr


def test_lines_come_now_and_then_where_nobody_watches(task, tokenizer, tmp_path, monkeypatch, capsys):
    from mythos_dist.prepare import progress

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    convert(task[0][1], tokenizer, 64, tmp_path / "out")
    *_, line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("converting")]
    assert re.fullmatch(r"converting: \d+ %, [\d.]+ MB/s of text, [\d.]+ Mtok/s, [\d.]+ GB on disk, 00:\d\d left", line)


def test_a_person_sees_a_bar_with_rate_and_time_left(task, tmp_path):
    arguments, _ = task
    controller, terminal = pty.openpty()
    subprocess.run(["stty", "rows", "40", "cols", "150"], stdin=terminal, check=True)
    job = subprocess.Popen(command([*arguments, "--out", str(tmp_path / "out")]), cwd=REPOSITORY, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(controller, 4096):
            shown += piece
    except OSError:  # the other side is closed
        pass
    os.close(controller)
    assert job.wait(timeout=120) == 0
    text = shown.decode()
    assert "finding duplicates" in text
    assert re.search(r"converting: +\d+%\|.*\[\d\d:\d\d<.*B/s, [\d.]+ Mtok/s, [\d.]+ GB on disk\]", text), text[-500:]


def test_the_users_mistakes_are_two_and_no_traceback(task, tmp_path):
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
        told = run([*arguments, "--out", str(tmp_path / "out"), *more])
        assert told.returncode == 2 and message in told.stderr and "Traceback" not in told.stderr, told.stderr
    assert not (tmp_path / "out").exists()
