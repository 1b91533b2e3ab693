"""Ctrl-C and a closed terminal: as on SIGTERM, the run stops after its step with a checkpoint and loses nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.interrupted_import import interrupted_import
from helpers.launch import launch, train, train_here

from mythos_dist.train.console import keep_console

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
EXACT = ("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "expert_load_max")


def exact(run_dir: Path) -> list[tuple]:
    records = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in EXACT) for line in records]


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("stop") / "uninterrupted"
    assert train(1, *settings, f"run.dir={run_dir}").codes == [0]
    return run_dir


def interrupt_at(arguments: Sequence[str], module: str, name: str, call: int, numbers: Sequence[int]) -> None:
    """Train; when function `name` of `module` is called for the `call`-th time, send the signals `numbers` to the
    process group, as a terminal does: loader workers get them, too. The second one is sent `_ONE_KEYSTROKE` s after
    the message about the first."""
    import importlib

    from mythos_dist.train import stop

    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), 0

    def interrupted(*values: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            for i, number in enumerate(numbers):
                if i:
                    while "press Ctrl-C again" not in Path("/proc/self/fd/2").read_text():
                        time.sleep(0.01)
                    time.sleep(stop._ONE_KEYSTROKE + 0.01)
                os.killpg(os.getpgrp(), number)
            if len(numbers) > 1:
                time.sleep(240)  # the second signal ends the process long before
        return original(*values, **options)

    setattr(owner, last, interrupted)
    train_here(arguments)


LOOP, SAVE = "mythos_dist.train.loop", "mythos_dist.checkpoint.save"


@pytest.mark.parametrize(
    ("module", "name", "call", "number", "step"),
    [
        (LOOP, "Run.attempt_step", 3, signal.SIGINT, 3),
        (LOOP, "Run.attempt_step", 3, signal.SIGHUP, 3),
        (LOOP, "Run.evaluate", 1, signal.SIGINT, 0),
        (SAVE, "publish", 1, signal.SIGINT, 2),
    ],
)
def test_a_stop_saves_and_the_same_command_completes_the_run(
    settings, uninterrupted, tmp_path, module, name, call, number, step
):
    """Signals in a step, in the first evaluation and while a checkpoint is published; loader workers get them, too. The
    lines equal those of an uninterrupted run."""
    run_dir = tmp_path / "run"
    # Without background saving, the checkpoint of step 2 is published in step 2.
    arguments = [*settings, f"run.dir={run_dir}", "data.workers=1", "checkpoint.background=false"]
    result = launch(1, interrupt_at, arguments, module, name, call, [number])
    signal_name = {signal.SIGINT: "Ctrl-C (SIGINT)", signal.SIGHUP: "SIGHUP"}[number]
    assert result.codes == [85] and "Traceback" not in result.err, result.err
    assert f"stopped after step {step}: rank 0 received {signal_name}; run the same command to resume" in result.out
    assert ("Ctrl-C: stopping after this step" in result.err) == (number == signal.SIGINT)
    assert (run_dir / "checkpoints" / f"step-{step:08d}").is_dir()
    again = train(1, *arguments)
    assert again.codes == [0], again.err
    (line,) = [json.loads(text) for text in (run_dir / "restarts.jsonl").read_text().splitlines()]
    assert signal_name in line["why"] and line["from_step"] == step
    assert exact(run_dir) == exact(uninterrupted)


def test_ctrl_c_at_the_last_checkpoint_lets_it_finish(settings, uninterrupted, tmp_path):
    result = launch(1, interrupt_at, [*settings, f"run.dir={tmp_path}"], LOOP, "Run.finish", 1, [signal.SIGINT])
    assert result.codes == [0] and (tmp_path / "COMPLETED").exists() and exact(tmp_path) == exact(uninterrupted)


def test_a_second_ctrl_c_ends_a_run_at_once_and_reports_where_it_resumes(settings, uninterrupted, tmp_path):
    """Even while the main thread is in a call during which Python runs no signal handler."""
    arguments = [*settings, f"run.dir={tmp_path}"]
    result = launch(1, interrupt_at, arguments, LOOP, "Run.attempt_step", 4, [signal.SIGINT, signal.SIGINT])
    assert result.codes == [130] and "Traceback" not in result.err, result.err
    assert "stopped at once; run the same command to resume from step-00000002" in result.err
    again = train(1, *arguments)
    assert again.codes == [0] and exact(tmp_path) == exact(uninterrupted)
    assert "second Ctrl-C" in again.out


def train_in_shell(settings: Sequence[str], ready: Callable[[], bool], shell: str) -> tuple[int, str]:
    """Run `python -m mythos_dist.train` in its own process group, which gets SIGINT when `ready` returns true.

    shell: a bash command with {} for that command. Returns the exit code and the output.
    """
    command = shell.format(" ".join([sys.executable, "-m", "mythos_dist.train", *settings]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    ) as job:
        watch = threading.Timer(400, os.killpg, (job.pid, signal.SIGKILL))
        watch.start()
        while not ready() and job.poll() is None:
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGINT)
        out, _ = job.communicate()
        watch.cancel()
    return job.returncode, out


@pytest.mark.parametrize("module", ["numpy.linalg", "torch.nn"])
def test_ctrl_c_before_the_first_step_is_one_line(module, settings, tmp_path):
    """While libraries are imported, most of a start; nothing is written."""
    done = interrupted_import(module, "mythos_dist.train", *settings, f"run.dir={tmp_path / 'run'}")
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr.strip() == "stopped by Ctrl-C before the first step; nothing was lost"
    assert not (tmp_path / "run").exists()


def test_a_broken_output_pipe_does_not_prevent_the_checkpoint(settings, tmp_path):
    """`train ... | tee log`: Ctrl-C also ends tee, so the run can no longer print."""
    run_dir = tmp_path / "run"

    def ready() -> bool:
        return (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_text().count("\n") > 2

    arguments = [*settings, f"run.dir={run_dir}", "train.steps=100000", "checkpoint.every=100000"]
    code, _ = train_in_shell(arguments, ready, f"set -o pipefail; {{}} 2>&1 | tee {tmp_path / 'log'}")
    writer = json.loads((run_dir / "writer.json").read_text())
    assert writer["state"] == "stopped" and writer["published"] == writer["step"] > 2
    assert code in (85, 130)  # of the shell, which also gets the signal


def test_a_closed_console_does_not_end_a_run():
    program = (
        "import os, sys\nfrom mythos_dist.train.console import keep_console\nkeep_console()\n"
        "print('first', flush=True)\nsys.stdin.read()\nfor i in range(3): print('lost', flush=True)\n"
        "os.write(2, b'still here')"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdin and job.stdout and job.stderr
        assert job.stdout.readline() == b"first\n"
        job.stdout.close()
        job.stdin.close()
        assert job.stderr.read() == b"still here" and job.wait(240) == 0


def test_lines_appear_at_once_where_python_does_not_buffer():
    """PYTHONUNBUFFERED is common in images and batch scripts."""
    program = (
        "import os, sys\nfrom mythos_dist.train.console import keep_console\nkeep_console()\n"
        "print('one')\nprint('two', file=sys.stderr)\nos._exit(0)"  # nothing is flushed at its end
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, timeout=240)
    assert (done.stdout, done.stderr) == (b"one\n", b"two\n")


def test_standard_streams_that_are_not_files_are_not_replaced(monkeypatch):
    import io

    streams = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    keep_console()
    assert (sys.stdout, sys.stderr) == streams
