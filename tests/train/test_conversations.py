"""Training on conversations: losses are means over completion tokens, and conversations do not see each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.conversion import read_windows
from helpers.launch import train
from helpers.small_run import TINY

from mythos_dist.checkpoint.restore import load_model
from mythos_dist.data.loss_mask import IN_LOSS, PADDING
from mythos_dist.prepare.packing import split_conversations

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_losses_are_those_of_each_conversation_alone_at_every_layout(settings, conversations, tmp_path):
    """A held-out evaluation against plain forward passes over one conversation at a time; fp32: 1e-4. The losses of
    training are equal with other micro-batches and stages, whose numbers of completion tokens differ."""
    run = [*settings, f"data.path={conversations}", "train.steps=4", "train.global_batch=8", "train.eval_every=4"]
    run += ["train.eval_samples=1000", "checkpoint.every=4", "loops.distribution=fixed"]
    one = train(1, *run, f"run.dir={tmp_path / 'one'}", "train.micro_batch=1")
    two = train(2, *run, f"run.dir={tmp_path / 'two'}", "train.micro_batch=4", "parallel.pipe=2")
    assert one.codes == [0] and two.codes == [0, 0], one.err + two.err
    losses = {name: [line["loss"] for line in lines(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")}
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-5)

    model, config, _ = load_model(tmp_path / "one")
    n_loops = config.loops.mean_of(config.model)
    total, correct, tokens = 0.0, 0, 0
    for window in read_windows(conversations, "heldout"):
        for conversation in split_conversations(np.array(window).reshape(2, -1)):
            if conversation[1, 0] & PADDING:
                continue
            ids = torch.tensor(conversation[0])
            in_loss = torch.tensor(conversation[1, 1:] & IN_LOSS).bool()
            with torch.no_grad():
                logits = model(ids[None, :-1], n_loops)[0][in_loss]
            labels = ids[1:][in_loss]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(-1) == labels).sum())
            tokens += len(labels)
    for name in ("one", "two"):
        last = lines(tmp_path / name / "eval.jsonl")[-1]
        assert last["step"] == 4 and last["heldout_loss"] == pytest.approx(total / tokens, rel=1e-4)
        assert last["accuracy"] == pytest.approx(correct / tokens, abs=1.5 / tokens)  # ties


def test_a_run_is_tuned_on_conversations_in_its_second_stage(settings, shards, conversations, tmp_path):
    """Text and then conversations in one config, killed after the first step of the second stage: the same losses as
    uninterrupted, and on two ranks."""
    stages = "".join(
        f"  - {{name: {name}, steps: 3, data: {{path: {path}}}}}\n"
        for name, path in (("text", shards), ("chat", conversations))
    )
    (tmp_path / "config.yaml").write_text(f"base: {TINY}\nstages:\n{stages}")
    changed = ("train.steps", "data.path")
    run = [str(tmp_path / "config.yaml"), *(one for one in settings[1:] if not one.startswith(changed))]
    run += ["train.global_batch=4", "checkpoint.every=2"]
    for name, ranks, options in (("one", 1, []), ("two", 2, ["train.micro_batch=2"])):
        assert train(ranks, *run, *options, f"run.dir={tmp_path / name}").codes == [0] * ranks
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["stage"] for line in one] == ["text"] * 3 + ["chat"] * 3
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)
    killed = f"run.dir={tmp_path / 'killed'}"
    env = {"KILL_AFTER": str(tmp_path / "killed" / "checkpoints" / "step-00000004")}
    assert train(1, *run, killed, env=env).codes != [0]
    assert train(1, *run, killed).codes == [0]
    again = lines(tmp_path / "killed" / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in one]
