"""The demo of a stretched context: its losses by position, and whether YaRN makes a longer context readable."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.small_run import REPOSITORY

from experiments.long_context import GROUP, losses_by_position, table
from mythos_dist.config.schema import MythosConfig
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model import Mythos

TOOL = REPOSITORY / "tools" / "long_demo.py"


def test_losses_by_position_are_means_of_single_losses():
    """Against logits and PyTorch's cross entropy, with labels that do not count."""
    model = Mythos(
        MythosConfig(vocab_size=40, dim=16, n_heads=2, max_loop_iters=2, n_experts=2, n_experts_per_tok=1, expert_dim=8)
    ).eval()
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        ids, labels = torch.randint(40, (2, 3, 2 * GROUP), generator=draw)
        labels[0, : GROUP // 2] = -100
        batches.append(MicroBatch(ids, labels[:, None], torch.zeros_like(ids), torch.arange(3)))
    expected = []
    for group in range(2):
        losses = []
        for batch in batches:
            rows = slice(group * GROUP, (group + 1) * GROUP)
            with torch.no_grad():
                logits = model(batch.input_ids, 2)[:, rows]
            losses.append(
                F.cross_entropy(logits.flatten(0, 1), batch.final_labels[:, rows].flatten(), reduction="none")
            )
        counted = torch.cat([batch.final_labels[:, rows].flatten() for batch in batches]) >= 0
        expected.append(float(torch.cat(losses)[counted].mean()))
    assert losses_by_position(model, batches, 2) == pytest.approx(expected, rel=1e-5)


def test_the_table_has_the_means_of_three_ranges():
    losses = [float(i) for i in range(16)]  # of 64 positions each
    summary = {"trained_length": 256, "length": 1024, "loss_by_position": {"a": losses}}
    assert table(summary)[1].split() == ["a", "1.500", "5.500", "13.500"]


@pytest.mark.launch
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_short_stage_with_yarn_makes_four_times_the_context_readable(tmp_path):
    """The demo as it is. Beyond twice the trained length the loss rises without YaRN, less after a stage without it,
    and little with it; within, it stays. The second call trains nothing."""
    command = [sys.executable, TOOL, "--out", tmp_path / "demo"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert first.returncode == 0, first.stderr[-2000:]
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    before, untrained, after, control = summary["loss_by_position"].values()
    trained = summary["trained_length"] // GROUP
    mean = lambda losses, *span: sum(losses[slice(*span)]) / len(losses[slice(*span)])  # noqa: E731
    assert mean(before, 2 * trained, None) > mean(before, 0, trained) + 0.1
    assert mean(untrained, 2 * trained, None) < mean(before, 2 * trained, None) - 0.1
    assert mean(after, 2 * trained, None) < mean(after, 0, trained) + 0.2
    assert mean(after, 2 * trained, None) < mean(control, 2 * trained, None) - 0.1
    assert mean(after, 0, trained) < mean(before, 0, trained) + 0.05
    metrics = (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes()
    assert subprocess.run(command, capture_output=True, cwd=REPOSITORY).returncode == 0
    assert (tmp_path / "demo" / "run" / "metrics.jsonl").read_bytes() == metrics
