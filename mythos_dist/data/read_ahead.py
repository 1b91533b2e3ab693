"""The next batch, made by a thread while the current one is in use.

Loader processes read ahead, but what they have read still has to come through a pipe, to be checked and widened: 4 ms
per million tokens, for which a GPU would wait.

Decisions: DATA-5.
"""

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Generator[T, None, None]) -> Iterator[T]:
    """The items, each made by a thread while the one before is in use; errors are raised where their item is due.

    The first is made by the caller's thread: loader processes are forked by it, as forks of other threads may inherit
    locks that are never released. When this generator ends, the thread closes `items` after the item that it is making.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()  # True: one more item; False: the end
    made: SimpleQueue[T | BaseException] = SimpleQueue()

    def make() -> None:
        while wanted.get():
            try:
                made.put(next(items))
            except BaseException as error:
                made.put(error)
                break
        items.close()

    try:
        item: T | BaseException = next(items)
    except StopIteration:
        return
    threading.Thread(target=make, name="read ahead", daemon=True).start()
    try:
        while not isinstance(item, BaseException):
            wanted.put(True)
            yield item
            item = made.get()
        if not isinstance(item, StopIteration):
            raise item
    finally:
        wanted.put(False)
