"""What is printed below a failed test: how to run it alone, its folder, and the last lines of every rank.

The folder is kept (tmp_path_retention_policy in pyproject.toml), those of tests that passed are not.
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
        report.sections.append(("to run it alone", command_of(item)))
        report.sections += logs_below(getattr(item, "funcargs", {}).get("tmp_path"))
        report.sections += [
            (f"rank {rank} of launch {number}, exit code {code}", tail)
            for number, result in enumerate(launch.recent[-2:], 1 + max(0, len(launch.recent) - 2))
            for rank, (code, tail) in enumerate(zip(result.codes, result.tails, strict=True))
        ]
    return report


def command_of(item: pytest.Item) -> str:
    """A shell's line that runs this test, with what its random choices depend on."""
    variables = {name: os.environ[name] for name in ("CI", "FUZZ_EXAMPLES") if name in os.environ}
    if "seed" in getattr(item, "funcargs", {}):
        variables["SEED"] = item.funcargs["seed"]
    return (
        "".join(f"{name}={value} " for name, value in variables.items())
        + f"python -m pytest {shlex.quote(item.nodeid)}"
    )


def logs_below(folder: Path | None) -> list[tuple[str, str]]:
    """(title, last lines) of each rank's log below a test's folder, and where the folder is."""
    if folder is None or not folder.exists():
        return []
    found = [("its folder, which stays", str(folder))]
    for log in sorted(folder.rglob("logs/*.log"))[:16]:
        tail = log.read_text(errors="replace").splitlines()[-LINES:]
        found.append((str(log.relative_to(folder)), "\n".join(tail)))
    return found
