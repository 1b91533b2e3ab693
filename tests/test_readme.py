"""What the README and docs/ show is what the commands print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text() for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
ALL = "\n".join(PAGES.values())


@pytest.mark.launch
def test_the_python_example_runs():
    """The block as it stands, in a process of its own."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (code,) = [block for block in blocks if "from mythos_dist.model import" in block]
    shape = "\nassert logits.shape == (1, 16, 1000) and tokens.shape == (1, 23), (logits.shape, tokens.shape)\n"
    subprocess.run([sys.executable, "-c", code + shape], check=True, timeout=480)


@pytest.mark.launch
def test_the_errors_shown_are_the_errors_printed():
    """The example of wrong settings prints exactly the shown errors and exits with code 2."""
    examples = re.findall(r"\$ python (-m mythos_dist\.train .*?)\n(.*?)```", ALL, flags=re.DOTALL)
    assert len(examples) == 2
    for command, shown in examples:
        result = subprocess.run(
            [sys.executable, *command.split()], capture_output=True, text=True, cwd=REPOSITORY, timeout=240
        )
        assert (result.returncode, result.stdout, result.stderr) == (2, "", shown)


@pytest.mark.launch
def test_the_plan_shown_is_the_plan_printed():
    (command, shown), *_ = re.findall(r"\$ python (tools/plan\.py --variant .*?)\n(.*?)```", ALL, flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, cwd=REPOSITORY, timeout=240
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, shown, "")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    """Paths in code spans and commands, but for what a run makes; targets of links."""
    folder = REPOSITORY if page == "README.md" else REPOSITORY / "docs"
    links = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page]))
    assert [link for link in sorted(links) if not (folder / link).exists()] == []
    named = re.findall(r"\b(?:tools|configs|benchmarks|tests|experiments|mythos_dist)/[\w./-]*\w", PAGES[page])
    if page == "README.md":
        assert {"tools/make_shards.py", "configs/1b.yaml"} <= set(named)
    assert [name for name in sorted(set(named)) if not (REPOSITORY / name).exists()] == []


def test_the_readme_is_short_and_its_first_lines_name_the_map():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert "docs/architecture.md" in "\n".join(lines[:10])


def test_every_function_that_the_map_names_exists():
    """`train/loop.py: Run.train_steps` and its like; a name after a comma is in the same file."""
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`((?:, `[A-Za-z_][\w.]*`)*)", PAGES["architecture.md"])
    assert len(named) > 15
    files = {
        path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in REPOSITORY.glob("mythos_dist/**/*.py")
    }
    missing = []
    for file, first, more in named:
        (source,) = [text for path, text in files.items() if path.endswith(f"/{file}")]
        for name in [first, *re.findall(r"`([\w.]+)`", more)]:
            if not re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b", source, re.M):
                missing.append(f"{file}: {name}")
    assert missing == []


def test_decisions_and_the_code_cite_each_other():
    """Each decision has an id of its own, and the code that follows from it names the id."""
    ids = re.findall(r"^\*\*([A-Z]+-\d+)\. ", (REPOSITORY / "DECISIONS.md").read_text(), re.M)
    assert len(ids) == len(set(ids)) > 80
    folders = ("mythos_dist", "tools", "tests", "experiments", "launch")
    code = "\n".join(path.read_text() for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))
    sections = {one.split("-")[0] for one in ids}
    cited = {one for one in re.findall(r"\b([A-Z]+-\d+)\b", code) if one.split("-")[0] in sections}
    assert sorted(cited - set(ids)) == [] and sorted(set(ids) - cited) == []
