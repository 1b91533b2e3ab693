"""Ctrl-C in any program gives one line and exit code 130, without a traceback. tests/train tests it in training."""

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.interrupted_import import interrupted_import

REPOSITORY = Path(__file__).parents[1]
MAIN = REPOSITORY / "mythos_dist" / "commands" / "main.py"  # runs the main of a command under its handler
PROGRAMS = sorted(
    [
        *(REPOSITORY / "tools").glob("*.py"),
        *set((REPOSITORY / "mythos_dist" / "commands").glob("[!_]*.py")) - {MAIN},
        *(REPOSITORY / "launch/status.py", REPOSITORY / "launch/submit.py"),
    ]
)
MODULES = ("train", "doctor", "ops/cluster/allocation")


def interrupted(code: str, times: int = 1, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Run a program that gets SIGINT each of `times` times that it prints `ready`."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder) as job:
        watch = threading.Timer(300, job.kill)
        watch.start()
        assert job.stdout and job.stderr
        for _ in range(times):
            assert job.stdout.readline() == "ready\n"
            job.send_signal(signal.SIGINT)
        out, err = job.communicate()
        watch.cancel()
    return subprocess.CompletedProcess(command, job.returncode, out, err)


START = "import time\nfrom mythos_dist.errors import run_command, UserError\n"
WAIT = "print('ready', flush=True); time.sleep(600)"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_runs_its_main_under_the_handler(path):
    assert path.read_text().endswith('if __name__ == "__main__":\n    run_command(main)\n')


@pytest.mark.parametrize("name", MODULES)
def test_every_module_with_a_command_line_runs_its_main_under_the_handler(name):
    file = REPOSITORY / "mythos_dist" / f"{name}.py"
    text = (file if file.exists() else file.with_suffix("") / "__main__.py").read_text()
    options = ", is_tool=False" if name == "train" else ""
    assert text.endswith(f'if __name__ == "__main__":\n    run_command(main{options})\n')


def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path):
    """`finally` blocks and temporary folders are cleaned up."""
    code = f"""{START}
import tempfile
kept = tempfile.TemporaryDirectory(dir='.')
def main():
    try:
        {WAIT}
    finally:
        print('cleaned up', flush=True)
run_command(main)"""
    done = interrupted(code, folder=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (130, "\nstopped by Ctrl-C\n", "cleaned up\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ["ImportError('numpy failed')", "UserError('a worker died')", "SystemExit(2)"])
def test_ctrl_c_that_a_library_turns_into_another_error_exits_with_130(error):
    code = f"{START}\ndef main():\n    try:\n        {WAIT}\n    except KeyboardInterrupt:\n        raise {error}\n"
    done = interrupted(code + "run_command(main)")
    assert (done.returncode, done.stderr) == (130, "\nstopped by Ctrl-C\n")


def test_ctrl_c_that_a_library_drops_is_raised_again():
    """But not during cleanup, even if that takes long."""
    code = f"""{START}
class Drops:
    def __del__(self):
        {WAIT}
def main():
    drops = Drops()
    del drops
    try:
        time.sleep(600)
    finally:
        time.sleep(2)
        print('cleaned up', flush=True)
run_command(main)"""
    done = interrupted(code)
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")
    assert done.stderr.startswith("Exception ignored in") and done.stderr.endswith("\nstopped by Ctrl-C\n")


def test_ctrl_c_waits_for_renames_that_belong_together(tmp_path):
    """A block may be inside another one."""
    code = f"""{START}
from mythos_dist.errors import delaying_interrupts
def main():
    with delaying_interrupts():
        with delaying_interrupts():
            print('ready', flush=True); time.sleep(2)
            open('first', 'w').close()
        open('second', 'w').close()
    open('third', 'w').close()
run_command(main)"""
    done = interrupted(code, folder=tmp_path)
    assert (done.returncode, done.stderr) == (130, "\nstopped by Ctrl-C\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_running_threads_do_not_delay_the_exit():
    """The interpreter's normal exit would wait for them."""
    code = f"""{START}
import threading
def main():
    threading.Thread(target=time.sleep, args=(600,)).start()
    {WAIT}
run_command(main)"""
    assert interrupted(code).returncode == 130


@pytest.mark.launch
def test_a_thread_in_a_function_of_torch_does_not_change_the_exit_code(tmp_path):
    """The interpreter's shutdown ends such a thread when it returns from C++, and the process aborts with code 134."""
    code = f"""{START}
import sys, tempfile, threading
from datetime import timedelta
import torch.distributed as dist
kept = tempfile.TemporaryDirectory(dir='.')
class Slow:
    def __del__(self):
        time.sleep(2)
sys.slow = Slow()  # the shutdown takes longer than the wait of the thread
def main():
    store = dist.TCPStore('127.0.0.1', 0, 1, is_master=True, wait_for_workers=False)
    threading.Thread(target=store.wait, args=(['never'], timedelta(seconds=1)), daemon=True).start()
    ERROR
run_command(main, is_tool=False)"""
    jobs = {}
    for error in ("raise UserError('set it to 3')", "raise ZeroDivisionError", "sys.exit(85)", "return"):
        command = [sys.executable, "-c", code.replace("ERROR", error)]
        jobs[error] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    results = [(job.communicate(timeout=240)[1], job.returncode) for job in jobs.values()]
    assert [code for _, code in results] == [2, 1, 85, 0], results
    assert results[0][0] == "error: set it to 3\n" and results[1][0].endswith("\nZeroDivisionError\n")
    assert list(tmp_path.iterdir()) == []


def test_errors_without_ctrl_c_are_not_changed():
    for error, code, words in (
        ("UserError('set it to 3')", 2, "^error: set it to 3\n$"),
        ("ZeroDivisionError('ours')", 1, "^Traceback(.|\n)*ZeroDivisionError: ours\n$"),
        ("SystemExit(3)", 3, "^$"),
    ):
        program = f"{START}\ndef main():\n    raise {error}\nrun_command(main)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
        assert done.returncode == code and re.search(words, done.stderr), done


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("| true", (141, "")),
        ("> /dev/full", (2, "error: standard output: cannot be written (No space left on device)\n")),
        (">&-", (0, "")),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(shell, expected, tmp_path):
    (tmp_path / "tool.py").write_text(f"{START}\ndef main():\n    print('x' * 100_000)\nrun_command(main)")
    command = f"set -o pipefail; {sys.executable} tool.py {shell}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize("name", ["EPIPE", "ENOSPC"])
def test_other_files_and_pipes_that_cannot_be_written_keep_their_traceback(name):
    code = f"{START}\nimport errno\ndef main():\n    raise OSError(errno.{name}, 'a worker')\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "a worker" in done.stderr, done


@pytest.mark.parametrize("where", ["2> /dev/full", "2>&-"])
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(where):
    command = f"{sys.executable} -m mythos_dist.train nowhere.yaml {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stdout, done


def test_a_background_job_of_a_script_still_ignores_sigint():
    code = f"""{START}
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
def main():
    os.kill(os.getpid(), signal.SIGINT)
    print('still here')
run_command(main)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "still here\n")


@pytest.mark.parametrize("module", ["torch.nn", "numpy.linalg"])
@pytest.mark.launch
def test_a_tool_is_stopped_while_it_imports_torch(module):
    """Most tools spend seconds on it. torch imports numpy from C++ and drops exceptions of that import."""
    tool = REPOSITORY / "tools" / "plan.py"
    done = interrupted_import(module, tool, "--variant", "1t", "--gpus", "4096", "--dry-run")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped by Ctrl-C\n")
