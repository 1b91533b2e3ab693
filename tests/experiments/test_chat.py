"""The fine-tuning demo: its data, and whether a model learns to answer what it has not seen."""

import json
import subprocess
import sys

import pytest
from helpers.small_run import REPOSITORY

from experiments.chat_task import read_prompts, write_chat_task
from mythos_dist.errors import UserError


def test_prompts_are_in_no_conversation(tmp_path):
    write_chat_task(tmp_path / "task", conversations=3000, prompts=500)
    lines = [json.loads(line) for line in (tmp_path / "task" / "train.jsonl").read_text().splitlines()]
    words, prompts = {line["prompt"] for line in lines}, set(read_prompts(tmp_path / "task"))
    assert (len(words), len(prompts)) == (3000, 500) and not words & prompts
    assert all(line["completion"] == "".join(reversed(line["prompt"])) for line in lines)
    with pytest.raises(UserError, match="exists"):
        write_chat_task(tmp_path / "task")
    with pytest.raises(UserError, match="457,000 words of 4 letters do not exist"):
        write_chat_task(tmp_path / "new", conversations=456_900, prompts=100)


@pytest.mark.launch
@pytest.mark.long
def test_a_tuned_model_answers_prompts_that_it_has_not_seen(tmp_path):
    """From chance to 95 % of exact answers, with two thirds of the demo's steps. The second call trains nothing."""
    command = [sys.executable, REPOSITORY / "tools" / "chat_demo.py", "--out", tmp_path / "demo", "train.steps=400"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert first.returncode == 0, first.stderr[-2000:]
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["before"] < 0.01 and summary["after"] > 0.95
    metrics = (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes()
    assert subprocess.run(command, capture_output=True, cwd=REPOSITORY).returncode == 0
    assert (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes() == metrics
    talk = [
        sys.executable,
        REPOSITORY / "tools" / "generate.py",
        tmp_path / "demo" / "run",
        "--chat",
        "--temperature",
        "0",
    ]
    talked = subprocess.run(talk, input="wxyz\n\nabcd\n", capture_output=True, text=True, cwd=REPOSITORY)
    assert talked.returncode == 0 and talked.stdout.splitlines()[0] == "zyxw", talked.stderr
