"""Fixture: the planner's tool in this process, which saves the seconds of its imports."""

import importlib.util
import sys
from pathlib import Path

import pytest

from mythos_dist.errors import run_command

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tool():
    spec = importlib.util.spec_from_file_location("plan_tool", REPOSITORY / "tools" / "plan.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plan(tool, monkeypatch, capsys):
    """A function: arguments -> (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(tool.main)
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run
