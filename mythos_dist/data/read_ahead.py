"""The next batch, made by a thread while the current one is in use.

Loader processes read ahead, but what they have read still has to come through a pipe, to be checked and widened: 4 ms
per million tokens, for which a GPU would wait.

Decisions: DATA-5.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def one_ahead(items: Generator[T, None, None]) -> Iterator[T]:
    """The items, each made by a thread while the one before is in use; errors are raised where their item is due.

    The first is made by the caller's thread: loader processes are forked by it, as forks of other threads may inherit
    locks that are never released. When this generator ends, the thread closes `items` after the item that it is making.
    """
    thread = _Maker(items)
    try:
        while True:
            try:
                item = thread.take()
            except StopIteration:
                return
            yield item
    finally:
        thread.end()


class _Maker(Generic[T]):
    """A thread that makes one item whenever it is asked to."""

    def __init__(self, items: Generator[T, None, None]):
        self._items = items
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: one more item; False: the end
        self._made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self._started = False

    def take(self) -> T:
        """The next item, and begin the one after it. Raises StopIteration at the end."""
        if self._started:
            item, error = self._made.get()
            if error:
                raise error
        else:
            item = next(self._items)
            self._started = True
            threading.Thread(target=self._run, name="read ahead", daemon=True).start()
        self._wanted.put(True)
        return item  # pyright: ignore[reportReturnType]

    def end(self) -> None:
        self._wanted.put(False)
        if not self._started:
            self._items.close()

    def _run(self) -> None:
        while self._wanted.get():
            try:
                self._made.put((next(self._items), None))
            except BaseException as error:
                self._made.put((None, error))
                break
        self._items.close()
