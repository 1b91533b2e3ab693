"""Which tests run, in which order, and which tests run on the same worker.

Tests of one file run on the same worker, because they share its fixtures. Tests of a file in SPLIT_FILES run
on any worker, because they are independent. The order follows the seconds in tests/README.md.

`make test` excludes tests marked `long`. With `--minutes M` tests run in an order that depends on today's date, and no
test starts after M minutes: within a few days all of them run.
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
from xdist.workermanage import WorkerController

TESTS = Path(__file__).parents[1]
SPLIT_FILES = ("tests/cluster/test_drills.py", "tests/cluster/test_launchers.py")
WAITING = ("tests/cluster/", "tests/launch/")
_DATE, _END = "MYTHOS_TEST_DATE", "MYTHOS_TEST_END"  # environment variables that the main process sets for the workers


def seconds_by_file() -> dict[str, float]:
    """Path -> seconds, from the last column of the tables; files without a value are left out."""
    rows = re.findall(r"^\| `([^`]+\.py)` .*\| *([\d.]+) \|$", (TESTS / "README.md").read_text(), re.M)
    return {f"tests/{name}": float(seconds) for name, seconds in rows}


def write_seconds(seconds_of: dict[str, float]) -> None:
    """Update the last column of the tables for the files in `seconds_of`."""
    table = TESTS / "README.md"

    def row(match: re.Match) -> str:
        seconds = seconds_of.get(f"tests/{match[2]}")
        return match[0] if seconds is None else f"{match[1]} {seconds:.1f} |"

    table.write_text(re.sub(r"^(\| `([^`]+\.py)` .*\|) *[\d.]* *\|$", row, table.read_text(), flags=re.M))


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def unit_of(nodeid: str) -> str:
    """The tests that run on one worker: a file; a single test of SPLIT_FILES; parity-grid tests that share a launch."""
    file = file_of(nodeid)
    ranks = re.search(r"\[(\d) ranks, ", nodeid)
    if file in SPLIT_FILES:
        return nodeid
    return f"{file} {ranks[1]}" if ranks else file


def order(nodeids: list[str]) -> dict[str, float]:
    """Unit -> position in [0, 1): longest first, with waiting and computing units interleaved.

    WAITING files leave the processor idle. The position of a unit is the share of its kind's seconds (waiting or
    computing) that come before it, so that at any time units of both kinds run.
    """
    seconds, tests = seconds_by_file(), Counter(map(file_of, nodeids))
    unit_seconds: Counter[str] = Counter()
    for nodeid in nodeids:
        file = file_of(nodeid)
        unit_seconds[unit_of(nodeid)] += max(seconds.get(file, 1), 0.1) / tests[file]  # the table rounds down to 0.0
    positions: dict[str, float] = {}
    for waits in (False, True):
        units = [unit for unit in unit_seconds if unit.startswith(WAITING) == waits]
        units.sort(key=lambda unit: -unit_seconds[unit])
        total = sum(unit_seconds[unit] for unit in units)
        before = 0.0
        for unit in units:
            positions[unit] = before / total
            before += unit_seconds[unit]
    return positions


class Scheduling(LoadScopeScheduling):
    """Assigns units to workers in collection order.

    A test that ends its worker has failed, and the rest of its unit runs on the worker that replaces it. xdist 3.8
    would run that test again, until eight workers have ended, or wait forever: it assigns units of which all tests have
    run.
    """

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def remove_node(self, node: WorkerController) -> str | None:
        units = self.assigned_work[node]
        running = next((test for unit in units.values() for test, ended in unit.items() if not ended), None)
        for name, unit in list(units.items()):
            if running in unit:
                unit[running] = True
            if all(unit.values()):
                del units[name]
        super().remove_node(node)
        return running

    def schedule(self) -> None:
        super().schedule()
        if not self.workqueue:  # a worker runs a test when it knows the next one, or that there is none
            for node in self.nodes:
                node.shutdown()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # it would put the files with most tests first
    return Scheduling(config, log)


def pytest_addoption(parser):
    minutes_help = "run the selected tests in an order that depends on the date, and start none after this time"
    parser.addoption("--minutes", type=float, help=minutes_help)
    seconds_help = "write the seconds of each file that ran to the tables of tests/README.md"
    parser.addoption("--write-seconds", action="store_true", help=seconds_help)


def pytest_configure(config):
    if config.option.minutes is not None:
        os.environ.setdefault(_DATE, datetime.date.today().isoformat())
        os.environ.setdefault(_END, str(time.time() + 60 * config.option.minutes))


def pytest_collection_modifyitems(config, items):
    if config.option.minutes is not None:
        units = sorted({unit_of(item.nodeid) for item in items})
        random.Random(os.environ[_DATE]).shuffle(units)
        positions: dict[str, float] = {unit: index for index, unit in enumerate(units)}
    else:
        positions = order([item.nodeid for item in items])
    items.sort(key=lambda item: positions[unit_of(item.nodeid)])


def pytest_ignore_collect(collection_path, config):
    """With `-m "not launch …"`, do not import files of which every test is marked `launch`: some take seconds."""
    if "not launch" in config.option.markexpr and collection_path.suffix == ".py":
        all_marked = re.search(r"^pytestmark = .*\bpytest\.mark\.launch\b", collection_path.read_text(), re.M)
        return True if all_marked else None
    return None


def pytest_runtest_setup(item):
    if item.config.option.minutes is not None and time.time() > float(os.environ[_END]):
        pytest.skip(f"time limit of {item.config.option.minutes:g} minutes reached")


def pytest_terminal_summary(terminalreporter, config):
    """Write the seconds of each file; with --minutes, list the units that ran."""
    if config.option.write_seconds:
        seconds_of: Counter[str] = Counter()
        for reports in terminalreporter.stats.values():
            for report in reports:
                if isinstance(report, pytest.TestReport):
                    seconds_of[file_of(report.nodeid)] += report.duration
        write_seconds(seconds_of)
    if config.option.minutes is None:
        return
    ran = {
        unit_of(report.nodeid) for name in ("passed", "failed", "error") for report in terminalreporter.getreports(name)
    }
    not_started = {unit_of(report.nodeid) for report in terminalreporter.getreports("skipped")} - ran
    terminalreporter.section(f"order of {os.environ[_DATE]}: {len(ran)} units ran, {len(not_started)} did not start")
    for unit in sorted(ran):
        terminalreporter.write_line(unit)
