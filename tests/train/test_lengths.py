"""Runs whose sequences are longer or shorter than the windows of their shards; stages that extend a context."""

import signal

import pytest
import torch
from helpers.launch import run_tool, train
from helpers.run_folder import at, lines
from helpers.small_run import REPOSITORY

from mythos_dist.checkpoint.restore import load_model
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.model import Mythos
from mythos_dist.train.metrics import batch_id

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]
EXACT = ("loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens")
YARN = "{kind: yarn, factor: 2, original_max_seq_len: 32, mscale: 1, mscale_all_dim: 1}"


def exact(run_dir) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in lines(run_dir)]


@pytest.mark.parametrize("seq_len", [128, pytest.param(8, marks=pytest.mark.long)])
def test_a_run_at_another_length_resumes_bit_for_bit_with_exact_counts(settings, shards, tmp_path, seq_len):
    """Killed after step 3, resumed on as many ranks: the lines of the uninterrupted run. Samples are those of the
    stream of one process, tokens are counted by the run's length, and held-out sequences have it."""
    run = [*settings, f"train.seq_len={seq_len}", "train.global_batch=4", "checkpoint.every=1", "train.eval_samples=6"]
    assert train(2, *run, f"run.dir={tmp_path / 'whole'}").codes == [0, 0]
    file = tmp_path / "killed" / "checkpoints" / "step-00000003" / "checkpoint.json"
    killed = train(2, *run, f"run.dir={tmp_path / 'killed'}", env={"KILL_AFTER": str(file)})
    assert -signal.SIGKILL in killed.codes
    assert train(2, *run, f"run.dir={tmp_path / 'killed'}").codes == [0, 0]
    assert exact(tmp_path / "killed") == exact(tmp_path / "whole")
    stream = ReplicaStream(
        shards, "train", seq_len=seq_len, vocab_size=512, global_batch=4, micro_batch=4, replica=0, num_replicas=1,
        seed=0,
    )  # fmt: skip
    for line in lines(tmp_path / "whole"):
        (batch,) = stream.step(line["step"] - 1)
        assert line["batch_id"] == batch_id(batch.sample_ids.tolist())
        assert line["tokens"] == 4 * seq_len * line["step"]
    one = train(1, *run, f"run.dir={tmp_path / 'one'}")
    assert one.codes == [0], one.tails
    for key in ("loss", "heldout_loss"):
        name = "metrics.jsonl" if key == "loss" else "eval.jsonl"
        alone, both = ([line[key] for line in lines(tmp_path / folder, name)] for folder in ("one", "whole"))
        assert alone == pytest.approx(both, rel=1e-5)


def test_a_stage_of_one_config_stretches_a_model(settings, tmp_path):
    """Killed at the first step of the second stage: it resumes there, and gives the lines of the uninterrupted run."""
    quiet = [one for one in settings[1:] if not one.startswith(("train.steps", "train.seq_len"))]
    file = tmp_path / "config.yaml"
    long = f"{{max_seq_len: 64, rope_scaling: {YARN}, kv_sharing: 'every:2'}}"
    file.write_text(
        f"base: {settings[0]}\nmodel: {{max_seq_len: 32}}\ntrain: {{seq_len: 32}}\nstages:\n"
        f"  - {{name: short, steps: 2}}\n  - {{name: long, steps: 2, model: {long}, train: {{seq_len: 64}}}}\n"
    )
    run = [str(file), *quiet, "checkpoint.every=1"]
    whole = train(1, *run, f"run.dir={tmp_path / 'whole'}")
    assert whole.codes == [0], whole.tails
    killed = tmp_path / "killed" / "checkpoints" / "step-00000003" / "checkpoint.json"
    assert train(1, *run, f"run.dir={tmp_path / 'killed'}", env={"KILL_AFTER": str(killed)}).codes == [-signal.SIGKILL]
    assert train(1, *run, f"run.dir={tmp_path / 'killed'}").codes == [0]
    assert exact(tmp_path / "killed") == exact(tmp_path / "whole")
    assert [line["tokens"] for line in lines(tmp_path / "whole")] == [256, 512, 1024, 1536]


def test_a_stage_stretches_a_model_on_the_same_shards(settings, tmp_path):
    """It says what changes and that the data start over; its first loss is that of the parent's weights with scaled
    positions; a resume that drops the scaling is refused; an export has it."""
    run = [*settings, "train.steps=2", "model.max_seq_len=32", f"run.dir={tmp_path / 'short'}"]
    assert train(1, *run).codes == [0]
    stage = [
        *settings, "train.steps=2", "model.max_seq_len=64", "train.seq_len=64", "train.micro_batch=8",
        "checkpoint.every=1", f"model.rope_scaling={YARN}", f"run.dir={tmp_path / 'long'}",
        f"start_from={tmp_path / 'short'}",
    ]  # fmt: skip
    result = train(1, *stage)
    assert result.codes == [0], result.tails
    assert "model.rope_scaling null -> {'kind': 'yarn', 'factor': 2.0, 'original_max_seq_len': 32" in result.out
    assert "text that it has read comes again" in result.out
    trained, _, _ = load_model(at(tmp_path / "short", 2))
    stretched, config, _ = load_model(tmp_path / "long")
    assert config.model.rope_scaling is not None and config.model.rope_scaling.factor == 2
    model = Mythos(config.model, act=config.act, experts=config.experts)
    model.load_state_dict(trained.state_dict())
    stream = ReplicaStream(
        config.data.path, "train", seq_len=64, vocab_size=512, global_batch=8, micro_batch=8, replica=0,
        num_replicas=1, seed=0,
    )  # fmt: skip
    (batch,) = stream.step(0)
    with torch.no_grad():
        losses = model(batch.input_ids, 2, labels=batch.labels, document_ids=batch.document_ids)
    assert lines(tmp_path / "long")[0]["loss"] == pytest.approx(float(losses["cross_entropy"]), rel=1e-5)
    dropped = train(1, *stage, "train.steps=3", "model.rope_scaling=null")
    assert dropped.codes == [2] and "model.rope_scaling=None, but" in dropped.err
    later = train(1, *settings, "train.steps=1", f"start_from={tmp_path / 'long'}", f"run.dir={tmp_path / 'later'}")
    assert later.codes == [0] and "note: without model.rope_scaling positions are other ones" in later.out
    tool = REPOSITORY / "tools" / "export_checkpoint.py"
    refused = run_tool(tool, tmp_path / "long", "--out", tmp_path / "theirs", "--format", "open_mythos", "--quiet")
    assert refused.codes == [2] and "OpenMythos does not have" in refused.err
    for form in ("safetensors", "hf"):
        assert run_tool(tool, tmp_path / "long", "--out", tmp_path / form, "--format", form, "--quiet").codes == [0]
        exported = Mythos.from_pretrained(tmp_path / form)
        assert exported.config == config.model
        with torch.no_grad():
            ids = batch.input_ids[:1]
            torch.testing.assert_close(exported(ids, 2), stretched.eval()(ids, 2))
