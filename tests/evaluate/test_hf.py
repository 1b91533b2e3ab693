"""Scores through our interface to lm-evaluation-harness are those of its `hf` model on the export."""

import random
from pathlib import Path
from typing import Any

import pytest
from helpers.launch import run_ranks, run_tool, train
from helpers.local_task import random_choices
from helpers.small_run import REPOSITORY

pytestmark = pytest.mark.launch


def instances(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i, metadata=("task", i, 1)) for i, one in enumerate(arguments)]


def ask(model: Any, requests: dict[str, list[tuple]]) -> dict[str, list]:
    """The answers of a model of lm_eval to each kind of request."""
    return {kind: getattr(model, kind)(instances(kind, arguments)) for kind, arguments in requests.items()}


def ask_ours(run_dir: str, requests: dict[str, list[tuple]]) -> dict[str, list] | None:
    from mythos_dist.checkpoint.restore import load_model
    from mythos_dist.data.tokenizer_files import evaluation_tokenizer
    from mythos_dist.evaluate.cache import Cache
    from mythos_dist.evaluate.harness import HarnessModel
    from mythos_dist.evaluate.replicas import Replicas
    from mythos_dist.evaluate.scorer import evaluate_on_all_ranks

    model, config, _ = load_model(Path(run_dir))
    tokenizer = evaluation_tokenizer(config, Path(run_dir))
    backend = Replicas(model, tokenizer, batch_tokens=300)
    n_loops = config.loops.mean_of(config.model)
    return evaluate_on_all_ranks(
        backend, Cache(), lambda scorer: ask(HarnessModel(scorer, tokenizer, n_loops), requests)
    )


def ask_theirs(export: str, requests: dict[str, list[tuple]]) -> dict[str, list]:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    eos = AutoTokenizer.from_pretrained(export).eos_token_id
    options = {"device": "cpu", "dtype": "float32", "batch_size": 5, "max_length": 64, "prefix_token_id": eos}
    return ask(HFLM(export, trust_remote_code=True, **options), requests)


@pytest.mark.parametrize("worlds", [(2,), pytest.param((1, 4), marks=pytest.mark.long)], ids=str)
def test_each_request_has_the_same_result_as_through_transformers(settings, tmp_path, monkeypatch, worlds):
    """Log-likelihoods of continuations and of texts longer than the context to 1e-4, and greedy answers; ours on 1, 2
    and 4 ranks."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run_dir, export = tmp_path / "run", tmp_path / "export"
    assert train(1, *settings, "model.max_seq_len=64", "optim.lr=0.01", f"run.dir={run_dir}").codes == [0]
    exported = run_tool(REPOSITORY / "tools" / "export_checkpoint.py", run_dir, "--out", export, "--format", "hf")
    assert exported.codes == [0], exported.tails
    documents, draw = random_choices(8), random.Random(0)
    pairs = [(one["question"], choice) for one in documents for choice in one["choices"]]
    pairs += [("", "alone"), ("trailing space ", "moves"), ("x " * 100, "a long context")]
    texts = [(" ".join(draw.choices(["help", "on", "module", "of", "x1", "naïve"], k=k)),) for k in (1, 5, 40, 200)]
    until = {"until": ["\n", "e"], "max_gen_toks": 6, "do_sample": False}
    prompts = [(one["question"], dict(until)) for one in documents]
    requests = {"loglikelihood": pairs, "loglikelihood_rolling": texts, "generate_until": prompts}
    (theirs,) = run_ranks(1, ask_theirs, str(export), requests)
    for world in worlds:
        ours = run_ranks(world, ask_ours, str(run_dir), requests)[0]
        assert ours["generate_until"] == theirs["generate_until"]
        assert ours["loglikelihood_rolling"] == pytest.approx(theirs["loglikelihood_rolling"], abs=1e-4, rel=1e-6)
        for pair, (score, greedy), (expected, expected_greedy) in zip(
            pairs, ours["loglikelihood"], theirs["loglikelihood"], strict=True
        ):
            assert score == pytest.approx(expected, abs=1e-4), pair
            assert greedy == expected_greedy
