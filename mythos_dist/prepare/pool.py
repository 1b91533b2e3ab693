"""Worker processes for long conversions: tasks in, results out in the order of the tasks.

`concurrent.futures` does the work. What is added: a bound on what is under way, progress while waiting, workers that
end with this process however it ends, and the name of the task that a worker died of.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from time import monotonic, sleep
from typing import Any, TypeVar

from mythos_dist.errors import UserError

TICK_SECONDS = 0.2
T = TypeVar("T")
R = TypeVar("R")


_shared: Any = None  # what tasks use and is too large to send: inherited by forked workers
_done: Any = None  # of all workers: bytes of text, tokens


def shared() -> Any:
    """Inside a task: what `Workers` was given."""
    return _shared


def count(text_bytes: int, tokens: int) -> None:
    """Inside a task: so much is done since the last call."""
    with _done.get_lock():
        _done[0] += text_bytes
        _done[1] += tokens


class Workers:
    """`number` forked processes; 0: tasks run in this one. A context, to be entered before any thread is started.

    One at a time in a process. `shared` is what tasks get from `shared()`.
    """

    def __init__(self, number: int, shared: Any = None):
        self._number, self._given = number, shared
        self._executor: ProcessPoolExecutor | None = None
        self._others: set[Any] = set()  # children that are not ours

    @property
    def done(self) -> tuple[int, int]:
        """Bytes of text and tokens that tasks have counted."""
        return _done[0], _done[1]

    def __enter__(self) -> "Workers":
        global _shared, _done
        _shared, _done = self._given, multiprocessing.get_context("fork").Array(ctypes.c_int64, 2)
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def map(self, task: Callable[[T], R], items: Iterable[T], tick: Callable[[], None] = lambda: None) -> Iterator[R]:
        """`task(item)` for each item, in order; `tick` is called while waiting. Items are taken as they are needed.

        An exception in a task is raised here. UserError naming the item if a worker dies of it.
        """
        if self._executor is None:
            for item in items:
                result = task(item)
                tick()
                yield result
            return
        pending: deque[tuple[T, Future[R]]] = deque()
        waiting = iter(items)
        while True:
            for item in waiting:
                pending.append((item, self._executor.submit(task, item)))
                if len(pending) == 2 * self._number:
                    break
            if not pending:
                return
            item, future = pending.popleft()
            try:
                yield self._result(future, tick)
            except BrokenProcessPool:
                # Who of those under way was it? One at a time, the guilty one dies again; if none does, there was not
                # enough memory for so many at once.
                for other, result in [(item, future), *pending]:
                    survived = result.done() and not result.exception()
                    yield result.result() if survived else self._alone(task, other, tick)
                pending.clear()
                self.start()

    def _alone(self, task: Callable[[T], R], item: T, tick: Callable[[], None]) -> R:
        """The result of a task that may kill its worker, from a worker of its own."""
        self.stop()
        self._start(1)
        assert self._executor
        (child,) = self._children()
        try:
            return self._result(self._executor.submit(task, item), tick)
        except BrokenProcessPool:
            deadline = monotonic() + 5
            while child.exitcode is None and monotonic() < deadline:  # the executor's thread may be asking as well
                sleep(0.01)
            code = child.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise UserError(
                f"a worker process died of it ({how}): SIGKILL is most often too little memory (use fewer workers), "
                "another signal a damaged file (fetch it again, or leave it out)",
                str(item),
            ) from None

    def _result(self, future: "Future[R]", tick: Callable[[], None]) -> R:
        while not wait([future], TICK_SECONDS).done:
            tick()
        tick()
        return future.result()

    def _start(self, number: int) -> None:
        if number == 0:
            return
        self._others = set(multiprocessing.active_children())
        context = multiprocessing.get_context("fork")  # a worker has all modules and the tokenizer from the start
        self._executor = ProcessPoolExecutor(number, context, _begin, (os.getpid(),))
        for future in [self._executor.submit(os.getpid) for _ in range(number)]:
            future.result()

    def _children(self) -> list[Any]:
        return [child for child in multiprocessing.active_children() if child not in self._others]

    def start(self) -> None:
        """New workers; those that are there are stopped."""
        self.stop()
        self._start(self._number)

    def stop(self) -> None:
        """Workers are killed, not asked: what they were writing is not under its name yet."""
        if self._executor is not None:
            for child in self._children():
                child.kill()
            with contextlib.suppress(BrokenProcessPool):
                self._executor.shutdown(cancel_futures=True)
            self._executor = None


def _begin(parent: int) -> None:
    """In a new worker: a Ctrl-C is the parent's to handle, and a parent that is killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)
