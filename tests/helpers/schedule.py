"""Which tests run, in which order, and what shares a worker.

Tests of one file share a worker, because they share what its fixtures made. Tests of a file in APART need nothing of
each other and go to any worker. The seconds in tests/README.md decide the order.

A test marked `long` is left out of `make test`. With `--minutes M` tests begin in an order that today's date decides,
and after M minutes no other one begins: every few days all of them have run.
"""

import datetime
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parents[1]
APART = ("tests/cluster/test_drills.py", "tests/cluster/test_launchers.py")
WAITING = ("tests/cluster/", "tests/launch/")
_DATE, _END = "MYTHOS_TEST_DATE", "MYTHOS_TEST_END"  # for the workers: what the first process decided


def seconds_by_file() -> dict[str, float]:
    """Path -> seconds, from the table's last column; a file without a figure is not in it."""
    rows = re.findall(r"^\| `([^`]+\.py)` .*\| *([\d.]+) \|$", (TESTS / "README.md").read_text(), re.M)
    return {f"tests/{name}": float(seconds) for name, seconds in rows}


def write_seconds(spent: dict[str, float]) -> None:
    """Fill the table's last column in for the files that are in `spent`."""
    table = TESTS / "README.md"

    def row(found: re.Match) -> str:
        seconds = spent.get(f"tests/{found[2]}")
        return found[0] if seconds is None else f"{found[1]} {seconds:.1f} |"

    table.write_text(re.sub(r"^(\| `([^`]+\.py)` .*\|) *[\d.]* *\|$", row, table.read_text(), flags=re.M))


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def unit_of(nodeid: str) -> str:
    """What goes to one worker as a whole: a file; a test; of the parity grid what shares a launch."""
    file = file_of(nodeid)
    ranks = re.search(r"\[(\d) ranks, ", nodeid)
    return nodeid if file in APART else f"{file} {ranks[1]}" if ranks else file


def order(nodeids: list[str]) -> dict[str, float]:
    """Unit -> its place: the longest first, and at any time both what computes and what waits.

    WAITING files leave the processor idle. Units of either kind stand where their kind's seconds before them are the
    same share of all its seconds.
    """
    seconds, tests = seconds_by_file(), Counter(map(file_of, nodeids))
    spent: Counter[str] = Counter()
    for nodeid in nodeids:
        file = file_of(nodeid)
        spent[unit_of(nodeid)] += max(seconds.get(file, 1), 0.1) / tests[file]  # the table rounds down to 0.0
    place: dict[str, float] = {}
    for waits in (False, True):
        units = sorted((unit for unit in spent if unit.startswith(WAITING) == waits), key=lambda unit: -spent[unit])
        total = sum(spent[unit] for unit in units)
        before = 0.0
        for unit in units:
            place[unit] = before / total
            before += spent[unit]
    return place


class Scheduling(LoadScopeScheduling):
    """Whole units, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # it would put the files with most tests first
    return Scheduling(config, log)


def pytest_addoption(parser):
    words = "run the tests marked long, or those that are asked for, in today's order, and begin none after this time"
    parser.addoption("--minutes", type=float, help=words)
    parser.addoption(
        "--write-seconds", action="store_true", help="into the tables of tests/README.md, for each file that ran"
    )


def pytest_configure(config):
    if config.option.minutes is not None:
        os.environ.setdefault(_DATE, datetime.date.today().isoformat())
        os.environ.setdefault(_END, str(time.time() + 60 * config.option.minutes))


def pytest_collection_modifyitems(config, items):
    if config.option.minutes is not None:
        units = sorted({unit_of(item.nodeid) for item in items})
        random.Random(os.environ[_DATE]).shuffle(units)
        place: dict[str, float] = {unit: index for index, unit in enumerate(units)}
    else:
        place = order([item.nodeid for item in items])
    items.sort(key=lambda item: place[unit_of(item.nodeid)])


def pytest_runtest_setup(item):
    if item.config.option.minutes is not None and time.time() > float(os.environ[_END]):
        pytest.skip(f"{item.config.option.minutes:g} minutes are over")


def pytest_terminal_summary(terminalreporter, config):
    """The seconds of each file, and with --minutes which units ran."""
    if config.option.write_seconds:
        spent: Counter[str] = Counter()
        for report in (report for reports in terminalreporter.stats.values() for report in reports):
            if isinstance(report, pytest.TestReport):
                spent[file_of(report.nodeid)] += report.duration
        write_seconds(spent)
    if config.option.minutes is None:
        return
    ran = {
        unit_of(report.nodeid) for name in ("passed", "failed", "error") for report in terminalreporter.getreports(name)
    }
    left = {unit_of(report.nodeid) for report in terminalreporter.getreports("skipped")} - ran
    terminalreporter.section(f"the part of {os.environ[_DATE]}: {len(ran)} units ran, {len(left)} did not begin")
    for unit in sorted(ran):
        terminalreporter.write_line(unit)
