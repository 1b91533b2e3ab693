"""The next item is made while one is in use, one and no more; errors and ends come where they are due."""

import threading

import pytest

from mythos_dist.data.read_ahead import one_ahead


def test_the_next_item_is_made_while_one_is_in_use_and_no_more():
    made = [threading.Event() for _ in range(9)]
    threads = []

    def items():
        for i, event in enumerate(made):
            threads.append(threading.current_thread())
            event.set()
            yield i

    ahead = one_ahead(items())
    assert not made[0].is_set()
    for i in range(3):
        assert next(ahead) == i
        assert made[i + 1].wait(60)
        assert not made[i + 2].wait(0.05)
    assert threads[0] is threading.current_thread() and threading.current_thread() not in threads[1:]
    assert list(ahead) == list(range(3, 9)), "then it ends"


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_error_is_raised_where_its_item_is_due(at):
    def items():
        yield from range(at)
        raise ValueError("damaged")

    ahead = one_ahead(items())
    assert [next(ahead) for _ in range(at)] == list(range(at))
    with pytest.raises(ValueError, match="damaged"):
        next(ahead)


@pytest.mark.parametrize("taken", [1, 2])
def test_what_makes_the_items_is_closed_with_the_reader(taken):
    closed = threading.Event()

    def items():
        try:
            yield from range(9)
        finally:
            closed.set()

    ahead = one_ahead(items())
    for _ in range(taken):
        next(ahead)
    assert not closed.wait(0.05)
    ahead.close()
    assert closed.wait(60)
