"""The public names: complete, quick to import, documented, and their examples run."""

import doctest
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small_checkpoint import write_run

import mythos_dist
from mythos_dist.checkpoint.export import export
from mythos_dist.checkpoint.restore import open_weights_at

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "mythos_dist"


@pytest.fixture(scope="module")
def project(config, shards, tmp_path_factory) -> Path:
    """A folder as the examples expect it: configs, a text, shards, a run and an export of it."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    (folder / "shards").symlink_to(shards)
    texts = [f"A story of number {i}. " + " ".join(str(i * j) for j in range(40)) for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    export(open_weights_at(write_run(folder / "runs" / "first", config)), folder / "exported", "safetensors")
    return folder


@pytest.mark.parametrize("name", mythos_dist.__all__)
def test_each_public_name_is_documented_and_its_examples_run(name, project, monkeypatch):
    """Docstrings say what a thing is, and show it; the examples of methods are those of their class."""
    monkeypatch.chdir(project)
    value = getattr(mythos_dist, name)
    examples = [one for one in doctest.DocTestFinder(recurse=True).find(value, name, globs={}) if one.examples]
    assert any(one.name == name for one in examples), f"{name} has no example"
    for one in examples:
        failed = doctest.DocTestRunner(verbose=False).run(one)
        assert failed.failed == 0, f"{one.name}: see the captured output"
    methods = [(f"{name}.{key}", one) for key, one in vars(value).items()] if inspect.isclass(value) else []
    for key, one in [(name, value), *methods]:
        if not key.split(".")[-1].startswith("_") and (inspect.isroutine(one) or inspect.isclass(one)):
            assert inspect.getdoc(one), f"{key} has no docstring"


def test_public_names_are_listed_alike_and_typed():
    """For `from mythos_dist import *`, for type checkers (the imports below TYPE_CHECKING) and at run time."""
    source = (PACKAGE / "__init__.py").read_text()
    for name, module in mythos_dist._MODULE_OF.items():
        (line,) = [line for line in source.splitlines() if line.startswith(f"    from mythos_dist.{module} import ")]
        assert name in line.partition(" import ")[2].split(", ")
    assert sorted(mythos_dist._MODULE_OF) == mythos_dist.__all__ and set(mythos_dist.__all__) <= set(dir(mythos_dist))
    assert (PACKAGE / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'Mythoss'"):
        _ = mythos_dist.Mythoss


@pytest.mark.launch
def test_the_package_is_imported_without_torch():
    code = "import sys, mythos_dist; mythos_dist.load_config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
