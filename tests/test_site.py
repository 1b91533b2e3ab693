"""The documentation site: it builds without a warning, is complete, and what its pages show runs.

Decisions: PROJECT-9.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import mythos_dist
from mythos_dist.config.load import SECTIONS, load_stages
from mythos_dist.config.tree import parse_yaml

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
sys.path.append(str(DOCS))

from site_build import api, commands, links, notebook, pages, settings  # noqa: E402

SETTINGS = [one for section in settings.all_settings().values() for one in section]
PYTHON_BLOCKS = {  # page -> the test that does what its blocks show
    "checkpoints.md": "checkpoint/test_universal.py",
    "generation.md": "generate/test_engine.py",
    "huggingface.md": "huggingface/test_use.py",
    "retrofit.md": "checkpoint/test_retrofit.py",
    "serving.md": "serve/test_server.py",
}


@pytest.mark.launch
def test_the_site_builds_without_warnings_and_has_everything(tmp_path):
    """Strictly, with its links checked (`conf.py: _check_links`); search needs no server."""
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", tmp_path / "state"]
    command = [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    reference = (tmp_path / "site" / "reference" / "settings.html").read_text()
    fields = {f"{SECTIONS[s].section}.{one.name}" for s in SECTIONS for one in dataclasses.fields(SECTIONS[s])}
    assert {name for name in fields if f"<h3>{name}<" not in reference} == set()
    python = (tmp_path / "site" / "reference" / "python.html").read_text()
    assert {name for name in mythos_dist.__all__ if f'id="mythos_dist.{name}"' not in python} == set()
    assert "Search.setIndex" in (tmp_path / "site" / "searchindex.js").read_text()
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.M)
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= set(listed)


def test_each_setting_has_a_description_and_examples_that_are_accepted():
    """A setting without one needs a comment in schema.py, or an example in docs/site_build/settings.py."""
    bare = [one.name for one in SETTINGS if len(one.description) < 8 or not one.examples or not one.type_text]
    assert bare == [] and len(SETTINGS) > 100
    for one in SETTINGS:
        for value, _ in one.examples:
            (node,) = parse_yaml(f"value: {value}").values()  # pyright: ignore[reportAttributeAccessIssue]
            if not one.kind.section:  # load_config constructs those
                assert one.kind.problem(one.kind.read(node)) is None, (one.name, value)


def test_descriptions_are_the_comments_of_a_field(tmp_path, monkeypatch):
    """Those above it, without a blank line between, and the one beside it."""
    source = (
        "class Sample:\n    # Not of a field.\n\n    # Above: in two\n    # lines.\n    a: int = 1  # beside it\n"
        "    b: int = 2\n    c: str = '# no comment'  # tokens\n"
    )
    (tmp_path / "sample_section.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    from sample_section import Sample  # pyright: ignore[reportMissingImports]

    assert settings.comments_of(Sample) == {"a": "Above: in two lines. beside it.", "b": "", "c": "tokens."}
    assert (
        settings.markdown("auto: a * b_c, or `x_y`; None: no", ("auto",)) == "`auto`: a \\* b\\_c, or `x_y`; `null`: no"
    )


def test_every_command_is_in_the_reference():
    """And every public name; nothing that is gone is."""
    page = commands.page()
    for name in [f"mythos {command.name}" for command in commands.COMMANDS] + ["python tools/loop_ablation.py"]:
        assert f"### {name}\n" in page
    assert page.count("usage: mythos ") == len(commands.COMMANDS) and "plan" not in {s.stem for s in commands.studies()}
    assert sorted(name for group in api.GROUPS.values() for name in group) == mythos_dist.__all__


def test_members_of_the_python_reference_exist():
    listed = [(name, member) for name, members in api.MEMBERS.items() for member in members.split(", ")]
    assert [one for one in listed if not hasattr(getattr(mythos_dist, one[0]), one[1])] == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    """Missing files, missing places on a page, what a page loads from a network, addresses without a host."""
    (tmp_path / "b.html").write_text('<p id="here">')
    good = '<a href="b.html#here"></a><a href="#top" id="top"></a><a href="https://a.org/x">'
    bad = '<a href="c.html"><a href="b.html#there"><img src="https://a.org/x.png"><a href="https://"><a href="#no">'
    (tmp_path / "a.html").write_text(good + bad)
    found = [problem.split(": ", 1)[1] for problem in links.problems(tmp_path)]
    addresses = ["c.html", "b.html#there", "https://a.org/x.png", "https://", "#no"]
    assert [problem.split(": ")[0] for problem in found] == addresses


def test_links_of_the_repository_lead_to_pages_of_the_site():
    """As on GitHub; files that are not pages, and from which none is made, are named."""
    text = "[a](../DECISIONS.md) [b](docs.md#x) ![c](d.png) [e](../configs/1b.yaml) [f](https://a.org)\n```\n[g](h.md)\n```\n"
    assert pages.relinked(text, "docs/page.md", DOCS) == (
        "[a](reference/decisions.md) [b](docs.md#x) ![c](d.png) e (`configs/1b.yaml`) [f](https://a.org)\n```\n[g](h.md)\n```\n"
    )
    for file, page in pages.MADE.items():
        assert (DOCS.parent / file).is_file()
        assert pages.relinked(f"[a](../{file})", "docs/page.md", DOCS) == f"[a](reference/{page})"


def test_yaml_blocks_are_settings_and_python_blocks_are_python(tmp_path):
    """Settings that exist, with values that they take; a test does what Python blocks show."""
    for page in sorted(DOCS.glob("*.md")):
        for language, block in re.findall(r"^```(yaml|python)\n(.*?)^```", page.read_text(), re.M | re.S):
            if language == "python":
                compile(block, page.name, "exec")
                assert (REPOSITORY / "tests" / PYTHON_BLOCKS[page.name]).exists()
            elif set(content := yaml.safe_load(block)) & {*SECTIONS, "stages"}:
                config = tmp_path / "config.yaml"
                base = REPOSITORY / "configs" / "recipes" / content.get("base", "../1b.yaml")  # beside the page's file
                config.write_text(json.dumps({**content, "base": str(base)}))
                load_stages(config)


def commands_of(page: str) -> list[str]:
    """The commands in blocks of a page, in order."""
    blocks = re.findall(r"^```\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.launch
@pytest.mark.long  # a minute; its commands are also those of other tests
def test_the_laptop_page_leads_to_a_trained_and_resumed_model(tmp_path):
    """Its commands in order, in a new folder; the run is stopped by Ctrl-C where the page says so."""
    for name in ("configs", "launch", "mythos_dist", "tools"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    elsewhere = r"make |source |.*text/|.*configs/300m"  # test_readme.py runs those of the README
    ours = [line for line in commands_of("laptop.md") if not re.match(elsewhere, line)]
    ours = [line.replace("train.steps=300", "train.steps=24") for line in ours]
    train = next(line for line in ours if line.startswith("mythos train"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for line in ours:
        job = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=tmp_path, env=environment, text=True)
        if line == train:
            metrics = tmp_path / "runs" / "laptop" / "metrics.jsonl"
            while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
                time.sleep(0.1)
            job.send_signal(signal.SIGINT)
        assert job.wait(timeout=600) == (85 if line == train else 0), line
    assert (tmp_path / "runs" / "laptop" / "COMPLETED").exists()
    assert (tmp_path / "runs" / "laptop" / "report.html").exists()


@pytest.mark.launch
@pytest.mark.long  # minutes
@pytest.mark.timeout(1160)
def test_the_notebook_runs(tmp_path):
    """From the first cell to the last, with the losses that it is stored with."""
    for name in ("configs", "mythos_dist", "tools"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    (file,) = (tmp_path / "examples").glob("*.ipynb")
    losses = losses_of(notebook.execute(file))
    assert len(losses) == 8
    assert losses == pytest.approx(losses_of(json.loads(notebook.NOTEBOOK.read_text())), abs=0.05)  # of another CPU


def losses_of(book: Any) -> list[float]:
    """The losses that the results of a notebook show, over the number of loops."""
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    return [float(loss) for loss in re.findall(r"loops: loss ([\d.]+)", printed)]


def test_the_notebook_is_stored_with_its_results():
    """Those of all its cells, in order; the plots make it no larger than a page."""
    book = json.loads(notebook.NOTEBOOK.read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    results = [output for cell in cells for output in cell["outputs"]]
    assert len(losses_of(book)) == 8 and sum("image/png" in output.get("data", {}) for output in results) == 2
    assert not [output for output in results if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert notebook.NOTEBOOK.stat().st_size < 150_000


def test_each_setting_says_since_when():
    """Version 0.1 for those that a run of that version has in its config.yaml."""
    old = yaml.safe_load((REPOSITORY / "tests/fixtures/run_of_version_0.1/run/config.yaml").read_text())
    entries = dict(re.findall(r"^### (\S+)\n(.*?)(?=^#|\Z)", settings.page(), re.M | re.S))
    assert set(entries) == {one.name for one in SETTINGS}
    for name, entry in entries.items():
        section, _, field = name.rpartition(".")
        is_old = field in (old.get(section) or {})
        assert f"- Since: {'0.1' if is_old else 'the version after 0.1'}\n" in entry, name
        assert re.search(r"^- Type: .{4,}$", entry, re.M) and re.search(r"^- Default: .{3,}$", entry, re.M), name
