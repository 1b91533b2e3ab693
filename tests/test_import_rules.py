"""Imports among our packages point one way.

Decisions: PROJECT-2, HF-4.
"""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# What each package may import of the others; SHARED may be imported by all. The core comes
# first; nothing of it imports operations, the making of shards or experiments.
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "gpu_packages": set(),
    "packaged": set(),
    "private": set(),
    "progress": set(),
    "units": set(),
    "urls": set(),
    "config": set(),
    "store": set(),
    "data": {"config", "store"},
    "parallel": {"config"},
    "model": {"parallel", "config"},
    "checkpoint": {"model", "parallel", "data", "config", "store"},
    "huggingface": set(),  # copied into exports, where nothing of ours is
    "train": {"checkpoint", "model", "parallel", "data", "config", "store"},
    "generate": {"train", "checkpoint", "model", "parallel", "data", "config"},
    "evaluate": {"generate", "train", "checkpoint", "model", "parallel", "data", "config"},
    "serve": {"generate", "checkpoint", "model", "data", "config"},
    "prepare": {"data", "store", "config"},
    "ops.cluster": {"checkpoint", "parallel", "config"},
    "ops.plan": {"train", "model", "parallel", "config"},
    "ops.report": {"ops.cluster", "checkpoint", "parallel", "data", "config"},
    "ops": {
        "ops.cluster",
        "ops.report",
        "store",
        "ops.plan",
        "evaluate",
        "train",
        "checkpoint",
        "model",
        "parallel",
        "data",
        "config",
    },
    "ops.doctor": {"ops", "ops.cluster", "ops.plan", "train", "model", "parallel", "data", "config"},
    "doctor": {"ops.doctor", "config"},
    "commands": {
        *("prepare", "serve", "evaluate", "generate", "ops", "ops.cluster", "ops.plan", "ops.report"),
        *("train", "checkpoint", "model", "parallel", "data", "store", "config"),
    },
    "experiments": {
        "prepare",
        "generate",
        "train",
        "checkpoint",
        "ops",
        "ops.plan",
        "model",
        "parallel",
        "data",
        "config",
    },
}
# Not part of the core: it puts the core and operations together.
ENTRY_POINT = "mythos_dist.train.__main__"
CONSOLE = "mythos_dist.__main__"  # `python -m mythos_dist`
# The public names are imported from all packages, each at its first use.
PUBLIC = REPOSITORY / "mythos_dist" / "__init__.py"
# `Mythos.generate` imports the engine when it is called (DECODE-4).
CALLED_LATER = {"mythos_dist.model.mythos": {"generate"}}
SHARED = {"errors", "files", "gpu_packages", "packaged", "private", "progress", "units", "urls"}
CORE = {"config", "store", "data", "model", "parallel", "checkpoint", "train"}
COPIED = REPOSITORY / "mythos_dist" / "huggingface"  # its files import each other as transformers requires
FILES = sorted(path for folder in ("mythos_dist", "experiments") for path in (REPOSITORY / folder).rglob("*.py"))
SCRIPTS = sorted(path for folder in ("tools", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))
COMMAND_LINES = sorted(
    path
    for folder in ("tools", "mythos_dist/commands")
    for path in (REPOSITORY / folder).glob("[!_]*.py")
    if path.name not in ("main.py", "completion.py")  # what all command lines share
)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, wherever the line stands; `from a import b` counts as a.b."""
    imports = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent == COPIED, f"{path}:{node.lineno}: a relative import"
            imports |= {f"{node.module}.{alias.name}" for alias in node.names}
    return imports


def package_of(module: str) -> str:
    """The package of a module of ours; "" of others, and of mythos_dist itself."""
    top, *parts = module.split(".")
    if top == "experiments":
        return top
    if top != "mythos_dist" or not parts or parts[0].startswith("__"):
        return ""
    nested = ".".join(parts[:2])
    return nested if nested in MAY_IMPORT else parts[0]


def packages(path: Path) -> set[str]:
    """The packages of ours that a file imports from."""
    return {package_of(module) for module in imported_modules(path)} - {""}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_one_way(path):
    """An import inside a function counts as well."""
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    package = package_of(module)
    if module == ENTRY_POINT:
        assert packages(path) - SHARED <= CORE | {"ops", "ops.cluster"}
    elif module == CONSOLE:
        assert packages(path) == {"commands"}
    elif package:
        assert packages(path) - {package} - SHARED <= MAY_IMPORT[package] | CALLED_LATER.get(module, set())
    else:
        assert packages(path) == set() or path == PUBLIC


def test_the_core_imports_only_the_core():
    for package in CORE:
        assert MAY_IMPORT[package] <= CORE


def test_the_allowed_directions_have_no_cycle():
    """Each round takes away the packages that import nothing that is left; at the end none remains."""
    left = dict(MAY_IMPORT)
    while left:
        leaves = [package for package, imports in left.items() if not imports & left.keys()]
        assert leaves, f"a cycle among {sorted(left)}"
        for package in leaves:
            del left[package]


@pytest.mark.parametrize("path", sorted(COPIED.glob("*_mythos.py")), ids=lambda path: path.name)
def test_what_exports_carry_needs_pytorch_and_transformers_alone(path):
    """And the standard library; files beside it are all copied as well."""
    from mythos_dist.checkpoint.hugging_face import CODE_FILES

    modules = {module.split(".")[0] for module in imported_modules(path)}
    beside = {name.removesuffix(".py") for name in CODE_FILES}
    assert modules <= {"torch", "transformers"} | beside | sys.stdlib_module_names
    assert path.name in CODE_FILES


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported_at_once(path: Path) -> set[str]:
    """What a file imports at its top level, as `imported_modules`: imports inside functions run later."""
    imports = set()
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return imports


def test_files_of_a_package_have_no_cycle():
    """Among files, imports at the top level of a module only: those inside functions run later."""
    names = {module_of(path) for path in FILES}
    graph = {}
    for path in FILES:
        targets = {
            f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in names else node.module
            for node in parse(path).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        graph[module_of(path)] = (targets & names) - {module_of(path)}
    while graph:
        leaves = [name for name, targets in graph.items() if not targets & graph.keys()]
        assert leaves, f"a cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


@pytest.mark.parametrize("path", COMMAND_LINES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_help_needs_no_torch(path):
    """No file that a command line imports at its top level imports torch: `--help` takes 0.1 s, not 2.
    tests/test_imports.py runs the commands; this is its quick half, which also names the file."""
    files = {module_of(file): file for file in FILES}
    reached, new = set(), {path}
    while new:
        reached |= new
        modules = {module for file in new for module in imported_at_once(file)}
        importers = [str(file.relative_to(REPOSITORY)) for file in new if "torch" in imported_at_once(file)]
        assert not importers, f"imports torch at its top level: {importers}"
        parents = {".".join(module.split(".")[:n]) for module in modules for n in range(1, module.count(".") + 2)}
        new = {files[module] for module in parents if module in files} - reached


def test_the_rule_catches_a_wrong_import(tmp_path):
    """The check itself: an import hidden in a function and one of a name from the package are both seen."""
    path = tmp_path / "wrong.py"
    path.write_text("from mythos_dist import train\ndef f():\n    import mythos_dist.data.mix\nimport torch\n")
    assert packages(path) == {"train", "data"}
    path = tmp_path / "another.py"
    path.write_text("from mythos_dist.ops import preflight\nfrom mythos_dist.ops.plan.estimate import Estimate\n")
    assert packages(path) == {"ops", "ops.plan"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_scripts_import_the_package_and_not_each_other(path):
    """What benchmarks share is in a file that is not a script."""
    runs = {script for script in SCRIPTS if "__main__" in script.read_text(encoding="utf-8")}
    assert {script.name for script in SCRIPTS} - {script.name for script in runs} == {"common.py"}
    ours = {script.stem for script in runs} | {"tools", "benchmarks", "tests"}
    assert not {module.split(".")[0] for module in imported_modules(path)} & ours


@pytest.mark.parametrize("path", COMMAND_LINES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_tools_are_thin(path):
    """A command line over functions of the library: one that grows has work in it that belongs there."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


def test_the_tests_readme_has_a_line_for_each_file():
    """And none for a file that is gone."""
    tests = REPOSITORY / "tests"
    listed = re.findall(r"^\| `([^`]+\.py)` ", (tests / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(str(path.relative_to(tests)) for path in tests.rglob("*.py"))


def test_no_two_public_classes_or_functions_have_one_name():
    """One name per concept. The files that exports copy are those of another package: they import nothing of ours.
    Experiments are programs, whose functions nothing else calls."""
    of_every_program = {"main", "run", "build_parser"}
    files_of: dict[str, list[str]] = {}
    for path in FILES:
        kinds = (ast.ClassDef,) if "experiments" in path.parts else (ast.ClassDef, ast.FunctionDef)
        for node in parse(path).body if path.parent != COPIED else ():
            if isinstance(node, kinds) and not node.name.startswith("_") and node.name not in of_every_program:
                files_of.setdefault(node.name, []).append(str(path.relative_to(REPOSITORY)))
    assert {name: files for name, files in files_of.items() if len(files) > 1} == {}
