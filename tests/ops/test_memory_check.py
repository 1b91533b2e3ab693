"""A layout that does not fit is refused before anything is written; at step 10 plan and measurement are compared."""

import json
import os
import re
import resource
import statistics
from pathlib import Path

import pytest
import yaml
from helpers.launch import launch, train

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.ops import memory_check
from mythos_dist.ops.cluster.memory import node_memory
from mythos_dist.ops.memory_check import Comparison, check_memory
from mythos_dist.ops.plan.clusters import load_cluster
from mythos_dist.ops.plan.estimate import Estimate

LAPTOP = Path("configs/clusters/laptop.yaml")


@pytest.fixture
def too_small(tmp_path) -> Path:
    """A cluster with one usable megabyte per rank."""
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(LAPTOP.read_text()) | {"memory_gb": 0.002, "reserved_gb": 0.001}))
    return file


def planned_lines(run_dir: Path) -> list[dict]:
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "planned" in line]


def config_of(*overrides: str) -> Config:
    return load_config("configs/tiny_cpu.yaml", ["data.path=none", *overrides])


@pytest.mark.launch
def test_a_layout_that_does_not_fit_is_refused_unless_the_check_is_off(settings, too_small, tmp_path):
    """Exit code 2 on every rank, one line, no run folder. With the check off the same run trains, and it resumes with
    other values of both settings."""
    run_dir = tmp_path / "run"
    arguments = [*settings, "train.steps=2", f"run.dir={run_dir}", f"run.cluster={too_small}"]
    refused = train(2, *arguments)
    assert refused.codes == [2, 2] and not run_dir.exists() and not refused.out, refused.tails
    (line,) = refused.err.splitlines()
    needed = re.search(r"a rank needs (\S+) GB by plan \(most of it (\w+), (\S+) GB\)", line)
    estimate = Estimate(load_config(arguments[0], arguments[1:]), 2, load_cluster(too_small))
    memory = estimate.largest_stage.memory
    assert needed and float(needed[1]) == pytest.approx(sum(memory.values()) / 1e9, rel=0.05)
    assert memory[needed[2]] == max(memory.values()) == pytest.approx(float(needed[3]) * 1e9, rel=0.05)
    for words in (f"run.cluster={too_small} has 0.001 GB of 0.002 GB", "train.recompute=loop", "parallel.expert"):
        assert words in line
    assert f"mythos plan CONFIG --gpus 2 --cluster {too_small}" in line and "run.check_memory=false" in line

    started = train(2, *arguments, "run.check_memory=false")
    assert started.codes == [0, 0], started.tails
    assert [line["step"] for line in planned_lines(run_dir)] == [2]
    resumed = train(2, *arguments, "run.cluster=null", "train.steps=3")
    assert resumed.codes == [0, 0], resumed.tails
    assert [line["planned"]["step_seconds"] is None for line in planned_lines(run_dir)] == [False, True]


def train_with_ballast(arguments: list[str], megabytes: int) -> int:
    """Train while rank 1 holds `megabytes` more; returns the peak memory of the process by getrusage."""
    from helpers.launch import train_here

    ballast = b"1" * (megabytes << 20) if os.environ["RANK"] == "1" else b""
    train_here(arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # nothing inherited: this process only forked
    del ballast
    return peak


@pytest.mark.launch
def test_step_10_logs_planned_and_measured_memory_and_time(settings, tmp_path):
    """In metrics.jsonl, on the console and in rank 0's log only: the rank with most memory, the median step."""
    run_dir = tmp_path / "run"
    arguments = [*settings, "train.steps=11", f"run.dir={run_dir}", f"run.cluster={LAPTOP}"]
    result = launch(2, train_with_ballast, arguments, 200)
    assert result.codes == [0, 0], result.tails
    (line,) = planned_lines(run_dir)
    planned = line["planned"]
    assert line["step"] == 10
    estimate = Estimate(load_config(arguments[0], arguments[1:]), 2, load_cluster(LAPTOP))
    assert planned["memory_gb"] == pytest.approx(estimate.largest_stage.bytes / 1e9)
    assert planned["step_seconds"] == estimate.step_seconds > 0
    # One step and a checkpoint come after it. Both counts are exact to some pages per core.
    assert planned["measured_memory_gb"] * 1e9 == pytest.approx(max(result.values), rel=0.05)
    assert result.values[1] > result.values[0] + (150 << 20)
    steps = [json.loads(text)["step_seconds"] for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert planned["measured_step_seconds"] == statistics.median(steps[3:10])

    (line,) = re.findall(r"peak memory .*", result.out)
    expected = r"peak memory \S+ GB \(planned \S+ GB; rank 1; CPU, whole process\), step \S+ s \(planned \S+ s\)"
    assert re.fullmatch(expected, line)
    assert line in (run_dir / "logs" / "rank-00000.log").read_text()
    assert "peak memory" not in (run_dir / "logs" / "rank-00001.log").read_text()


def test_a_start_compares_once_at_its_tenth_or_last_step(monkeypatch):
    """The first three steps are not timed; a start with fewer steps uses its last one."""
    monkeypatch.setattr(memory_check, "largest_rank", lambda: (3, 2e9))
    estimate = Estimate(config_of(), 1, load_cluster(LAPTOP))

    def compared(steps: int) -> dict[int, float]:
        comparison = Comparison(estimate)
        comparisons = {step: comparison.step(float(step), is_last=step == steps) for step in range(1, steps + 1)}
        return {step: each.measured_step_seconds for step, each in comparisons.items() if each}

    assert compared(25) == compared(10) == {10: 7.0}
    assert compared(9) == {9: 6.5} and compared(2) == {2: 2.0}
    only = Comparison(estimate).step(1.0, is_last=True)
    assert only and only.step_seconds is None, "without run.cluster no step is planned"
    assert str(only).endswith(", step 1.0 s (set run.cluster to plan step time)")


def test_without_a_cluster_the_node_sets_the_memory_limit(monkeypatch):
    """Available memory is divided by the ranks on the node; recompute=loop is not recommended if it is set."""
    config = config_of("train.recompute=loop", "train.micro_batch=2")
    needed = Estimate(config, 2, load_cluster(LAPTOP)).largest_stage.bytes
    monkeypatch.setattr(memory_check, "node_memory", lambda: (10**12, 2.02 * needed))
    check_memory(config, 2, ranks_here=2)  # raises nothing
    with pytest.raises(UserError, match="each of 3 ranks on this node can use") as refused:
        check_memory(config, 2, ranks_here=3)
    assert "recompute" not in str(refused.value) and "lower train.micro_batch=2" in str(refused.value)
    assert check_memory(config_of("run.check_memory=false"), 2, ranks_here=10**9)


def test_a_missing_cluster_file_is_named():
    with pytest.raises(UserError, match=r"there is no cluster file configs/none\.yaml"):
        check_memory(config_of("run.cluster=configs/none.yaml"), 1, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_every_parent_cgroup_counts(version, tmp_path):
    """The job's limit is the smaller one here; memory of its processes is not available, file caches are."""
    top = tmp_path / "memory" if version == 1 else tmp_path
    limit, held = ("memory.limit_in_bytes", "total_rss") if version == 1 else ("memory.max", "anon")
    step = top / "job" / "step"
    step.mkdir(parents=True)
    (top / "job" / limit).write_text(f"{512 << 20}\n")
    (top / "job" / "memory.stat").write_text(f"{held} {112 << 20}\nfile {300 << 20}\n")
    (step / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    ours = tmp_path / "ours"
    ours.write_text("9:cpu:/else\n4:memory:/job/step\n0::/\n" if version == 1 else "0::/job/step\n")
    assert node_memory(tmp_path, ours) == (512 << 20, 400 << 20)
    ours.write_text("0::/not/here\n")
    assert node_memory(tmp_path, ours)[0] > 512 << 20
