"""Signals, hangs, lost ranks and non-finite gradients: how a run ends, and that the same command resumes it with the
results of an uninterrupted run. Tests with real nodes and a real scheduler are in `tests/cluster`."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers.launch import Launch, run_ranks, train
from helpers.parity import batches, change
from helpers.run_folder import lines

from mythos_dist.config.schema import Config
from mythos_dist.data.stream import ReplicaStream

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
EXACT = ("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "expert_load_max")
# The checkpoint of step 2 is complete when step 3 begins.
AT_ONCE = "checkpoint.background=false"


def exact(run_dir: Path) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in lines(run_dir)]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-????????"))


@pytest.fixture(scope="session")
def settings(settings) -> list[str]:
    return [*settings, "train.micro_batch=4"]  # one pass per step and rank: faults come between steps


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run: 6 steps, a checkpoint every second step."""
    run_dir = tmp_path_factory.mktemp("faults") / "uninterrupted"
    assert train(2, *settings, f"run.dir={run_dir}").codes == [0, 0]
    return run_dir


def resumed(settings: list[str], run_dir: Path, uninterrupted: Path, why: str, step: int) -> None:
    """Run the same command again: it completes with the lines of an uninterrupted run, and restarts.jsonl has `why`."""
    result = train(2, *settings, f"run.dir={run_dir}")
    assert result.codes == [0, 0], result.tails
    assert exact(run_dir) == exact(uninterrupted)
    assert (run_dir / "COMPLETED").exists()
    (line,) = lines(run_dir, "restarts.jsonl")
    assert line["start"] == 2 and line["from_step"] == step and why in line["why"], line
    assert line["seconds_lost"] > 0 and set(line["startup_seconds"]) >= {"import", "rendezvous", "engine"}
    assert f"resuming after step {step}" in result.out


@pytest.mark.parametrize("fault", ["usr1@3:1", "usr1@3:0,term@3:1", pytest.param("term@3:0", marks=pytest.mark.long)])
def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(fault, settings, uninterrupted, tmp_path):
    """The signal is sent when step 3 begins: step 3 is the last, and is saved although no checkpoint was due."""
    run_dir = tmp_path / "run"
    result = train(2, *settings, f"run.dir={run_dir}", f"faults.inject={fault}")
    assert result.codes == [85, 85], result.tails
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 3] and checkpoints(run_dir) == [2, 3]
    assert not (run_dir / "COMPLETED").exists()
    name = "SIG" + fault[:4].upper()
    assert f"stopped after step 3: rank {fault.split(',')[0][-1]} received {name}" in result.out
    resumed(settings, run_dir, uninterrupted, name, 3)


def test_max_seconds_and_a_stop_file_end_a_run_that_then_resumes(settings, uninterrupted, tmp_path):
    """Two starts stop, before step 1 and on a STOP file, which is removed; the third completes the run."""
    run_dir = tmp_path / "run"
    timed_out = train(2, *settings, f"run.dir={run_dir}", "run.max_seconds=0.001")
    assert timed_out.codes == [85, 85] and "run.max_seconds=0.001 elapsed" in timed_out.out
    assert (run_dir / "metrics.jsonl").exists() is False and checkpoints(run_dir) == [0]
    (run_dir / "STOP").touch()
    stopped = train(2, *settings, f"run.dir={run_dir}")
    assert stopped.codes == [85, 85] and f"found {run_dir / 'STOP'}" in stopped.out
    assert not (run_dir / "STOP").exists()
    assert train(2, *settings, f"run.dir={run_dir}").codes == [0, 0]
    assert exact(run_dir) == exact(uninterrupted)
    assert [line["start"] for line in lines(run_dir, "restarts.jsonl")] == [2, 3]


def ended(result: Launch, fault_rank: int, code: int) -> None:
    other = result.codes[1 - fault_rank]
    assert other == 4 and result.codes[fault_rank] == code, (result.codes, result.tails)


@pytest.mark.parametrize(
    ("fault", "limit", "code", "why"),
    [
        ("kill@3:1", "", -signal.SIGKILL, "rank 1 on {node} exited unexpectedly"),
        # As srun and torchrun do, the launcher of these tests finally kills a suspended rank.
        ("freeze@3:1", "faults.lost_after=10", -signal.SIGKILL, "rank 1 on {node} has not responded for 10 s"),
        (
            "hang@3:1",
            "faults.hang_after=15",
            4,
            "hang_after=15 s: rank 1 on {node} (at ops/cluster/inject.py",
        ),
        ("kill@3:0", "", -signal.SIGKILL, "rank 0 on 127.0.0.1 exited"),
        ("freeze@3:0", "faults.lost_after=10", -signal.SIGKILL, "rank 0 on 127.0.0.1 has not responded for 10 s"),
    ],
)
def test_a_rank_that_is_lost_or_hangs_is_named_and_ends_the_run(
    fault, limit, code, why, settings, uninterrupted, tmp_path
):
    """The failure is detected by the one limit that is set (the defaults are long), or by the closed connection. The
    other rank exits with code 4 and logs its stacks and its last collective."""
    import socket

    run_dir, rank = tmp_path / "run", int(fault[-1])
    grace = 1 if fault.startswith("freeze") else 240  # a suspended rank does not end by itself
    arguments = [*settings, *limit.split(), AT_ONCE, f"run.dir={run_dir}", f"faults.inject={fault}"]
    result = train(2, *arguments, grace=grace)
    ended(result, rank, code)
    why = why.format(node=socket.gethostname())
    log = (run_dir / "logs" / f"rank-{1 - rank:05d}.log").read_text()
    assert why in log, log
    assert "train/loop.py" in log and "last collective: all_reduce number" in log
    writer = json.loads((run_dir / "writer.json").read_text())
    if rank:
        assert writer["state"] == "failed" and why in writer["why"]
        seconds = writer["time"] - lines(run_dir)[-1]["time"]
        assert seconds < 240, "from the last step to the end; faults.hang_after is 600"
    resumed(settings, run_dir, uninterrupted, why if rank else "the previous run was killed", 2)


def test_an_error_of_one_rank_ends_all_and_is_named(settings, uninterrupted, tmp_path, monkeypatch):
    """A rank with an unexpected exception prints its traceback; the other rank's message names it."""
    run_dir = tmp_path / "run"
    result = train(2, *settings, AT_ONCE, f"run.dir={run_dir}", env={"FAIL_AT": "1:3"})
    assert result.codes == [4, 1], (result.codes, result.tails)
    assert "rank 1 on" in result.err and "ZeroDivisionError: injected error" in result.err
    assert "ZeroDivisionError" in result.tails[1]
    resumed(settings, run_dir, uninterrupted, "ZeroDivisionError", 2)


def test_a_nan_that_does_not_recur_changes_no_result(settings, uninterrupted, tmp_path):
    """The step is recomputed, all values equal those of an uninterrupted run, and the line records the decision."""
    result = train(2, *settings, f"run.dir={tmp_path}", "faults.inject=nan@3:1")
    assert result.codes == [0, 0], result.tails
    assert exact(tmp_path) == exact(uninterrupted)
    decisions = {line["step"]: line["decision"] for line in lines(tmp_path) if "decision" in line}
    assert decisions == {3: "recomputed: gradients were not finite"}


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_loss_scale(settings, tmp_path):
    """Overflows are normal in fp16: the step is not recomputed and does not count towards a rollback."""
    arguments = [*settings, "train.dtype=fp16", "train.steps=3", "faults.roll_back_after=1", f"run.dir={tmp_path}"]
    result = train(2, *arguments, "faults.inject=nan@2:1")
    assert result.codes == [0, 0], result.tails
    assert [line["skipped"] for line in lines(tmp_path)] == [False, True, False]
    decisions = {line["step"]: line["decision"] for line in lines(tmp_path) if "decision" in line}
    assert decisions == {2: "skipped: gradients overflowed, and the loss scale is halved"}
    manifest = json.loads(
        (tmp_path / "checkpoints" / "step-00000003" / "checkpoint.json").read_text().split("\n", 1)[1]
    )
    assert manifest["optimizer"]["loss_scale"]["cur_scale"] == 2.0**15


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.zero=3",
        "parallel.pipe=2 train.dtype=bf16",
        pytest.param("parallel.zero=1", marks=pytest.mark.long),
        pytest.param("parallel.pipe=2", marks=pytest.mark.long),
        pytest.param("train.dtype=bf16", marks=pytest.mark.long),
    ],
)
def test_a_nan_that_recurs_skips_the_step(layout, settings, tmp_path):
    """Parameters do not change: the next loss equals that of a run without the skipped step."""
    run_dir, arguments = tmp_path / "run", [*settings, *layout.split(), "train.steps=3", "optim.warmup_steps=0"]
    bad = train(2, *arguments, f"run.dir={run_dir}", "faults.inject=bad_batch@1:1")
    assert bad.codes == [0, 0], bad.tails
    records = lines(run_dir)
    assert [line["skipped"] for line in records] == [False, True, False]
    assert records[1]["grad_norm"] is None and records[1]["decision"] == "skipped: gradients are not finite"
    # A run that excludes batch 1 trains its second step on batch 2, from the same parameters.
    other = tmp_path / "other"
    other.mkdir()
    (other / "rollbacks.json").write_text(json.dumps([{"step": 9, "to": 9, "batches": [1], "why": ""}]))
    assert train(2, *arguments, f"run.dir={other}").codes == [0, 0]
    assert records[2]["loss"] == lines(other)[1]["loss"] and records[2]["batch_id"] == lines(other)[1]["batch_id"]


def test_three_skips_in_a_row_roll_the_run_back_and_exclude_their_batches(settings, shards, tmp_path):
    """Batches 3, 4 and 5 are bad: at step 6 the run returns to the checkpoint of step 2 and trains on batches 6, 7, ...
    No checkpoint was saved at step 4, between skipped steps. A run that starts over still excludes the batches."""
    run_dir = tmp_path / "run"
    order = "faults.inject=" + ",".join(f"bad_batch@{batch}:0" for batch in (3, 4, 5))
    arguments = [*settings, f"run.dir={run_dir}", order, "train.steps=8"]
    result = train(2, *arguments)
    assert result.codes == [0, 0], result.tails
    stream = ReplicaStream(
        shards, "train", seq_len=32, vocab_size=512, global_batch=8, micro_batch=8, replica=0, num_replicas=1, seed=0
    )
    expected = []
    for batch in (0, 1, 2, 6, 7, 8, 9, 10):
        ids = sorted(stream.step(batch)[0].sample_ids.tolist())
        expected.append(hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16])
    records = lines(run_dir)
    assert [line["batch_id"] for line in records] == expected
    assert not any(line["skipped"] for line in records) and checkpoints(run_dir) == [4, 6, 8]
    assert "rolled back from step 6 to the checkpoint of step 2, excluding batches 3, 4, 5" in records[2]["decision"]
    assert [line["step"] for line in records] == list(range(1, 9))
    for step in (4, 6, 8):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")
    for name in ("COMPLETED", "metrics.jsonl"):  # with these, a run without checkpoints is refused
        (run_dir / name).unlink()
    again = train(2, *arguments)  # from step 0, without the bad batches
    assert again.codes == [0, 0] and "WARNING" not in again.err
    assert [line["batch_id"] for line in lines(run_dir)] == expected


def test_a_run_that_would_exceed_max_rollbacks_ends_with_exit_code_5(settings, tmp_path):
    """Every batch from the third on is bad: one rollback is allowed, the next ends the run. Skips before the first
    checkpoint end it, too."""
    order = "faults.inject=" + ",".join(f"bad_batch@{batch}:1" for batch in range(2, 12))
    limits = ["faults.roll_back_after=2", "faults.max_rollbacks=1", "train.steps=20"]
    result = train(2, *settings, f"run.dir={tmp_path}", order, *limits)
    assert result.codes == [5, 5], result.tails
    assert "2 steps in a row were skipped after 1 rollback" in result.err and "Traceback" not in result.err
    assert json.loads((tmp_path / "writer.json").read_text())["state"] == "failed"
    none = train(
        2, *settings, f"run.dir={tmp_path / 'none'}", order.replace("@2:", "@0:"), *limits, "checkpoint.every=9"
    )
    assert none.codes == [5, 5] and "there is no checkpoint yet" in none.err


def step_with_limit(configs: list[Config]) -> list[tuple]:
    """For each config and for a limit below and above the gradient norm: (whether the step was skipped, whether any
    optimizer state changed, whether the reported norm exceeds the lower limit)."""
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.engine import Engine

    outcomes = []
    for config in configs:
        mesh = build_mesh(config.parallel)
        engine = Engine(config, mesh)
        steps = batches(config, mesh.data.rank, mesh.data.size)
        for limit in (1e-6, 1e6):
            before = [value.clone() for shard in engine.local_shards.values() for value in shard.values.values()]
            result = engine.train_step(next(steps), 1, limit)
            after = [value for shard in engine.local_shards.values() for value in shard.values.values()]
            changed = any(not a.equal(b) for a, b in zip(before, after, strict=True))
            outcomes.append((result.skipped, changed, result.grad_norm > 1e-6))
        engine.close()
    return outcomes


def test_a_gradient_norm_above_the_limit_skips_the_step_at_every_layout(config):
    """ZeRO 1 to 3, expert, tensor and pipeline parallelism, bf16 and fp16: no parameter or moment changes."""
    base = change(config, train={"global_batch": 8, "micro_batch": 2}, experts={"bias_update_rate": 0.001})
    layouts = [{"zero": 1}, {"zero": 2}, {"zero": 3}, {"expert": 2}, {"tensor": 2}, {"pipe": 2}]
    work = [change(base, parallel=layout) for layout in layouts]
    work += [change(base, train={"dtype": dtype}) for dtype in ("bf16", "fp16")]
    for got in run_ranks(2, step_with_limit, work):
        assert got == [(True, False, True), (False, True, True)] * len(work)


def test_a_spike_is_skipped_and_the_median_survives_a_resume(settings, tmp_path):
    """With a factor below 1 every step is a spike as soon as 20 norms are known; a resume restores these norms."""
    arguments = [*settings, f"run.dir={tmp_path}", "faults.spike_factor=0.1", "faults.roll_back_after=99"]
    assert train(2, *arguments, "train.steps=20").codes == [0, 0]
    assert not any(line["skipped"] for line in lines(tmp_path))
    assert train(2, *arguments, "train.steps=22").codes == [0, 0]
    records = lines(tmp_path)
    assert [line["skipped"] for line in records] == [False] * 20 + [True] * 2
    assert "is above the limit" in records[20]["decision"] and records[20]["grad_norm"] > 0
