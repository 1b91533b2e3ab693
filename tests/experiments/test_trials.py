"""Studies of several trainings: equal FLOPs, early checks, and the two study tools with a few steps."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.baseline import DENSE, LOOPED, TaskComparison, TextComparison
from experiments.trials import Trial, run_all, steps_for, training_flops
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config, LoopsConfig, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model.parameter_table import count_parameters

REPOSITORY = Path(__file__).parents[2]
TASK = REPOSITORY / "configs" / "depth_task.yaml"
SMALL = "model.dim=32 model.kv_lora_rank=16 model.q_lora_rank=16 train.steps=4 optim.warmup_steps=2".split()


def small(**loops) -> Config:
    base = Config()
    model = MythosConfig(
        dim=32, n_heads=2, n_kv_heads=2, vocab_size=64, max_seq_len=16, attn_type="gqa", n_experts=1,
        n_experts_per_tok=1, expert_dim=32, max_loop_iters=6,
    )  # fmt: skip
    train = replace(base.train, seq_len=16, global_batch=4, micro_batch=2, recompute="none")
    return replace(base, model=model, train=train, loops=LoopsConfig(**loops))


def test_equal_flops_are_fewer_steps_of_more_loops():
    """The FLOPs of a step are linear in its loops, and `steps_for` inverts the sum over steps."""
    costs = [next(training_flops(small(distribution="fixed", mean=n))) for n in (1, 3, 5)]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0])
    fixed = small(distribution="fixed", mean=6)
    budget = sum(itertools.islice(training_flops(fixed), 30))
    assert steps_for(fixed, budget) == 30
    assert 31 <= steps_for(small(distribution="fixed", mean=2), budget) <= 90
    muon = replace(fixed, optim=replace(fixed.optim, name="muon"))
    assert steps_for(muon, budget) < 30  # its own products count
    drawn = small(distribution="uniform_set", set=(1, 3, 6))
    steps = steps_for(drawn, budget)
    spent = list(itertools.islice(training_flops(drawn), steps))
    assert sum(spent[:-1]) < budget <= sum(spent)


def test_an_error_in_the_last_trial_is_reported_before_the_first_one_runs(tmp_path):
    trials = {
        name: Trial(TASK, tmp_path / name, ("data.path=x", f"loops.mean={mean}")) for name, mean in (("a", 8), ("b", 0))
    }
    with pytest.raises(UserError, match=r"loops\.mean"):
        run_all(trials, lambda case, trial: (None, ""))
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_trained_and_measured_once_unless_its_settings_change(tmp_path, monkeypatch):
    """Also by another process: the result is that of its file."""
    trained, measured = [], []
    monkeypatch.setattr(Trial, "run", lambda self, exit_codes: trained.append(self.overrides[-1]))

    def measure(case: str, trial: Trial) -> tuple[dict, str]:
        measured.append(trial.overrides[-1])
        return {"loss": 2.5, "by_loops": {4: [len(measured)]}}, case

    def result(lr: float) -> dict:
        trial = Trial(TASK, tmp_path / "seed-0", ("data.path=x", f"optim.lr={lr}"))
        return run_all({"case": trial}, measure, jobs=1)["case"]["by_loops"]["4"]

    assert [result(lr) for lr in (1e-3, 1e-3, 2e-3)] == [[1], [1], [2]]
    assert trained == measured == ["optim.lr=0.001", "optim.lr=0.002"]


def test_the_settings_of_a_trial_are_those_of_all_its_stages(tmp_path):
    stories = (REPOSITORY / "configs" / "story_task.yaml").read_text()
    settings = []
    for rate in ("2.0e-3", "1.0e-3"):  # of the second stage
        (tmp_path / "stages.yaml").write_text(stories.replace("lr: 2.0e-3", f"lr: {rate}"))
        settings.append(Trial(tmp_path / "stages.yaml", tmp_path / "run", ("data.path=x",)).settings())
    assert settings[0] != settings[1]


def tool(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, REPOSITORY / "tools" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1120, cwd=REPOSITORY)


@pytest.mark.launch
@pytest.mark.long  # the comparison of switches below runs the same studies
def test_the_depth_demo_writes_its_summary_and_repeats_no_run(tmp_path):
    """Accuracies are fractions of 1,000 windows of 16 hops. The second call trains nothing."""
    options = ("--out", tmp_path, "--settings", "per-loop targets,reference", "--seeds", 1, *SMALL)
    first = tool("depth_demo.py", *options)
    assert first.returncode == 0, first.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["settings"]) == ["per-loop targets", "reference"]
    for setting in summary["settings"].values():
        (seed,) = setting["seeds"].values()
        assert list(seed) == ["2", "4", "8", "12", "16", "24", "32"]
        for one in seed.values():
            hops = list(one["hops"].values())
            assert len(hops) == 16
            assert all(0 <= share <= 1 and share * 1000 == pytest.approx(round(share * 1000)) for share in hops)
            assert one["mean"] == pytest.approx(sum(hops[8:]) / 8)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    metrics = {file: file.read_bytes() for file in tmp_path.glob("*/seed-0/metrics.jsonl")}
    assert len(metrics) == 2
    second = tool("depth_demo.py", *options)
    assert second.returncode == 0, second.stderr[-2000:]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {file: file.read_bytes() for file in metrics} == metrics


@pytest.mark.parametrize("kind", [TextComparison, TaskComparison])
def test_rows_of_the_baseline_are_equal_in_what_they_say(kind):
    """Of the looped model's: depth, parameters but for its injection and depth LoRA, and FLOPs."""

    def size(row: str) -> tuple[int, int, float]:
        settings = f"{DENSE} {kind.base} {kind.rows[row].overrides} data.path=x".split()
        config = load_config(REPOSITORY / "configs" / kind.config, settings)
        layers = config.model.prelude_layers + config.loops.mean_of(config.model) + config.model.coda_layers
        steps = config.train.steps
        flops = sum(itertools.islice(training_flops(config), steps))
        if kind.rows[row].equal_flops:
            flops = sum(itertools.islice(training_flops(config), steps_for(config, size(LOOPED)[2])))
        return layers, count_parameters(config.model), flops

    looped, deep, shallow, longer = map(size, kind.rows)
    assert deep[0] == looped[0] and deep[1] > looped[1]
    assert shallow[1] == longer[1] == pytest.approx(looped[1], rel=0.05 if kind is TextComparison else 0.15)
    assert longer[2] == pytest.approx(looped[2], rel=0.01) and shallow[2] < 0.8 * looped[2]


@pytest.mark.launch
@pytest.mark.long
def test_baseline_and_stability_write_their_tables_and_repeat_no_cell(shards, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(shards)
    few = "train.steps=2 optim.warmup_steps=1 loops.curriculum_steps=1".split()

    def study(name: str, *options: str) -> str:
        command = [sys.executable, str(REPOSITORY / "tools" / name), "--jobs", "2", "--seeds", "1", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    sizes = ["model.vocab_size=512", "train.seq_len=32"]
    shown = study("loop_baseline.py", "--rates", "1e-3", "--data", "text", *few, *sizes)
    rows = json.loads((tmp_path / "runs" / "loop-baseline" / "summary.json").read_text())["text"]["rows"]
    assert list(rows) == list(TextComparison.rows) and rows[LOOPED]["steps"] == 2
    assert all(4 < row["seeds"][0]["loss"] < 8 for row in rows.values())
    assert f"| {rows[LOOPED]['seeds'][0]['loss']:.3f} |" in shown
    assert (tmp_path / "runs" / "loop-baseline" / "summary.png").read_bytes().startswith(b"\x89PNG")

    cells = ["--only", "default;normed states", "--loops", "2", "--rates", "1e-3,1e30"]
    study("loop_stability.py", *cells, *few, *sizes)
    found = json.loads((tmp_path / "runs" / "loop-stability" / "stability.json").read_text())["switches"]
    for row in found.values():
        assert row["2"]["best_rate"] == 1e-3 and row["2"]["rates"]["1e+30"]["diverged"] == 1
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "loop-stability").glob("runs/*.log")}
    study("loop_stability.py", *cells, *few, *sizes)
    assert {file: file.stat().st_mtime_ns for file in before} == before and len(before) == 4


@pytest.mark.launch
@pytest.mark.long
def test_the_study_of_optimizers_writes_its_tables(shards, tmp_path):
    """The best rate of each optimizer is that of all its runs."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(shards)
    sizes = "model.vocab_size=512 train.seq_len=32 average.every=1 average.last=2 train.eval_samples=8".split()
    options = ["--out", "out", "--seeds", "1", "--rates", "1e-3,4e-3", *SMALL, *sizes]
    command = [sys.executable, str(REPOSITORY / "tools" / "optimizer_study.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "out" / "optimizers.json").read_text())
    assert summary["steps"]["adamw"] == 4 and 3 <= summary["steps"]["muon"] <= 4
    for name, losses in summary["rates"].items():
        best = f"{summary['best_rates'][name]:g}"
        assert losses[best] == min(losses.values())
        assert summary["losses"][f"{name}, cosine"][0]["weights"] == losses[best]
    assert len(summary["losses"]) == 6 and (tmp_path / "out" / "optimizers.md").read_text() in done.stdout
    wrong = tool("optimizer_study.py", "--rates", "0,1")
    assert wrong.returncode == 2 and "--rates=0.0,1.0: give numbers above 0" in wrong.stderr


@pytest.mark.launch
def test_the_comparison_of_switches_writes_its_tables(tmp_path):
    """Two switches on the task, and unknown names of data and switches."""
    done = tool(
        "loop_ablation.py", "--out", tmp_path, "--data", "task", "--only", "base,act safe", "--seeds", 1, *SMALL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    switches = json.loads((tmp_path / "ablation.json").read_text())["task"]["switches"]
    assert list(switches) == ["base", "act safe"]
    assert switches["base"]["steps"] == 4
    assert switches["act safe"]["steps"] <= 4  # halting costs something
    table = (tmp_path / "ablation.md").read_text()
    assert table in done.stdout
    for one in switches.values():
        assert f"{one['seeds'][0]['16']:.3f}" in table
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    for option, value in (("--data", "words"), ("--only", "more loops")):
        wrong = tool("loop_ablation.py", "--out", tmp_path, option, value)
        assert wrong.returncode == 2 and f"{option} names ['{value}']" in wrong.stderr
        assert "Traceback" not in wrong.stderr
