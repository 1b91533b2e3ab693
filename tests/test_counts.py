"""A count of one is written in the singular, in every message that counts."""

import re
from dataclasses import replace

import pytest

from experiments.depth_task import make_depth_task
from mythos_dist.config.layout import layout_problems
from mythos_dist.config.schema import Config
from mythos_dist.data.manifest import DocumentCounts, SplitCounts
from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.allocation import check_allocation, even_allocation
from mythos_dist.ops.preflight import PreflightResult
from mythos_dist.units import count

PLURALS = "ranks nodes replicas documents windows tokens shards steps problems tensors files rows sequences loops GPUs"


def test_a_count_has_its_noun_in_the_right_number():
    assert [count(n, "rank") for n in (0, 1, 2, 1024)] == ["0 ranks", "1 rank", "2 ranks", "1,024 ranks"]
    assert [count(n, "micro-batch", "micro-batches") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]


def test_messages_about_one_thing_are_in_the_singular(tmp_path):
    manifest = make_depth_task(tmp_path / "task", sequences=1, heldout=1)
    one = SplitCounts(documents=1, tokens=1, windows=1, tokens_written=1, tokens_dropped=1, eos_dropped=0)
    manifest = replace(manifest, documents=DocumentCounts(1, 1), splits={"train": one, "heldout": one})
    config = Config()
    parallel = replace(config.parallel, expert=2)
    cut = replace(manifest, heldout=0.1, heldout_by="window")
    texts = [manifest.summary(), cut.summary(), str(PreflightResult(["a"], 1.0, 1.0, 0.0, 1.0))]
    texts += layout_problems(replace(config, parallel=parallel), 1)
    with pytest.raises(UserError) as error:
        even_allocation(1, 2)
    texts.append(str(error.value))
    with pytest.raises(UserError) as error:
        check_allocation([replace(config, parallel=replace(parallel, tensor=2))], even_allocation(1, 1), "hostfile")
    texts.append(str(error.value))
    for text in texts:
        assert not re.search(rf"\b1 ({PLURALS.replace(' ', '|')})\b", text), text
        assert not re.search(r"\b1 \w+ (are|have|do|were)\b", text), text
        assert re.search(r"\b1 (rank|document|replica)\b", text), text
