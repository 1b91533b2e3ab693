"""The suite's own tools: what goes to a worker, in which order, which part of the long tests, what a failure prints."""

import ast
import functools
import re
from pathlib import Path

import pytest
from helpers import schedule
from helpers.schedule import order, unit_of, write_seconds

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent


@pytest.fixture
def project(pytester):
    """A folder of tests with the suite's plugins."""
    pytester.makeini(f"[pytest]\npythonpath = {TESTS}\ntmp_path_retention_policy = failed")
    pytester.makeconftest('pytest_plugins = ["helpers.schedule", "helpers.report"]')
    return pytester


def test_units_are_files_tests_or_launches():
    assert unit_of("tests/data/test_mix.py::test_a[x-1]") == "tests/data/test_mix.py"
    drill = "tests/cluster/test_drills.py::test_preemption"
    assert unit_of(drill) == drill
    grid = "tests/parallel/test_parity_grid.py::test_a_run_resumes_bit_for_bit[4 ranks, pipe=4, bare]"
    assert unit_of(grid) == "tests/parallel/test_parity_grid.py 4"


def test_the_longest_come_first_and_what_waits_beside_what_computes(monkeypatch):
    seconds = {"tests/a.py": 10, "tests/b.py": 60, "tests/c.py": 30, "tests/cluster/d.py": 50, "tests/cluster/e.py": 50}
    monkeypatch.setattr(schedule, "seconds_by_file", lambda: seconds)
    place = order([f"{file}::test_{i}" for file in seconds for i in range(2)])
    by_place = sorted(place, key=lambda unit: place[unit])
    assert [unit for unit in by_place if "cluster" not in unit] == ["tests/b.py", "tests/c.py", "tests/a.py"]
    assert place["tests/cluster/e.py"] == 0.5 and place["tests/c.py"] == 0.6 and place["tests/a.py"] == 0.9


def test_files_of_no_seconds_have_an_order_too(monkeypatch):
    """Such a file, run alone, once ended in a division by zero."""
    monkeypatch.setattr(schedule, "seconds_by_file", lambda: {"tests/a.py": 0.0})
    assert order(["tests/a.py::test_1", "tests/a.py::test_2"]) == {"tests/a.py": 0}


def test_seconds_are_written_into_the_last_column(monkeypatch, tmp_path):
    monkeypatch.setattr(schedule, "TESTS", tmp_path)
    (tmp_path / "README.md").write_text("| `a.py` | x | y |  |\n| `b.py` | x 1.5 | y | 9.0 |\n")
    write_seconds({"tests/a.py": 1.26})
    assert (tmp_path / "README.md").read_text() == "| `a.py` | x | y | 1.3 |\n| `b.py` | x 1.5 | y | 9.0 |\n"
    assert schedule.seconds_by_file() == {"tests/a.py": 1.3, "tests/b.py": 9.0}


@functools.cache
def _names(source: Path) -> set[str]:
    """What a module's top level defines; of a package, its modules too."""
    found = {"*"} | ({entry.stem for entry in source.parent.iterdir()} if source.stem == "__init__" else set())
    module = ast.parse(source.read_text())
    for node in (node for statement in module.body for node in _outside_of_functions(statement)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def _outside_of_functions(node: ast.AST):
    yield node
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        for child in ast.iter_child_nodes(node):
            yield from _outside_of_functions(child)


def test_every_name_that_a_test_imports_exists():
    """Those inside functions too: such a test once failed in CI only. (Pyright reads the package, not the tests.)"""
    missing = []
    for file in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                bases = [root.joinpath(*node.module.split(".")) for root in (TESTS.parent, TESTS)]
                sources = [source for base in bases for source in (base.with_suffix(".py"), base / "__init__.py")]
                for source in filter(Path.is_file, sources):
                    missing += [f"{file}: {node.module}.{a.name}" for a in node.names if a.name not in _names(source)]
    assert not missing


@pytest.mark.launch
def test_no_test_begins_after_the_minutes_are_over(project, monkeypatch):
    """And each date has an order of its own, that files keep together in."""
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
    result.stdout.fnmatch_lines(["*the part of 2026-01-04: 0 units ran, 6 did not begin*"])


@pytest.mark.launch
def test_a_failure_says_how_to_run_it_alone_and_shows_every_ranks_last_lines(project):
    project.makepyfile(
        test_run="""
        import sys
        import pytest
        from helpers.launch import launch

        @pytest.fixture
        def seed():
            return 7

        def say():
            print("a rank's last words", file=sys.stderr)
            sys.exit(5)

        def test_it(tmp_path, seed):
            (tmp_path / "run" / "logs").mkdir(parents=True)
            (tmp_path / "run" / "logs" / "rank-00003.log").write_text("step 1\\nstep 2\\n")
            assert launch(2, say).codes == [0, 0]
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert re.search(r"SEED=7 python -m pytest test_run\.py::test_it$", text, re.M), text
    assert re.search(r"^-+ run/logs/rank-00003\.log -+\nstep 1\nstep 2$", text, re.M), text
    for rank in (0, 1):
        assert re.search(rf"^-+ rank {rank} of launch 1, exit code 5 -+\na rank's last words$", text, re.M), text
    (folder,) = re.findall(r"its folder, which stays -+\n(\S+)$", text, re.M)
    assert (project.path / folder / "run").is_dir()
