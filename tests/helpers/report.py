"""Sections added to the report of a failed test: the command to rerun it, its folder, and the last lines of every rank.

Folders of failed tests are kept, those of passed tests are deleted (tmp_path_retention_policy in pyproject.toml).
"""

import os
import shlex
from pathlib import Path

import pytest
from helpers import launch

LINES = 15  # of each log


def pytest_runtest_setup(item):
    launch.recent.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("rerun with", rerun_command(item.nodeid, getattr(item, "funcargs", {}).get("seed"))))
        report.sections += folder_and_logs(getattr(item, "funcargs", {}).get("tmp_path"))
        report.sections += [
            (f"rank {rank} of launch {number}, exit code {code}", tail)
            for number, result in enumerate(launch.recent[-2:], 1 + max(0, len(launch.recent) - 2))
            for rank, (code, tail) in enumerate(zip(result.codes, result.tails, strict=True))
        ]
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
    """A test that ended its worker."""
    report.sections.append(("rerun with", rerun_command(crashitem, None)))


def rerun_command(nodeid: str, seed: int | None) -> str:
    """The shell command that runs this test, with the variables that set its random choices."""
    variables = {name: os.environ[name] for name in ("CI", "FUZZ_EXAMPLES") if name in os.environ}
    if seed is not None:
        variables["SEED"] = str(seed)
    return "".join(f"{name}={value} " for name, value in variables.items()) + f"python -m pytest {shlex.quote(nodeid)}"


def folder_and_logs(folder: Path | None) -> list[tuple[str, str]]:
    """(title, text) of the test's folder and of the last lines of each rank's log below it."""
    if folder is None or not folder.exists():
        return []
    sections = [("test folder (kept)", str(folder))]
    for log in sorted(folder.rglob("logs/*.log"))[:16]:
        tail = log.read_text(errors="replace").splitlines()[-LINES:]
        sections.append((str(log.relative_to(folder)), "\n".join(tail)))
    return sections
