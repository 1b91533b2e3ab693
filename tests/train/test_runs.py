"""Runs through the command line: the files that they write, bit-exact resume, and refused input."""

import fcntl
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.launch import in_folder_of_rank, launch, train, train_here
from helpers.run_folder import lines

from mythos_dist.checkpoint.restore import load_model
from mythos_dist.data.stream import ReplicaStream

pytestmark = pytest.mark.launch
EXACT = ("loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "expert_load_max")


def exact(run_dir: Path) -> list[tuple]:
    return [tuple(line[key] for key in ("step", *EXACT)) for line in lines(run_dir)]


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run on two ranks."""
    run_dir = tmp_path_factory.mktemp("run") / "finished"
    result = train(2, *settings, f"run.dir={run_dir}")
    assert result.codes == [0, 0], result.err
    return run_dir


def test_a_run_writes_the_documented_files_and_values(finished, config, shards):
    """All files; in metrics.jsonl each value that a closed formula or the shards determine."""
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    assert names >= {"config.yaml", "deepspeed.json", "metrics.jsonl", "eval.jsonl", "COMPLETED", "checkpoints/latest"}
    assert names >= {"logs/rank-00000.log", "logs/rank-00001.log"}
    assert sorted(n for n in names if re.fullmatch(r"checkpoints/step-\d{8}", n)) == [
        f"checkpoints/step-{step:08d}" for step in (2, 4, 6)
    ]
    assert (finished / "checkpoints" / "latest").read_text().strip() == "step-00000006"
    assert json.loads((finished / "deepspeed.json").read_text())["gradient_accumulation_steps"] == 2
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["dim"] == config.model.dim

    stream = ReplicaStream(
        shards, "train", seq_len=32, vocab_size=512, global_batch=8, micro_batch=8, replica=0, num_replicas=1, seed=0
    )
    records = lines(finished)
    assert [line["step"] for line in records] == list(range(1, 7))
    for line in records:
        step = line["step"]
        o, warm = config.optim, config.optim.warmup_steps
        cosine = (1 + math.cos(math.pi * (step - warm) / (6 - warm))) / 2
        rate = o.lr * step / warm if step <= warm else o.lr * (0.1 + 0.9 * cosine)
        assert line["lr"] == pytest.approx(rate)
        assert line["tokens"] == step * 8 * 32 and line["n_loops"] == 2
        ids = sorted(stream.step(step - 1)[0].sample_ids.tolist())
        assert line["batch_id"] == hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["step_seconds"])
        assert 0 < line["mfu"] < 1 and 1 <= line["expert_load_max"] <= 4
    evaluations = lines(finished, "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 6]
    # A uniform prediction has a loss of ln(512); training lowers it.
    assert evaluations[0]["heldout_loss"] == pytest.approx(math.log(512), abs=0.2)
    assert evaluations[1]["heldout_loss"] < evaluations[0]["heldout_loss"] - 0.05  # six steps of warm-up


def train_without_operations(arguments: list[str]) -> int:
    """One process with the core alone: no watchdog, no preflight, no memory check. Returns the exit code."""
    from mythos_dist.config.load import load_config
    from mythos_dist.parallel.launcher import read_rank_info
    from mythos_dist.parallel.process import join_process_group
    from mythos_dist.train.hooks import Hooks
    from mythos_dist.train.loop import train as train_loop
    from mythos_dist.train.prepare import check_run, check_stage
    from mythos_dist.train.session import Session
    from mythos_dist.train.stop import StopHandler

    config = load_config(arguments[0], arguments[1:])
    join_process_group()
    session, hooks = Session(read_rank_info(), StopHandler()), Hooks()
    return train_loop(config, session, check_run(config, session, check_stage(config, session, hooks)), hooks)


def train_without_search(arguments: list[str]) -> None:
    """Train, but fail where the checkpoints of the run would be read."""
    from mythos_dist.train import resume

    def fail(*arguments: object) -> None:
        raise AssertionError("all bytes of the newest checkpoint were read")

    resume.find_newest = fail
    train_here(arguments)


def test_settings_and_shards_are_checked_before_the_checkpoint_is_read(settings, tmp_path):
    """Reading it takes minutes at scale, and the data are wrong at once."""
    result = launch(1, train_without_search, [*settings, "data.path=nowhere", f"run.dir={tmp_path}"])
    assert result.codes == [2] and "nowhere: " in result.err, result.err


def test_the_core_trains_without_operations(finished, settings, tmp_path):
    """The batches of the run on two ranks, and its losses up to the order of summation."""
    result = launch(1, train_without_operations, [*settings, f"run.dir={tmp_path}"])
    assert result.codes == [0] and result.values == [0], result.err
    assert [line["batch_id"] for line in lines(tmp_path)] == [line["batch_id"] for line in lines(finished)]
    losses = [line["loss"] for line in lines(finished)]
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("world", "layout", "axes"),
    [
        (1, "train.micro_batch=4", None),
        (4, "parallel.pipe=2 parallel.expert=2 run.count_communication=true", "data expert pipe tied"),
        pytest.param(
            8,
            "parallel.tensor=2 parallel.expert=2 parallel.pipe=2 run.count_communication=true",
            "data expert pipe replica tensor tied",
            marks=pytest.mark.long,
        ),
    ],
)
def test_results_do_not_depend_on_ranks_or_micro_batch(world, layout, axes, finished, settings, tmp_path):
    """Other ranks, micro-batches and axes: batch_id is equal, losses and norms up to the order of summation."""
    result = train(world, *settings, f"run.dir={tmp_path}", *layout.split(), seconds=960)
    assert result.codes == [0] * world, result.tails
    counted = [line.get("communication") for line in lines(tmp_path)]
    assert [each and set(each) for each in counted] == [axes and set(axes.split())] * 6
    for got, expected in zip(lines(tmp_path), lines(finished), strict=True):
        assert got["batch_id"] == expected["batch_id"] and got["tokens"] == expected["tokens"]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for got, expected in zip(lines(tmp_path, "eval.jsonl"), lines(finished, "eval.jsonl"), strict=True):
        assert got["heldout_loss"] == pytest.approx(expected["heldout_loss"], rel=1e-4)

    (model, _, _), (expected, _, _) = load_model(tmp_path), load_model(finished)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-4, msg=name)


def test_every_rank_logs_its_own_steps(finished):
    """One line per step in each rank's log, to find slow ranks."""
    for rank in (0, 1):
        log = (finished / "logs" / f"rank-{rank:05d}.log").read_text()
        assert [int(n) for n in re.findall(r"step (\d+) took", log)] == list(range(1, 7))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, "parallel.zero=1", marks=pytest.mark.long),
        pytest.param(2, "parallel.zero=2", marks=pytest.mark.long),
        pytest.param(2, "parallel.zero=3", marks=pytest.mark.long),
        (2, "parallel.expert=2 parallel.zero=3"),
        (4, "parallel.pipe=2 parallel.expert=2 train.dtype=bf16"),
        pytest.param(4, "parallel.tensor=2 parallel.expert=2 parallel.sequence=true", marks=pytest.mark.long),
        pytest.param(8, "parallel.tensor=2 parallel.expert=2 parallel.pipe=2", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(settings, tmp_path, ranks, layout):
    """SIGKILL of all ranks after a checkpoint; the same command again gives the lines of an uninterrupted run."""
    arguments = [*settings, *layout.split(), "train.global_batch=4", "data.workers=1", "model.dropout=0.1"]
    expected, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    result = train(ranks, *arguments, f"run.dir={expected}", seconds=960)
    assert result.codes == [0] * ranks, result.tails
    env = {"KILL_AFTER": str(killed / "checkpoints" / "step-00000002" / "checkpoint.json")}
    result = train(ranks, *arguments, f"run.dir={killed}", env=env, seconds=960)
    assert result.codes == [-signal.SIGKILL] * ranks and not (killed / "COMPLETED").exists()
    (killed / "metrics.jsonl").open("a").write('{"step": 3, "lo')  # a line that a kill truncated
    result = train(ranks, *arguments, f"run.dir={killed}", seconds=960)
    assert result.codes == [0] * ranks, result.tails
    assert "resuming from" in result.out
    assert exact(killed) == exact(expected)
    assert lines(killed, "eval.jsonl") == lines(expected, "eval.jsonl")


def test_running_a_finished_run_again_changes_nothing(finished, settings):
    """The second start reports that the run is complete; no file changes."""
    before = {path: path.read_bytes() for path in finished.rglob("*.jsonl")}
    result = train(2, *settings, f"run.dir={finished}")
    assert result.codes == [0, 0] and "is complete: 6 of 6 steps" in result.out
    assert {path: path.read_bytes() for path in finished.rglob("*.jsonl")} == before


def test_a_run_killed_before_its_first_checkpoint_starts_over(finished, settings, tmp_path):
    """Its lines are replaced, and the number of repeated steps is printed."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "COMPLETED").unlink()
    writer = json.loads((run_dir / "writer.json").read_text())
    (run_dir / "writer.json").write_text(json.dumps(writer | {"state": "running", "published": None}))
    again = train(2, *settings, f"run.dir={run_dir}")
    assert again.codes == [0, 0]
    assert "no checkpoint was saved yet: 6 steps are repeated" in again.out
    assert exact(run_dir) == exact(finished)
    assert lines(run_dir, "eval.jsonl") == lines(finished, "eval.jsonl")


def test_a_completed_run_can_be_extended(finished, settings, tmp_path):
    """With more steps it resumes from the last checkpoint; COMPLETED is removed and written again at the end."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    arguments = [*settings, f"run.dir={run_dir}", "train.steps=10"]
    killed = train(
        2, *arguments, env={"KILL_AFTER": str(run_dir / "checkpoints" / "step-00000008" / "checkpoint.json")}
    )
    assert killed.codes == [-signal.SIGKILL] * 2 and not (run_dir / "COMPLETED").exists()
    assert "WARNING: train.steps=10, and the checkpoint of step 6 was saved with 6: the learning rate" in killed.err
    assert train(2, *arguments).codes == [0, 0] and (run_dir / "COMPLETED").exists()
    assert exact(run_dir)[:6] == exact(finished) and [line["step"] for line in lines(run_dir)] == list(range(1, 11))
    (run_dir / "COMPLETED").unlink()  # killed between the last checkpoint and the marker
    assert train(2, *arguments).codes == [0, 0] and (run_dir / "COMPLETED").exists()


def test_the_saved_model_has_the_held_out_loss_that_was_logged(finished, config, shards):
    """`load_model` on one process without DeepSpeed's engine: the same weights, so the same loss to fp32 rounding."""
    model, loaded, step = load_model(finished)
    assert step == 6 and loaded.model == config.model
    stream = ReplicaStream(
        shards, "heldout", seq_len=32, vocab_size=512, global_batch=4, micro_batch=4, replica=0, num_replicas=1, seed=0,
        shuffle=False,
    )  # fmt: skip
    (batch,) = stream.step(0)  # train.eval_samples of the small run is 4
    loss = model(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids)["cross_entropy"]
    assert float(loss) == pytest.approx(lines(finished, "eval.jsonl")[-1]["heldout_loss"], rel=1e-5)


def refused(result, *parts: str) -> None:
    """Exit code 2 on every rank; all `parts` are on rank 0's standard error, and no traceback."""
    assert set(result.codes) == {2}, (result.codes, result.err)
    assert "Traceback" not in result.err and result.err.startswith("error: "), result.err
    for part in parts:
        assert part in result.err, result.err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.dimm=64", ("model.dimm", "did you mean model.dim?")),
        (
            "train.seq_len=20 model.vocab_size=300 data.tokenizer=OTHER",
            ("train.seq_len=20", "seq_len=32", "model.vocab_size=300", "512", "another tokenizer than OTHER"),
        ),
        ("train.micro_batch=8", ("train.global_batch=8", "x 2 (replicas)", "train.micro_batch to one of [1, 2, 4]")),
    ],
)
def test_invalid_input_gives_one_message_and_exit_code_2(override, parts, settings, tmp_path, monkeypatch):
    """Problems of the config, of the shards, and of the number of ranks; the run folder is not created."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OTHER").write_bytes(b"another tokenizer")
    refused(train(2, *settings, "run.dir=here", *override.split()), *parts)
    assert not (tmp_path / "here").exists()


def test_an_error_on_one_rank_ends_all_ranks_with_its_message(settings, shards, tmp_path):
    """Rank 1 has no shards, as on a node without the mount: no rank waits for it, all exit with code 2."""
    (tmp_path / "0").mkdir()
    shutil.copytree(shards, tmp_path / "0" / "shards")
    arguments = [*settings, f"run.dir={tmp_path / 'run'}", "data.path=shards"]
    result = launch(2, in_folder_of_rank, str(tmp_path), arguments, seconds=240)
    refused(result, "rank 1: shards: no such folder")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_config_is_refused_and_not_changed(finished, settings, tmp_path):
    """The message has each differing setting with both values."""
    run_dir = tmp_path / "copy"
    shutil.copytree(finished, run_dir)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    result = train(2, *settings, f"run.dir={run_dir}", "model.n_experts=16", "optim.lr=1e-3", "train.steps=8")
    refused(result, "model.n_experts=16", "has 8", "optim.lr=0.001", "has 0.002", "another run.dir")
    assert "train.steps" not in result.err  # a run may be extended
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_folder_has_one_writer(settings, tmp_path):
    """While another process holds the lock, as ranks that outlive their launcher do, a second run is refused."""
    with (tmp_path / "writer.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(train(2, *settings, f"run.dir={tmp_path}"), f"run.dir={tmp_path}", "in use", "another run.dir")
        assert [path.name for path in tmp_path.iterdir()] == ["writer.lock"]
    assert train(2, *settings, f"run.dir={tmp_path}", "train.steps=1").codes == [0, 0]


def test_help_python_alone_and_torchrun(settings, tmp_path):
    """`--help` imports no torch; an invalid setting without a launcher exits with 2; under torchrun two ranks train."""
    module = [sys.executable, "-m", "mythos_dist.train"]
    command = [module[0], "-X", "importtime", *module[1:], "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0 and "section.key=value" in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "mythos_dist.errors" in imported and "torch" not in imported
    bad = subprocess.run([*module, *settings, "optim.lrr=1"], capture_output=True, text=True, timeout=240)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "did you mean optim.lr?" in bad.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *module[1:]]
    done = subprocess.run([*torchrun, *settings, f"run.dir={tmp_path}"], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "COMPLETED").exists()
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ") and "grad_norm" in line]
    assert len(steps) == 6  # one console line per step
