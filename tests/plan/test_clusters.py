"""Seconds of collectives against a formula of the links' rates."""

from dataclasses import replace
from pathlib import Path

import pytest

from mythos_dist.config.load import load_config
from mythos_dist.ops.plan.clusters import Cluster
from mythos_dist.ops.plan.estimate import Estimate

TINY = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"

CLUSTER = Cluster(
    name="round",
    gpus_per_node=8,
    nvlink_domain=8,
    memory_gb=80,
    reserved_gb=0,
    bf16_tflops=1000,
    fp32_tflops=50,
    matmul_efficiency=1,
    memory_gb_per_s=1000,
    fast_gb_per_s=400,
    slow_gb_per_s=50,
    fast_latency_us=0,
    slow_latency_us=0,
    link_efficiency=1,
    dollars_per_gpu_hour=1,
)
GB = 1_000_000_000


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "seconds"),
    [
        ("all_gather", 8, 1, 7 / 8 / 400),  # in one domain: each rank receives seven eighths over its own NVLink
        ("all_reduce", 8, 1, 2 * 7 / 8 / 400),  # a reduce-scatter and an all-gather
        ("all_gather", 4, 8, 3 / 4 / 50),  # one rank per domain: its own port
        ("all_gather", 16, 4, 15 / 16 / 100),  # two ranks per domain share two ports
        ("all_to_all", 16, 1, 8 / 16 / 50),  # half of the rows leave the domain, each through the sender's port
        ("send", 2, 8, 1 / 50),
        ("all_reduce", 1, 1, 0),
    ],
)
def test_seconds_of_a_gigabyte_follow_from_link_rates(kind, ranks, stride, seconds):
    assert CLUSTER.seconds(kind, GB, ranks, stride, messages=3) == pytest.approx(seconds)


def test_context_attention_sends_one_message_forward_and_two_backward():
    """With links that cost a second per message and nothing per byte. `parallel/context.py`: keys are gathered in each
    pass, recomputed ones included, and their gradients are reduced; in every layer."""
    cluster = replace(CLUSTER, fast_gb_per_s=1e12, fast_latency_us=1e6)
    config = load_config(
        TINY,
        "parallel.context=2 train.micro_batch=2 train.global_batch=4 train.recompute=loop loops.distribution=fixed "
        "loops.mean=3 loops.maximum=null loops.backprop=2 model.prelude_layers=1 model.coda_layers=2".split(),
    )
    loops = 3 + 2 + 2 * 2  # forward, recomputed, and twice in each backward
    blocks = (1 + 2) * (1 + 2)
    seconds = Estimate(config, 2, cluster).seconds["context"]
    assert seconds == pytest.approx(2 * (loops + blocks), rel=1e-6), "of two micro-batches"
