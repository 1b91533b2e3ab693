"""`train.tasks`: a run evaluates tasks at every layout, with the scores of the tool, and trains as without them."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from threading import Thread

import pytest
from helpers.launch import run_tool, train
from helpers.local_task import random_choices, write_answers, write_choices
from helpers.run_folder import at, lines
from helpers.selection import selected
from helpers.small_run import REPOSITORY

pytestmark = pytest.mark.launch

LAYOUTS = {
    "one rank": (1, []),
    "context": (2, ["parallel.context=2"]),
    "pipe": (2, ["parallel.pipe=2"]),
    "zero 3": (2, ["parallel.zero=3"]),
    "tensor, sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "data, expert, zero 1": (2, ["parallel.expert=2"]),
}
SHORT = ("one rank", "context", "pipe", "zero 3")  # the others run their tasks as these do


@pytest.fixture(scope="module")
def task_settings(settings, tmp_path_factory):
    """A small run with two tasks; `datasets` keeps what it has read in a folder of the test."""
    folder = tmp_path_factory.mktemp("tasks")
    task = write_choices(folder, "choices", random_choices(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        tasks = f"train.tasks=[{task},perplexity_by_position]"
        yield [*settings, "train.dtype=fp32", "train.eval_samples=8", tasks, "train.tasks_every=4"]


@pytest.fixture(scope="module")
def runs(task_settings, tmp_path_factory, request):
    """The run folders, by layout."""
    folders, needed = {}, selected(request, "layout") | {"one rank", "pipe"}
    for name, (world, layout) in ((name, LAYOUTS[name]) for name in LAYOUTS if name in needed):
        folders[name] = tmp_path_factory.mktemp("run") / "run"
        result = train(world, *task_settings, *layout, f"run.dir={folders[name]}")
        assert result.codes == [0] * world, (name, result.tails)
        assert "choices  acc" in result.out
    return folders


def values(folder) -> dict[int, dict]:
    """The tasks' results by step."""
    return {line["step"]: line["tasks"] for line in lines(folder, "eval.jsonl") if "tasks" in line}


@pytest.mark.parametrize(
    "layout", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in list(LAYOUTS)[1:]]
)
def test_scores_are_the_same_at_every_layout(runs, layout):
    """Perplexities in fp32, up to the order of summation; a choice flips only where two are equally likely."""
    expected, got = values(runs["one rank"]), values(runs[layout])
    assert list(got) == list(expected) == [4, 6]
    for step, tasks in expected.items():
        assert got[step]["choices"] == tasks["choices"]
        for metric, one in tasks["perplexity_by_position"].items():
            assert got[step]["perplexity_by_position"][metric]["value"] == pytest.approx(one["value"], rel=1e-4)
            assert got[step]["perplexity_by_position"][metric]["samples"] == one["samples"]


def test_scores_are_those_of_the_tool(runs, task_settings, tmp_path):
    """On the checkpoint of the same step, unsharded and padded instead of packed."""
    tasks = next(one for one in task_settings if one.startswith("train.tasks="))
    names = tasks.removeprefix("train.tasks=[").removesuffix("]")
    options = ("--tasks", names, "--samples", 8, "--out", tmp_path / "result", "--json")
    result = run_tool(REPOSITORY / "tools" / "evaluate.py", at(runs["pipe"], 4), *options)
    assert result.codes == [0], result.tails
    expected = json.loads(result.out.splitlines()[-1])["tasks"]
    for task, metrics in values(runs["pipe"])[4].items():
        assert set(metrics) == set(expected[task])
        for metric, one in metrics.items():
            assert one["value"] == pytest.approx(expected[task][metric]["2"]["value"], rel=1e-4), (task, metric)


def test_a_run_trains_as_without_tasks_also_after_a_resume(runs, task_settings, tmp_path):
    """Losses to the bit: without tasks, and with them in a run that stops after the step of an evaluation."""
    without = [one for one in task_settings if not one.startswith("train.tasks")]
    assert train(1, *without, f"run.dir={tmp_path / 'without'}").codes == [0]
    stopped = [*task_settings, f"run.dir={tmp_path / 'stopped'}"]
    assert train(1, *stopped, env={"KILL_AFTER": str(tmp_path / "stopped/checkpoints/step-00000004")}).codes == [-9]
    assert train(1, *stopped).codes == [0]
    expected = lines(runs["one rank"])
    for folder in ("without", "stopped"):
        for ours, theirs in zip(lines(tmp_path / folder), expected, strict=True):
            assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    assert values(tmp_path / "stopped") == values(runs["one rank"])
    assert values(tmp_path / "without") == {}


def test_tasks_that_a_run_cannot_evaluate_are_refused_before_it_begins(task_settings, tmp_path):
    answers = write_answers(tmp_path, "answers", [{"question": "a", "answer": "b"}])
    for tasks, message in {str(answers): "answers generates text", "no.yaml": "no.yaml cannot be read"}.items():
        result = train(1, *task_settings, f"train.tasks=[{tasks}]", f"run.dir={tmp_path / 'run'}")
        assert result.codes == [2] and message in result.err and "Traceback" not in result.err
        assert not (tmp_path / "run").exists()


def test_evaluations_have_bars_on_a_terminal(task_settings, tmp_path):
    """The held-out loss with two numbers of loops beside the trained one, and the requests of the tasks."""
    reader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    shown = bytearray()

    def read() -> None:
        while chunk := os.read(reader, 4096):
            shown.extend(chunk)
            if b"END" in shown:
                return

    thread = Thread(target=read)
    thread.start()
    command = [sys.executable, "-m", "mythos_dist.train", *task_settings, "loops.sweep=[1,2]", "train.steps=1"]
    process = subprocess.run([*command, f"run.dir={tmp_path}/run"], stdout=subprocess.PIPE, stderr=terminal)
    os.write(terminal, b"END")
    thread.join()
    os.close(reader)
    os.close(terminal)
    text = shown.decode()
    assert process.returncode == 0, text
    finished = re.findall(r"\r(evaluating[a-z ]*): 100%\|[^\r]*", text)
    assert set(finished) == {"evaluating", "evaluating tasks"}, text
    assert "3/3" in text  # evaluations
