"""Waiting for events, whatever the speed of the machine."""

import time


def wait_until(condition, seconds=60.0):
    """Poll until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
