"""Results are in order, the number of pending tasks is bounded, and workers end with their parent however it ends."""

import faulthandler
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers.conversion import ended

from mythos_dist.errors import UserError
from mythos_dist.prepare import pool
from mythos_dist.prepare.pool import WorkerPool


def square(number):
    time.sleep(0.02 * (number % 3 == 0))  # some take longer than those after them
    pool.add_progress(number, 1)
    return number * number * pool.shared()


def number_or_kill(item):
    """Return the item's number, or kill this worker: item = (number, cause, marker).

    cause: a signal's name, an exit code or None. marker: a file; if given, only the first call kills, as if memory had
    run out only once.
    """
    number, cause, marker = item
    if cause is not None and not (marker and marker.exists()):
        if marker:
            marker.touch()
        faulthandler.disable()  # it would print the stack
        if isinstance(cause, int):
            os._exit(cause)
        os.kill(os.getpid(), signal.Signals[cause])
    return number


def fail(number):
    if number == 3:
        raise UserError("this one is bad", "file.txt")
    return number


@pytest.mark.parametrize("number", [0, 1, 3])
def test_results_come_in_the_order_of_items(number):
    ticks = []
    with WorkerPool(number, 10) as workers:
        assert list(workers.map(square, range(20), lambda: ticks.append(workers.done))) == [
            10 * i * i for i in range(20)
        ]
        assert workers.done == (sum(range(20)), 20)
        assert list(workers.map(square, [])) == []
    assert ticks[-1] == (sum(range(20)), 20)
    assert ticks == sorted(ticks)


@pytest.mark.launch
def test_a_worker_that_is_killed_between_two_tasks_loses_no_result():
    """The executor then refuses new tasks."""

    def items(workers):
        for i in range(6):
            if i == 3:
                for child in workers._children():
                    os.kill(child.pid, signal.SIGKILL)
                while not workers._executor._broken:
                    time.sleep(0.01)
            yield i

    with WorkerPool(2, 10) as workers:
        assert list(workers.map(square, items(workers))) == [10 * i * i for i in range(6)]


def test_items_are_taken_only_as_they_are_needed():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    with WorkerPool(2, 1) as workers:
        results = workers.map(square, items())
        for _ in range(5):
            next(results)
        assert len(taken) <= 5 + 4


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_in_a_task_is_raised_unchanged(number):
    with WorkerPool(number) as workers, pytest.raises(UserError) as error:
        list(workers.map(fail, range(10)))
    assert (str(error.value), error.value.problems, error.value.source) == (
        *("file.txt: this one is bad", ["this one is bad"], "file.txt"),
    )


@pytest.mark.launch
@pytest.mark.parametrize(("cause", "name"), [("SIGKILL", "SIGKILL"), ("SIGSEGV", "SIGSEGV"), (7, "exit code 7")])
def test_a_task_that_kills_its_worker_is_named(cause, name):
    """While other tasks are running and finished."""
    with WorkerPool(3) as workers, pytest.raises(UserError) as error:
        list(workers.map(number_or_kill, [(i, cause if i == 8 else None, None) for i in range(20)]))
    assert f"(8, {cause!r}, None): killed a worker process ({name})" in str(error.value)


@pytest.mark.launch
def test_tasks_whose_workers_die_only_once_are_repeated(tmp_path):
    """As when memory suffices for one task at a time: no error, no lost result, and the same order."""
    with WorkerPool(3) as workers:
        items = [(i, "SIGKILL" if i in (4, 5, 12) else None, tmp_path / str(i)) for i in range(20)]
        assert list(workers.map(number_or_kill, items)) == list(range(20))
        assert list(workers.map(number_or_kill, items)) == list(range(20))


def test_stop_ends_workers_in_the_middle_of_a_task():
    before = set(psutil.Process().children())
    with WorkerPool(2) as workers:
        next(workers.map(time.sleep, [0, 1000, 1000, 1000]))
        assert len(set(psutil.Process().children()) - before) == 2
    assert not set(psutil.Process().children()) - before


PARENT = """
import sys, time
from mythos_dist.prepare.pool import WorkerPool
with WorkerPool(2) as workers:
    print(*[child.pid for child in workers._children()], flush=True)
    list(workers.map(time.sleep, [1000] * 4))
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(signal_number):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.send_signal(signal_number)
    assert parent.wait(240) == -signal_number
    assert ended(children, seconds=240)  # they sleep for 1000
