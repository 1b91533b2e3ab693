"""`make retrofit-demo`: both rows have the same stories and FLOPs, and the summary has the least gain of all seeds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import retrofit
from experiments.depth_task import EOS
from experiments.pretrain import PHASES, batches
from experiments.retrofit import LOOPED, ORIGINAL, ROWS, table, worst_differences
from experiments.story_task import SOMEONE, build_stories, build_windows
from experiments.trials import run_at_best_rates
from mythos_dist.model import Mythos

REPOSITORY = Path(__file__).parents[2]


def test_the_original_is_pretrained_on_the_answers_of_stories():
    """A target at the last name of each sentence of the story, and at the "someone" of each question."""
    tokens, targets = next(batches(seed=3))
    first = PHASES[0]
    assert tokens.shape == targets.shape == (first.batch, 1 + 4 * first.people + 4 * first.questions)
    assert (targets != -100).sum(1).unique().tolist() == [first.people + first.questions]
    assert (targets[tokens == SOMEONE] != -100).all()


def test_one_row_of_targets_has_all_answers():
    """The original has one loop, and learns what the looped model learns with its last loop."""
    stories = build_stories(np.random.default_rng(0), 3, 6, questions=2, hops=3)
    length = stories.tokens.shape[1]
    final, by_loop = build_windows(stories, 1), build_windows(stories, 3)
    assert final.shape[1] == 2 * length + 1 and by_loop.shape[1] == 4 * length + 1
    assert np.array_equal(final[:, -length:], stories.answers)
    assert np.array_equal(final[:, -length:], by_loop[:, -length:])
    within_reach = by_loop[:, length + 1 : 2 * length + 1]
    assert np.array_equal(within_reach, np.where(stories.hops <= 1, stories.answers, EOS))


def test_other_seeds_run_at_the_rate_with_the_highest_score_only():
    """Scores of row r at rate s: |s - best[r]|, negative."""
    wanted, runs = {"a": 2.0, "b": 3.0}, []

    def run(cases):
        runs.append(list(cases))
        return {(row, rate, seed): -abs(rate - wanted[row]) for row, rate, seed in cases}

    best, done = run_at_best_rates(["a", "b"], [1.0, 2.0, 3.0], [5, 6], run, lambda row, value: value)
    assert best == wanted and len(runs[0]) == 6
    assert runs[1] == [("a", 2.0, 6), ("b", 3.0, 6)] and set(done) == {*runs[0], *runs[1]}


def seeds_of(row: str, trained: dict[str, float], beyond: dict[str, float]) -> dict:
    """By seed: accuracies at the numbers of loops that the table shows, and 0 at all others."""
    nothing = {"accuracy_at_trained_hops": 0.0, "accuracy_beyond_trained_hops": 0.0}
    result = {}
    for seed in trained:
        by_loops = {str(n): dict(nothing) for n in ROWS[row].evaluated}
        by_loops[str(ROWS[row].loops)]["accuracy_at_trained_hops"] = trained[seed]
        by_loops[str(ROWS[row].shown)]["accuracy_beyond_trained_hops"] = beyond[seed]
        result[seed] = by_loops
    return result


def test_the_summary_has_the_gain_of_the_seed_that_gains_least():
    looped = seeds_of(LOOPED, {"0": 0.9, "1": 0.8}, {"0": 0.7, "1": 0.6})
    original = seeds_of(ORIGINAL, {"0": 0.5, "1": 0.6}, {"0": 0.1, "1": 0.2})
    rows = {
        LOOPED: {"steps": 10, "rate": 0.002, "seeds": looped},
        ORIGINAL: {"steps": 20, "rate": 1, "seeds": original},
    }
    gains = worst_differences(rows)
    assert gains["least_gain_of_accuracy_at_trained_hops"] == pytest.approx(0.2)
    assert gains["least_gain_of_accuracy_beyond_trained_hops"] == pytest.approx(0.4)
    lines = table({"rows": rows})
    assert "| 85.0 ± 7.1 % | 65.0 ± 7.1 % |" in lines[2] and "| 55.0 ± 7.1 % |" in lines[3]


@pytest.mark.launch  # transformers is 4 seconds of imports
def test_each_seed_continues_from_its_own_pretrained_model(tmp_path, monkeypatch):
    """Both rows from the same one. Without loops a step has fewer FLOPs, so there are more steps."""
    from experiments.pretrain import build_model

    monkeypatch.setattr(retrofit, "ensure_story_task", lambda folder, **sizes: folder)
    originals = {seed: build_model(seed) for seed in range(2)}
    for seed, model in originals.items():
        model.save_pretrained(tmp_path / "pretrained" / f"seed-{seed}")
    study = retrofit._Study(tmp_path, range(2), 1, [])
    for seed, model in originals.items():
        for row in ROWS:
            start = Mythos.from_pretrained(study.trial(row, 1e-3, seed).load().run.start_from)
            assert torch.equal(start.embed.weight, model.get_input_embeddings().weight), (row, seed)
    assert study.steps[LOOPED] < study.steps[ORIGINAL]


@pytest.mark.launch
@pytest.mark.long  # minutes; the parts are tested above, and `mythos retrofit` in tests/checkpoint
def test_the_study_writes_its_summary_and_repeats_no_run(tmp_path):
    """A model of random weights instead of a pretrained one, and few steps."""
    from experiments.pretrain import build_model

    build_model(0).save_pretrained(tmp_path / "out" / "pretrained" / "seed-0")
    command = [sys.executable, "tools/retrofit_demo.py", "--out", str(tmp_path / "out"), "--seeds", "1", "--jobs", "1"]
    few = ["--rates", "1e-3", "train.steps=3", "optim.decay_steps=1", "optim.warmup_steps=1"]
    summaries, metrics = [], []
    for _ in range(2):
        done = subprocess.run([*command, *few], capture_output=True, text=True, timeout=1120, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr[-2000:]
        summaries.append(json.loads((tmp_path / "out" / "summary.json").read_text()))
        metrics.append((tmp_path / "out" / ORIGINAL / "0.001" / "seed-0" / "metrics.jsonl").read_bytes())
    assert summaries[0] == summaries[1] and metrics[0] == metrics[1]
    rows = summaries[0]["rows"]
    assert rows[LOOPED]["steps"] == 3 < rows[ORIGINAL]["steps"]  # a looped step has more FLOPs
    assert (tmp_path / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "summary.md").read_text().startswith("| | steps | rate |")
