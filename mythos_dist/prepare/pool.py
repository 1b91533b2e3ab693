"""Worker processes for long conversions: tasks in, results out in the order of the tasks.

Built on `concurrent.futures`. What is added: a bound on pending tasks, progress while waiting, workers that end with
this process however it ends, and the name of the task that killed a worker.

Decisions: DATA-8.
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

POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # prctl
Item = TypeVar("Item")
Result = TypeVar("Result")

_shared: Any = None  # an object that is too large to send with each task; forked workers inherit it
_progress: Any = None  # of all workers: bytes of text, tokens


def shared() -> Any:
    """In a task: the object that `WorkerPool` was given."""
    return _shared


def add_progress(text_bytes: int, tokens: int) -> None:
    """In a task: report what was done since the last call."""
    with _progress.get_lock():
        _progress[0] += text_bytes
        _progress[1] += tokens


class WorkerPool:
    """`num_workers` forked processes; 0: tasks run in this process. A context manager; enter it before threads start.

    A process can use one pool at a time. `shared`: the object that `shared()` returns in a task.
    """

    def __init__(self, num_workers: int, shared: Any = None):
        self._num_workers, self._given = num_workers, shared
        self._executor: ProcessPoolExecutor | None = None
        self._other_children: set[Any] = set()  # of this process, not of this pool

    @property
    def done(self) -> tuple[int, int]:
        """Bytes of text and tokens that tasks have reported."""
        return _progress[0], _progress[1]

    def __enter__(self) -> "WorkerPool":
        global _shared, _progress
        _shared, _progress = self._given, multiprocessing.get_context("fork").Array(ctypes.c_int64, 2)
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def map(
        self, task: Callable[[Item], Result], items: Iterable[Item], on_wait: Callable[[], None] = lambda: None
    ) -> Iterator[Result]:
        """`task(item)` for each item, in order; calls `on_wait` while waiting. Items are taken as they are needed.

        An exception in a task is raised here; a UserError that names the item if it kills its worker.
        """
        if self._executor is None:
            for item in items:
                result = task(item)
                on_wait()
                yield result
            return
        pending: deque[tuple[Item, Future[Result]]] = deque()
        remaining = iter(items)
        while True:
            for item in remaining:
                pending.append((item, self._submit(task, item)))
                if len(pending) == 2 * self._num_workers:
                    break
            if not pending:
                return
            item, future = pending.popleft()
            try:
                yield self._wait(future, on_wait)
            except BrokenProcessPool:
                # Any pending task may have killed the worker. Run them one at a time: the task that did kills its
                # worker again. If none does, memory was too small for several at once.
                for other, result in [(item, future), *pending]:
                    finished = result.done() and not result.exception()
                    yield result.result() if finished else self._run_alone(task, other, on_wait)
                pending.clear()
                self.start()

    def _submit(self, task: Callable[[Item], Result], item: Item) -> "Future[Result]":
        """A future of the task. If the pool is broken, the future has that error, which `map` handles when it gets to
        this task."""
        assert self._executor
        try:
            return self._executor.submit(task, item)
        except BrokenProcessPool as error:
            future: Future[Result] = Future()
            future.set_exception(error)
            return future

    def _run_alone(self, task: Callable[[Item], Result], item: Item, on_wait: Callable[[], None]) -> Result:
        """Run a task that may kill its worker in a worker of its own."""
        self.stop()
        self._start(1)
        assert self._executor
        (child,) = self._children()
        try:
            return self._wait(self._executor.submit(task, item), on_wait)
        except BrokenProcessPool:
            deadline = monotonic() + 5
            while child.exitcode is None and monotonic() < deadline:  # the executor's thread may reap it first
                sleep(0.01)
            code = child.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise UserError(
                f"killed a worker process ({how}): SIGKILL usually means too little memory (use fewer workers), "
                "another signal a damaged file (fetch it again, or leave it out)",
                str(item),
            ) from None

    def _wait(self, future: "Future[Result]", on_wait: Callable[[], None]) -> Result:
        while not wait([future], POLL_SECONDS).done:
            on_wait()
        on_wait()
        return future.result()

    def _start(self, num_workers: int) -> None:
        if num_workers == 0:
            return
        self._other_children = set(multiprocessing.active_children())
        context = multiprocessing.get_context("fork")  # a worker inherits all modules and the tokenizer
        self._executor = ProcessPoolExecutor(num_workers, context, _initialize_worker, (os.getpid(),))
        # Ctrl-C waits until workers ignore it: until then they have this process's handler, and print a traceback.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            started = [self._executor.submit(os.getpid) for _ in range(num_workers)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for future in started:
            future.result()

    def _children(self) -> list[Any]:
        return [child for child in multiprocessing.active_children() if child not in self._other_children]

    def start(self) -> None:
        """Start new workers; running ones are stopped."""
        self.stop()
        self._start(self._num_workers)

    def stop(self) -> None:
        """Kill the workers. Files that they were writing still have temporary names."""
        if self._executor is not None:
            for child in self._children():
                child.kill()
            with contextlib.suppress(BrokenProcessPool):
                self._executor.shutdown(cancel_futures=True)
            self._executor = None


def _initialize_worker(parent: int) -> None:
    """In a new worker: ignore Ctrl-C, which the parent handles, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)
