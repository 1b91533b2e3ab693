"""`make hop-demo`: its summary has the worst seed, its positions are those of the answers, and it repeats no run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.hops import LONG_HOPS, LOOPS, PEOPLE, TRAINED_HOPS, answer_positions, summarize, table
from experiments.story_task import build_stories

REPOSITORY = Path(__file__).parents[2]


def test_accuracies_are_read_where_the_answers_are():
    stories = build_stories(np.random.default_rng(0), 1, PEOPLE, questions=1, hops=LONG_HOPS)
    assert [stories.hops[position] for position in answer_positions()] == list(range(1, LONG_HOPS + 1))


def test_the_summary_reports_the_worst_seed_beyond_the_trained_hops():
    """Accuracy of seed s: 1 up to `loops` hops, else s / 10. At 4 loops seeds have s / 10 beyond, at 8 loops 1."""

    def by_loops(seed: int) -> dict:
        result = {}
        for n in LOOPS:
            hops = {str(i): 1.0 if i <= n else seed / 10 for i in range(1, LONG_HOPS + 1)}
            beyond = [hops[str(i)] for i in range(TRAINED_HOPS + 1, LONG_HOPS + 1)]
            trained = [hops[str(i)] for i in range(1, TRAINED_HOPS + 1)]
            result[str(n)] = {
                "accuracy_at_trained_hops": np.mean(trained),
                "accuracy_beyond_trained_hops": np.mean(beyond),
                "hops": hops,
            }
        return result

    summary = summarize({str(seed): by_loops(seed) for seed in (1, 2, 3)})
    assert summary["accuracy_beyond_trained_hops_at_twice_the_loops"] == 1.0
    assert summary["accuracy_beyond_trained_hops_at_the_trained_loops"] == pytest.approx(0.3)  # the best seed
    assert summary["mean"]["4"]["accuracy_beyond_trained_hops"] == pytest.approx(0.2)
    worse = {"0": by_loops(1), "1": {**by_loops(1), "8": by_loops(1)["4"]}}
    assert summarize(worse)["accuracy_beyond_trained_hops_at_twice_the_loops"] == pytest.approx(0.1)
    lines = table(summary)
    assert lines[2].startswith("| seed 1 |") and "| 10.0% |" in lines[2] and "| 100.0% |" in lines[2]


@pytest.mark.launch
@pytest.mark.long  # the study of other tasks is run by the quick tests of the trainer
def test_the_hop_demo_writes_its_summary_and_repeats_no_run(tmp_path):
    stages = yaml.safe_load((REPOSITORY / "configs" / "story_task.yaml").read_text())["stages"]
    for stage in stages:
        stage["steps"] = 4
    optim = {"decay_steps": 1, "warmup_steps": 2}
    config = {"base": str(REPOSITORY / "configs" / "story_task.yaml"), "optim": optim, "stages": stages}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config))
    arguments = f"Path({str(tmp_path / 'few.yaml')!r}), Path({str(tmp_path)!r}), range(1), 1, ['model.dim=32']"
    study = f"from pathlib import Path; from experiments.hops import run_hop_study; run_hop_study({arguments})"
    command = [sys.executable, "-c", study]
    summaries, metrics = [], []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1120, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr[-2000:]
        summaries.append(json.loads((tmp_path / "summary.json").read_text()))
        metrics.append((tmp_path / "seed-0" / "metrics.jsonl").read_bytes())
    assert summaries[0] == summaries[1] and metrics[0] == metrics[1]
    (seed,) = summaries[0]["seeds"].values()
    assert list(seed) == [str(n) for n in LOOPS]
    for one in seed.values():
        assert all(share * 1000 == pytest.approx(round(share * 1000)) for share in one["hops"].values())
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "summary.md").read_text().startswith("| accuracy, 5 to 8 hops |")
