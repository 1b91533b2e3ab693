"""The suite's plugins: units of work and their order, the time limit of the long tests, the report of a failure."""

import ast
import functools
import os
import re
import signal
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import launch, schedule, selection
from helpers.schedule import order, unit_of, write_seconds
from hypothesis import settings

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent


@pytest.fixture
def project(pytester):
    """An empty test folder with the suite's plugins."""
    pytester.makeini(f"[pytest]\npythonpath = {TESTS}\ntmp_path_retention_policy = failed")
    pytester.makeconftest('pytest_plugins = ["helpers.schedule", "helpers.report", "helpers.cpu_seconds"]')
    return pytester


def test_units_are_files_tests_or_launches():
    assert unit_of("tests/data/test_mix.py::test_a[x-1]") == "tests/data/test_mix.py"
    drill = "tests/cluster/test_drills.py::test_preemption"
    assert unit_of(drill) == drill
    grid = "tests/parallel/test_parity_grid.py::test_a_run_resumes_bit_for_bit[4 ranks, pipe=4, bare]"
    assert unit_of(grid) == "tests/parallel/test_parity_grid.py 4"


def test_long_files_come_first_and_waiting_and_computing_files_are_interleaved(monkeypatch):
    seconds = {"tests/a.py": 10, "tests/b.py": 60, "tests/c.py": 30, "tests/cluster/d.py": 50, "tests/cluster/e.py": 50}
    monkeypatch.setattr(schedule, "seconds_by_file", lambda: seconds)
    positions = order([f"{file}::test_{i}" for file in seconds for i in range(2)])
    units = sorted(positions, key=lambda unit: positions[unit])
    assert [unit for unit in units if "cluster" not in unit] == ["tests/b.py", "tests/c.py", "tests/a.py"]
    assert positions["tests/cluster/e.py"] == 0.5
    assert positions["tests/c.py"] == 0.6 and positions["tests/a.py"] == 0.9


def test_files_with_zero_seconds_have_an_order(monkeypatch):
    """Running such a file alone once raised ZeroDivisionError."""
    monkeypatch.setattr(schedule, "seconds_by_file", lambda: {"tests/a.py": 0.0})
    assert order(["tests/a.py::test_1", "tests/a.py::test_2"]) == {"tests/a.py": 0}


def test_seconds_are_written_to_the_last_column(monkeypatch, tmp_path):
    monkeypatch.setattr(schedule, "TESTS", tmp_path)
    (tmp_path / "README.md").write_text("| `a.py` | x | y |  |\n| `b.py` | x 1.5 | y | 9.0 |\n")
    write_seconds({"tests/a.py": 1.26})
    assert (tmp_path / "README.md").read_text() == "| `a.py` | x | y | 1.3 |\n| `b.py` | x 1.5 | y | 9.0 |\n"
    assert schedule.seconds_by_file() == {"tests/a.py": 1.3, "tests/b.py": 9.0}


def test_files_whose_tests_are_all_launches_are_not_imported_without_launches(tmp_path):
    """A file with an unmarked test is imported, also if it has marked ones."""

    def is_ignored(text: str, expression: str) -> bool:
        file = tmp_path / "test_a.py"
        file.write_text(text)
        config = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
        return bool(schedule.pytest_ignore_collect(file, config))

    for mark in ("pytest.mark.launch  # why", "[pytest.mark.timeout(9), pytest.mark.launch]"):
        assert is_ignored(f"import pytest\npytestmark = {mark}\n", "not launch and not long")
        assert not is_ignored(f"import pytest\npytestmark = {mark}\n", "not long")
    for text in ("pytestmark = pytest.mark.timeout(9)\n", "@pytest.mark.launch\ndef test_a(): pass\n"):
        assert not is_ignored(text, "not launch")


def test_some_cases_and_a_quarter_of_the_examples_are_quick():
    """`examples` follows the profile that --hypothesis-profile selects."""
    first, *others = selection.first_is_quick({"a": 1, "b": 2, "c": 3})
    assert first == "a" and [(one.values, one.marks[0].name) for one in others] == [
        (("b",), "launch"),
        (("c",), "launch"),
    ]
    counts, selected = {}, settings.get_current_profile_name()
    try:
        for name in ("quick", "patient"):
            settings.load_profile(name)
            counts[name] = [selection.examples(count) for count in (1, 100, 300)]
    finally:
        settings.load_profile(selected)
    assert counts == {"quick": [1, 25, 75], "patient": [1, 100, 300]}


@functools.cache
def _names(source: Path) -> set[str]:
    """Names defined at the top level of a module; for a package, also the names of its modules."""
    names = {"*"}
    if source.stem == "__init__":
        names |= {entry.stem for entry in source.parent.iterdir()}
    module = ast.parse(source.read_text())
    for node in (node for statement in module.body for node in _outside_functions(statement)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _outside_functions(node: ast.AST):
    """The node and its descendants, without the bodies of functions and classes."""
    yield node
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        for child in ast.iter_child_nodes(node):
            yield from _outside_functions(child)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements inside a node. Their expressions, which have no imports, are nine tenths of the nodes."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for statement in getattr(node, name, ()):
            yield statement
            yield from _statements(statement)


def test_every_name_that_a_test_imports_exists():
    """Also imports inside functions: one of them once failed in CI only. (Pyright does not check the tests.)"""
    missing = []
    for file in sorted(TESTS.rglob("*.py")):
        for node in _statements(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                bases = [root.joinpath(*node.module.split(".")) for root in (TESTS.parent, TESTS)]
                sources = [source for base in bases for source in (base.with_suffix(".py"), base / "__init__.py")]
                for source in filter(Path.is_file, sources):
                    missing += [f"{file}: {node.module}.{a.name}" for a in node.names if a.name not in _names(source)]
    assert not missing


@pytest.mark.launch
def test_no_test_starts_after_the_time_limit(project, monkeypatch):
    """Each date has its own order, which keeps the tests of a file together."""
    for name in "abcdef":
        project.makepyfile(**{f"test_{name}": "def test_one(): pass\ndef test_two(): pass"})
    orders = set()
    for day in range(1, 5):
        monkeypatch.setenv("MYTHOS_TEST_DATE", f"2026-01-{day:02d}")
        monkeypatch.delenv("MYTHOS_TEST_END", raising=False)
        result = project.runpytest_subprocess("-v", "--minutes", "5", "-p", "no:cacheprovider")
        result.assert_outcomes(passed=12)
        ran = re.findall(r"^(test_.)\.py::test_(?:one|two) PASSED", result.stdout.str(), re.M)
        assert ran[::2] == ran[1::2] and len(set(ran)) == 6
        orders.add(tuple(ran))
    assert len(orders) > 1
    monkeypatch.setenv("MYTHOS_TEST_END", "0")
    result = project.runpytest_subprocess("--minutes", "5")
    result.assert_outcomes(skipped=12)
    result.stdout.fnmatch_lines(["*order of 2026-01-04: 0 units ran, 6 did not start*"])


@pytest.mark.launch
def test_a_failure_prints_the_rerun_command_and_the_last_lines_of_every_rank(project):
    """With `--cpu`, the summary also has the CPU seconds of the file, those of the ranks and their imports included."""
    project.makepyfile(
        test_run="""
        import sys
        import pytest
        from helpers.launch import launch

        @pytest.fixture
        def seed():
            return 7

        def fail():
            print("the last line of a rank", file=sys.stderr)
            sys.exit(5)

        def test_it(tmp_path, seed):
            (tmp_path / "run" / "logs").mkdir(parents=True)
            (tmp_path / "run" / "logs" / "rank-00003.log").write_text("step 1\\nstep 2\\n")
            assert launch(2, fail).codes == [0, 0]
        """
    )
    result = project.runpytest_subprocess("--cpu")
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    (seconds,) = re.findall(r"^ +([\d.]+)  test_run\.py$", text, re.M)
    assert 1 < float(seconds) < 100, text
    assert re.search(r"SEED=7 python -m pytest test_run\.py::test_it$", text, re.M), text
    assert re.search(r"^-+ run/logs/rank-00003\.log -+\nstep 1\nstep 2$", text, re.M), text
    for rank in (0, 1):
        assert re.search(rf"^-+ rank {rank} of launch 1, exit code 5 -+\nthe last line of a rank$", text, re.M), text
    (folder,) = re.findall(r"test folder \(kept\) -+\n(\S+)$", text, re.M)
    assert (project.path / folder / "run").is_dir()


@pytest.mark.launch
def test_ctrl_c_after_the_program_of_a_rank_has_ended_is_not_its_failure():
    result = launch.launch(1, InterruptsItsRank)
    assert result.codes == [0], result.tails


class InterruptsItsRank:
    """A value that is an interrupt when a rank writes it."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGINT)
        return OrderedDict, ()  # which `torch.load` accepts


@pytest.mark.launch
@pytest.mark.parametrize("ends", [1, 3], ids=["in the middle", "the last"])
def test_after_a_test_that_ends_its_worker_all_others_run(project, ends):
    """A whole run once waited seven minutes for tests that no worker had."""
    tests = "\n".join(f"def test_{i}(): {'os._exit(0)' if i == ends else 'pass'}" for i in range(4))
    project.makepyfile(test_a=f"import os\n{tests}", test_b="def test_b(): pass", test_c="def test_c(): pass")
    result = project.runpytest_subprocess("-n", "2", "-p", "no:cacheprovider", timeout=300)
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(
        ["*crashed while running*", "*rerun with*", f"*python -m pytest test_a.py::test_{ends}"]
    )
