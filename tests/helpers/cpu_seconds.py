"""Plugin: with `--cpu`, the CPU seconds of each file and of its most expensive tests, in the summary.

Seconds on the clock say little on a machine that does other work. Processes count when they have ended and their parent
has waited for them, so that a server which a module starts counts for the last test of that module.
"""

import multiprocessing.forkserver
import os
from collections import Counter

import psutil
import pytest

_NAME = "cpu_seconds"
_before = 0.0


def used() -> float:
    """CPU seconds of this process, of the fork server of `helpers/launch.py`, and of their ended children."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    processes = [psutil.Process(pid) for pid in (os.getpid(), server) if pid]
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def pytest_addoption(parser):
    parser.addoption("--cpu", action="store_true", help="print the CPU seconds of each file and of the longest tests")


def pytest_collection_finish():
    global _before
    _before = used()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    global _before
    report = yield
    if item.config.option.cpu:
        now = used()
        report.user_properties.append((_NAME, now - _before))  # xdist sends it to the main process
        _before = now
    return report


def pytest_terminal_summary(terminalreporter, config):
    if not config.option.cpu:
        return
    tests: Counter[str] = Counter()
    for report in (one for reports in terminalreporter.stats.values() for one in reports):
        if isinstance(report, pytest.TestReport):
            tests[report.nodeid] += dict(report.user_properties).get(_NAME, 0.0)
    files: Counter[str] = Counter()
    for nodeid, seconds in tests.items():
        files[nodeid.partition("::")[0]] += seconds
    terminalreporter.section(f"CPU seconds: {tests.total():.0f}")
    for counter, least in ((files, 1.0), (tests, 5.0)):
        for name, seconds in counter.most_common():
            if seconds >= least:
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
