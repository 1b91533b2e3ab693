"""The writer of metrics, without a run."""

import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers.waiting import wait_until

from mythos_dist.checkpoint.manifest import Lineage
from mythos_dist.ops.plan.clusters import load_cluster
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.train.evaluation import Evaluation, HeldOut
from mythos_dist.train.metrics import Metrics, StepResult, batch_id, peak_flops, step_line


def replace_wandb(config, mode):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, wandb=mode))


def test_batch_id_depends_on_the_samples_and_not_on_their_order():
    """Different for any other samples, including a repeated one."""
    assert batch_id([3, 1, 2]) == batch_id([1, 2, 3])
    others = [[1, 2], [1, 2, 4], [1, 2, 3, 3], [12, 3]]
    assert len({batch_id(ids) for ids in [[1, 2, 3], *others]}) == 5


def test_mfu_of_a_run_is_that_of_its_plan(config):
    """For equal seconds per step and peaks, where the first of two loops has no gradient: the planner's own formula."""
    config = dataclasses.replace(config, loops=dataclasses.replace(config.loops, backprop=1))
    estimate = Estimate(config, world_size=2, cluster=load_cluster("h100_80gb"))
    n_loops, no_grad = estimate.loops
    assert no_grad == 1 and n_loops == 2
    counts = torch.ones(n_loops, config.model.n_experts, dtype=torch.int64)
    result = StepResult(3.0, 3.0, 1.0, 1e-3, "stable", n_loops, n_loops - no_grad, 2.0, counts, False, None)
    peak = 2 * estimate.cluster.peak_flops(config.train.dtype)
    line = step_line(config, Lineage(), 1, result, [0], estimate.step_seconds, peak)
    assert line["mfu"] == pytest.approx(estimate.mfu)
    all_with_grad = step_line(config, Lineage(), 1, dataclasses.replace(result, backprop=2), [0], 1.0, peak)
    assert 1 < all_with_grad["mfu"] / (line["mfu"] * estimate.step_seconds) < 3


@pytest.fixture
def measured(config):
    """The config without a peak of its own."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, peak_tflops=None))


@pytest.mark.launch
def test_the_peak_of_a_cpu_does_not_depend_on_other_processes(measured):
    """While three processes per core compute, at least half of what is measured without them."""
    quiet = peak_flops(measured)
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3 * len(os.sched_getaffinity(0)))]
    try:
        for other in others:
            assert other.stdout and other.stdout.readline() == b"\n"  # it runs
        # A mean would never reach it. On a machine that is busy anyway, the best product may take a while.
        wait_until(lambda: peak_flops(measured) > quiet / 2)
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_ranks_share_the_peak_of_their_nodes_cpu(measured, monkeypatch):
    """Eight ranks per core have together what all cores have."""
    monkeypatch.setattr("mythos_dist.train.metrics._cpu_flops", lambda dtype: 1e9 * torch.get_num_threads())
    cores = len(os.sched_getaffinity(0))
    ranks = 8 * cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert ranks * peak_flops(measured) == pytest.approx(cores * 1e9)


@pytest.mark.launch
@pytest.mark.parametrize("reason", ["no network", "not logged in"])
def test_wandb_online_falls_back_to_offline_at_once(config, tmp_path, monkeypatch, caplog, reason):
    """Neither a missing network nor a missing login stops or delays a run; a warning is logged. Without a network,
    wandb's own login is not tried, because its timeout is long."""
    import wandb

    start, modes = wandb.init, []

    def unreachable(*_, timeout):
        assert timeout <= 5
        raise OSError("network is unreachable")

    def refuse(**arguments):
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.UsageError("no API key")
        return start(**arguments)

    class Reached:
        def close(self):
            pass

    connect = unreachable if reason == "no network" else lambda *_, **__: Reached()
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        metrics = Metrics(replace_wandb(config, "online"), tmp_path, 0)
    metrics.write_evaluation(0, Evaluation(HeldOut(6.0, 0.25)))
    metrics.close()
    assert modes == (["offline"] if reason == "no network" else ["online", "offline"])
    assert "recording offline" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_nan_and_infinity_are_written_as_null(config, tmp_path):
    """An fp16 step that overflows has an infinite norm; the line must be valid JSON."""
    metrics = Metrics(replace_wandb(config, "disabled"), tmp_path, 0)
    metrics._write("metrics.jsonl", {"step": 1, "grad_norm": float("inf"), "loss": float("nan"), "lr": 0.5})

    def refuse(name):
        raise ValueError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "grad_norm": None, "loss": None, "lr": 0.5}
