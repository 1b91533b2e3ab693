"""The plan of every variant's config against a dry run of one of its ranks, and the figures in configs and docs."""

import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.launch import launch
from helpers.selection import selected

from mythos_dist.config.load import load_config
from mythos_dist.ops.dry_run import DryRun, dry_run
from mythos_dist.ops.plan.clusters import load_cluster
from mythos_dist.ops.plan.command import rank_of
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.ops.plan.report import compare
from mythos_dist.ops.plan.write import BEGIN, END, planned_lines

CONFIGS = Path(__file__).parents[2] / "configs"
PLANNING = (CONFIGS.parent / "docs" / "planning.md").read_text()
RECIPES = [f"recipes/{name}" for name in ("pretrain", "decay", "long_context", "sft")]
# Slowest first.
NAMES = [
    "1t_128k",
    "500b_128k",
    "100b_1m",
    "1t",
    "1t_without_pipe",
    "500b",
    "100b",
    "50b",
    "10b",
    "3b",
    "1b",
    *RECIPES,
    "300m",
]
SHORT = ("3b", "300m")  # on one node, and one GPU

EACH = pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)

pytestmark = [pytest.mark.launch, pytest.mark.timeout(3000)]


def comment_of(name: str) -> list[str]:
    """The lines of the plan in a config's comment."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return lines[lines.index(BEGIN) : lines.index(END) + 1]


def estimate_of(name: str) -> Estimate:
    """The plan of a config's layout, for the GPUs and the cluster in its comment."""
    options = re.search(r"--gpus (\d+) --cluster configs/(\S+)", comment_of(name)[1])
    assert options
    config = load_config(CONFIGS / f"{name}.yaml", ["data.path=shards"])
    return Estimate(config, int(options[1]), load_cluster(CONFIGS / options[2]))


def run_half(names: list[str]) -> dict[str, tuple[dict[str, Any], float]]:
    """On each of two processes: the dry runs of half of the names, each with the process's peak memory in bytes."""
    results = {}
    for name in names[int(os.environ["LOCAL_RANK"]) :: 2]:
        estimate, begin = estimate_of(name), time.monotonic()
        measured = dry_run(estimate.config, estimate.world_size, rank_of(estimate))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"{name}: {time.monotonic() - begin:.0f} s, {peak / 1e9:.2f} GB", file=sys.stderr)
        results[name] = vars(measured), peak  # ranks can return plain values only
    return results


@pytest.fixture(scope="module")
def dry(request) -> dict[str, tuple[DryRun, float]]:
    """Dry run and peak memory of each variant that the selected tests need."""
    needed = selected(request, "name")
    halves = launch(2, run_half, [name for name in NAMES if name in needed], seconds=5600)
    assert halves.codes == [0, 0], "\n".join(halves.tails)
    return {name: (DryRun(**values), peak) for half in halves.values for name, (values, peak) in half.items()}


@EACH
def test_a_variants_plan_equals_its_dry_run(name, dry):
    """Parameters, FLOPs and bytes on every axis exactly; memory within 1 %, each part of it within 10 %."""
    estimate, (measured, peak) = estimate_of(name), dry[name]
    stage, m = estimate.largest_stage, measured.micro_batches
    assert estimate.fits
    assert measured.parameters == estimate.parameters
    assert measured.flops == estimate.flops(stage, m)
    assert measured.communication == estimate.communication(stage, m)
    total = sum(measured.memory.values())
    assert stage.bytes == pytest.approx(total, rel=0.01)
    for part, size in measured.memory.items():
        # Parts below a thousandth of the total are not compared.
        assert stage.memory.get(part, 0) == pytest.approx(size, rel=0.1, abs=total / 1000), part
    assert peak < 2e9, "a dry run allocates no tensor data"


@EACH
def test_a_configs_comment_is_the_output_of_the_planner(name, dry):
    command = f"mythos plan configs/{name}.yaml --gpus {estimate_of(name).world_size} "
    command += "--cluster configs/clusters/h100_80gb.yaml --as-is --dry-run"
    assert comment_of(name) == planned_lines(estimate_of(name), command, dry[name][0])


@pytest.mark.long
@pytest.mark.parametrize("name", ["1t"])
def test_the_docs_show_the_plan_and_the_dry_run(name, dry):
    shown = PLANNING[PLANNING.index("rank 0 of 4096:") :].splitlines()[1:]
    lines = compare(estimate_of(name), dry[name][0])
    assert shown[: len(lines)] == lines


@pytest.mark.long  # the memory of a plan is that of its dry run within 1 %
def test_what_cannot_fit_does_not_fit_in_the_dry_run_either():
    """10b on 8 H100: with tensor 2 and expert 2 the plan exceeds the memory, with tensor 4 it does not."""
    cluster = load_cluster(CONFIGS / "clusters" / "h100_80gb.yaml")
    sizes = {}
    for tensor in (2, 4):
        overrides = ["data.path=shards", f"parallel.tensor={tensor}", "train.global_batch=64", "loops.mean=8"]
        config = load_config(CONFIGS / "10b.yaml", overrides)
        estimate = Estimate(config, 8, cluster)
        sizes[tensor] = estimate.fits, sum(_memory(config).values()) <= cluster.usable
    assert sizes == {2: (False, False), 4: (True, True)}


def _memory(config: Any) -> dict[str, int]:
    (memory,) = launch(1, _dry_memory, config, seconds=1200).values
    return memory


def _dry_memory(config: Any) -> dict[str, int]:
    return dry_run(config, 8).memory
