"""What a run records of its loops: telemetry in metrics.jsonl, held-out loss by number of loops in eval.jsonl."""

import json

import pytest
from helpers.launch import train

pytestmark = pytest.mark.launch

TELEMETRY = ["loops.telemetry_every=2", "loops.sweep=[1,2,3]", "train.eval_every=2", "train.steps=4", "run.report=true"]


def records(run_dir, file):
    return [json.loads(line) for line in (run_dir / file).read_text().splitlines()]


@pytest.fixture(scope="module")
def single(settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("single") / "run"
    result = train(1, *settings, *TELEMETRY, f"run.dir={run_dir}")
    assert result.codes == [0], result.tails
    return run_dir, result.out


def test_a_run_records_telemetry_and_the_sweep(single):
    run_dir, out = single
    steps = records(run_dir, "metrics.jsonl")
    assert [line["step"] for line in steps if "depth" in line] == [2, 4]
    depth = steps[1]["depth"]
    by_loop = {"state_norm", "residual_ratio", "token_correlation", "act_mass", "expert_load_max"}
    assert {key for key, value in depth.items() if isinstance(value, list)} - {"failures"} == by_loop
    assert all(len(depth[key]) == depth["n_loops"] == 2 for key in by_loop)
    evaluations = records(run_dir, "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert set(evaluations[-1]["by_loops"]) == {"1", "2", "3"}
    assert (run_dir / "loops.png").read_bytes().startswith(b"\x89PNG")
    assert "by loops" in out
    (load,) = records(run_dir, "expert_load.json")
    assert load["step"] == 4
    tokens = 8 * 32 * 2  # of the global batch, times the experts of a token
    assert [sum(counts) for counts in load["counts"]] == [tokens] * 2
    assert f"report: {run_dir / 'report.html'}" in out and (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    "layout", ["parallel.pipe=2", "parallel.context=2", pytest.param("parallel.tensor=2", marks=pytest.mark.long)]
)
def test_two_ranks_record_the_values_of_one(layout, settings, single, tmp_path):
    """In fp32, up to the order of summation."""
    result = train(2, *settings, *TELEMETRY, "run.report=false", layout, f"run.dir={tmp_path / 'run'}")
    assert result.codes == [0, 0], result.tails
    for ours, theirs in zip(
        records(tmp_path / "run", "metrics.jsonl"), records(single[0], "metrics.jsonl"), strict=True
    ):
        assert ("depth" in ours) == ("depth" in theirs)
        for key, value in theirs.get("depth", {}).items():
            if key == "failures":
                assert ours["depth"][key] == value
            elif key != "seconds":
                assert ours["depth"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    for ours, theirs in zip(records(tmp_path / "run", "eval.jsonl"), records(single[0], "eval.jsonl"), strict=True):
        for n, value in theirs["by_loops"].items():
            assert ours["by_loops"][n] == pytest.approx(value, rel=1e-5)
