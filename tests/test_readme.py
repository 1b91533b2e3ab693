"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch
REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_the_python_example_runs():
    """The block as it stands, in a process of its own."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (code,) = [block for block in blocks if "from mythos_dist.model import" in block]
    shape = "\nassert logits.shape == (1, 16, 1000) and tokens.shape == (1, 23), (logits.shape, tokens.shape)\n"
    subprocess.run([sys.executable, "-c", code + shape], check=True, timeout=480)


def test_the_errors_shown_are_the_errors_printed():
    """The commands of the README that are mistakes, their output word for word, and exit code 2."""
    examples = re.findall(r"\$ python (-m mythos_dist\.train .*?)\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 2
    for command, shown in examples:
        result = subprocess.run(
            [sys.executable, *command.split()], capture_output=True, text=True, cwd=REPOSITORY, timeout=240
        )
        assert (result.returncode, result.stdout, result.stderr) == (2, "", shown)


def test_the_plan_shown_is_the_plan_printed():
    (command, shown), *_ = re.findall(r"\$ python (tools/plan\.py --variant .*?)\n(.*?)```", README, flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, cwd=REPOSITORY, timeout=240
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, shown, "")


def test_every_file_that_the_readme_names_is_there():
    """Paths in code spans and commands, but for what a run makes."""
    named = set(re.findall(r"\b(?:tools|configs|benchmarks)/[\w./-]*\w", README)) | {"DECISIONS.md", "CHANGELOG.md"}
    assert {"tools/make_shards.py", "configs/1b.yaml"} <= named
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []
