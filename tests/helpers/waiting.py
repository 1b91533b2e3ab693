"""Waiting for events, whatever the speed of the machine."""

import time


def wait_until(condition, seconds=600.0):
    """Poll until `condition()` is true, more and more seldom: a test must not take the CPU from what it waits for."""
    end, pause = time.monotonic() + seconds, 0.005
    while not condition():
        assert time.monotonic() < end, f"the condition did not come true in {seconds:g} s"
        time.sleep(pause)
        pause = min(0.1, 1.2 * pause)
