"""tools/evaluate.py: scores of a model whose answers are known, at any number of ranks, and after a kill."""

import dataclasses
import json
import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.launch import launch, run_ranks, run_tool, train
from helpers.local_task import random_choices, write_answers, write_choices, write_texts
from helpers.small_run import REPOSITORY

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.config.schema import Config
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError

pytestmark = pytest.mark.launch

TOOL = REPOSITORY / "tools" / "evaluate.py"


@pytest.fixture(scope="module")
def run_dir(settings, tmp_path_factory) -> Path:
    """A trained run of two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    result = train(2, *settings, "parallel.tensor=2", f"run.dir={folder}")
    assert result.codes == [0, 0], result.tails
    return folder


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    """`datasets` keeps what it has read in the home folder otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def in_ranks(*arguments: str) -> None:
    import runpy
    import sys

    sys.argv = [str(TOOL), *arguments]
    runpy.run_path(str(TOOL), run_name="__main__")


def evaluate(world: int, *arguments: object, env: dict[str, str] | None = None) -> dict:
    """The JSON that the tool prints on some ranks."""
    result = launch(world, in_ranks, *map(str, arguments), "--json", env=env)
    assert result.codes == [0] * world, result.tails
    return json.loads(result.out.splitlines()[-1])


def score_all(run_dir: str, pairs: list[tuple[list[int], list[int]]], n_loops: int) -> list | None:
    """Log-likelihoods of (context, continuation), in small batches."""
    from mythos_dist.checkpoint.restore import load_model
    from mythos_dist.evaluate.cache import Cache
    from mythos_dist.evaluate.replicas import Replicas
    from mythos_dist.evaluate.requests import continuation_request
    from mythos_dist.evaluate.scorer import evaluate_on_all_ranks

    model, _, _ = load_model(Path(run_dir))
    requests = [continuation_request(context, text, model.config.max_seq_len) for context, text in pairs]
    backend: Any = Replicas(model, None, batch_tokens=100)  # scores need no tokenizer
    scores = evaluate_on_all_ranks(backend, Cache(), lambda scorer: scorer.score(requests, n_loops))
    return scores and [(one.total, all(one.correct)) for one in scores]


def test_log_likelihoods_are_those_of_plain_torch_at_any_number_of_ranks(run_dir, seed):
    """Sequence by sequence through the unsharded model and torch's log_softmax; ranks 1, 2 and 4 to the bit."""
    from mythos_dist.checkpoint.restore import load_model

    model, _, _ = load_model(run_dir)
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 12, (30, 2), generator=draw).tolist()
    pairs = [tuple(torch.randint(512, (size,), generator=draw).tolist() for size in pair) for pair in sizes]
    results = [run_ranks(world, score_all, str(run_dir), pairs, 3)[0] for world in (1, 2, 4)]
    assert results[0] == results[1] == results[2]
    for (context, continuation), (score, greedy) in zip(pairs, results[0], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation]), 3)[0, len(context) - 1 : -1]
        target = torch.tensor(continuation)
        expected = F.log_softmax(logits.double(), -1).gather(1, target[:, None]).sum()
        assert score == pytest.approx(float(expected), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == target).all())


def known_model(config: Config, kind: str):
    """`repeats`: gives the token it has just read logit 10, and all others 0. `uniform`: all tokens the same."""
    from mythos_dist.model import Mythos

    width = 264  # at least as many channels as tokens: each token has a direction of its own
    shape = dataclasses.replace(config.model, vocab_size=260, dim=width, max_seq_len=64)
    model = Mythos(shape, act=config.act, experts=config.experts).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if config.optim.decays(name) or "lora" in name:
                parameter.zero_()  # the blocks add nothing
        model.embed.weight.zero_()
        if kind == "repeats":
            # The last norm gives a direction the length sqrt(width).
            model.embed.weight.fill_diagonal_(10 / math.sqrt(width))
    return model


def evaluate_known(config: Config, kind: str, folder: str) -> dict | None:
    """The results of all tasks in a folder, with a tokenizer of bytes."""
    from mythos_dist.evaluate.cache import Cache
    from mythos_dist.evaluate.replicas import Replicas
    from mythos_dist.evaluate.report import to_json
    from mythos_dist.evaluate.scorer import evaluate_on_all_ranks
    from mythos_dist.evaluate.tasks import evaluate_tasks, load_tasks

    tokenizer = Tokenizer.load(write_byte_tokenizer(Path(folder)))
    tasks = load_tasks([str(file) for file in sorted(Path(folder).glob("*.yaml"))])
    backend = Replicas(known_model(config, kind), tokenizer)
    return evaluate_on_all_ranks(
        backend, Cache(), lambda scorer: to_json({2: evaluate_tasks(tasks, scorer, tokenizer, 2, None)})
    )


def test_a_model_with_known_answers_gets_the_known_scores(config, tmp_path):
    """A model that repeats the last token, on tasks where that is right in three of four documents, and a model
    without a preference. Choices have equal lengths, and all probabilities have a closed form."""
    letters = string.ascii_lowercase[:20]
    documents = []
    for i, letter in enumerate(letters):
        other = letters[(i + 1) % len(letters)]
        documents.append({"question": f"x{letter}", "choices": [other * 2, letter * 2], "answer": int(i % 4 > 0)})
    write_choices(tmp_path, "choices", documents)
    texts = ["aaaaaaaaaa", "abababab"]
    write_texts(tmp_path, "texts", texts)
    answers = [{"question": f"x{letter}", "answer": letter * 3} for letter in letters]
    write_answers(tmp_path, "answers", [*answers[:19], {"question": "x", "answer": "no"}])
    (repeats,) = run_ranks(1, evaluate_known, config, "repeats", str(tmp_path))
    acc = repeats["choices"]["acc"]["2"]
    assert acc["value"] == 0.75 and acc["samples"] == 20
    assert acc["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 19))  # of a mean of 20 flags
    assert repeats["answers"]["exact_match"]["2"]["value"] == 0.95
    other = math.log(math.exp(10) + 259)  # minus the log-probability of any other token
    # The first token follows EOS. Ten letters: nine repeat the one before; eight letters: none does.
    loss = (other + 9 * (other - 10)) + 8 * other
    bits = loss / math.log(2) / sum(map(len, texts))
    assert repeats["texts"]["bits_per_byte"]["2"]["value"] == pytest.approx(bits, rel=1e-4)
    (uniform,) = run_ranks(1, evaluate_known, config, "uniform", str(tmp_path))
    assert uniform["texts"]["bits_per_byte"]["2"]["value"] == pytest.approx(math.log2(260), rel=1e-6)
    # All choices are equally likely, and the first one is taken: chance level.
    assert uniform["choices"]["acc"]["2"]["value"] == sum(one["answer"] == 0 for one in documents) / 20


def test_the_tool_gives_the_same_results_on_one_rank_and_on_two(run_dir, tmp_path):
    """On all kinds of tasks, from a checkpoint of a layout that neither has."""
    task = write_choices(tmp_path, "choices", random_choices(12))
    names = f"{task},perplexity_by_position,perplexity_by_document_length"
    results = []
    for world in (1, 2):
        out = tmp_path / f"{world}" / "result"
        options = ("--tasks", names, "--loops", "1,2", "--samples", 8, "--batch-tokens", 150, "--out", out)
        results.append(evaluate(world, run_dir, *options))
        assert json.loads(out.with_suffix(".json").read_text()) == results[-1]
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert results[0] == results[1]
    rounded = evaluate(2, run_dir, *options[:-1], tmp_path / "bf16" / "result", "--dtype", "bf16")
    for metric, loops in rounded["tasks"]["perplexity_by_position"].items():
        expected = results[0]["tasks"]["perplexity_by_position"][metric]["2"]["value"]
        assert loops["2"]["value"] == pytest.approx(expected, rel=0.03)
    assert results[0]["computed_requests"] == 2 * (12 * 3 + 8)
    assert set(results[0]["tasks"]) == set(names.replace(str(task), "choices").split(","))


def test_a_killed_evaluation_computes_only_what_is_missing(run_dir, tmp_path):
    """SIGKILL as soon as a result is on disk; then the same command again, and once more."""
    task = write_choices(tmp_path, "choices", random_choices(40))
    options = ("--tasks", task, "--loops", 2, "--batch-tokens", 60)
    whole = evaluate(1, run_dir, *options, "--out", tmp_path / "whole" / "result")
    pattern = tmp_path / "killed" / "cache" / "*" / "*.jsonl"
    arguments = [str(one) for one in (run_dir, *options, "--out", tmp_path / "killed" / "result")]
    killed = launch(1, in_ranks, *arguments, env={"KILL_AFTER": str(pattern)})
    assert killed.codes == [-9]
    (file,) = tmp_path.glob("killed/cache/*/*.jsonl")
    kept = file.read_bytes().count(b"\n")
    assert kept < whole["computed_requests"] <= 120  # some choices are equal
    again = evaluate(1, *arguments)
    assert again["computed_requests"] == whole["computed_requests"] - kept
    assert again["tasks"] == whole["tasks"]
    assert evaluate(1, *arguments)["computed_requests"] == 0
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])  # within a line
    kept = file.read_bytes().count(b"\n")
    again = evaluate(1, *arguments)
    assert kept > 0 and again["computed_requests"] == whole["computed_requests"] - kept
    assert again["tasks"] == whole["tasks"]


def test_a_group_names_tasks_in_files_beside_it(run_dir, tmp_path):
    """Its accuracy is the mean over the documents of its tasks, of 6 and of 12. Other YAML files are ignored."""
    for name, count in {"short": 6, "long": 12}.items():
        write_choices(tmp_path, name, random_choices(count))
    group = "group: both\ntask: [short, long]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "both.yaml").write_text(group)
    (tmp_path / "config.yaml").write_text("train: {steps: 3}\n")
    (tmp_path / "other.yaml").write_text("[not: a, task")
    tasks = evaluate(1, run_dir, "--tasks", tmp_path / "both.yaml", "--out", tmp_path / "out" / "result")["tasks"]
    short, long, both = (tasks[name]["acc"]["2"]["value"] for name in ("short", "long", "both"))
    assert both == pytest.approx((6 * short + 12 * long) / 18)


def test_without_lm_eval_the_message_says_how_to_install_it(run_dir, monkeypatch):
    from mythos_dist.evaluate import task_set

    monkeypatch.setattr(task_set, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mythos_dist\[eval\]'"):
        task_set.load_task_set(["hellaswag"], Config(), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "missing.yaml"], "missing.yaml cannot be read as a task"),
        (["--tasks", "no_such_task"], "'no_such_task' is not a registered task"),
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "perplexity_by_position", "--loops", "0"], "--loops=0 holds ['0']"),
        (["--tasks", "perplexity_by_position", "--data", "nowhere"], "nowhere"),
        (["--tasks", "sampled.yaml"], "only greedy generation is supported"),
        (["--tasks", "without_data.yaml"], "without_data.yaml cannot be loaded"),
    ],
)
def test_wrong_options_are_reported(options, message, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_answers(tmp_path, "sampled", [{"question": "a", "answer": "b"}], ", temperature: 0.7")
    write_choices(tmp_path, "without_data", []).with_suffix(".jsonl").unlink()
    result = run_tool(TOOL, run_dir, *options, "--out", "out/result")
    assert result.codes == [2], result.tails
    assert message in result.err and "Traceback" not in result.err
