"""Averages of the weights, against a recurrence in numpy over the checkpoints of every step."""

import math
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.launch import launch, run_ranks, run_tool, train, train_until_rolled_back
from helpers.parity import batches, change
from helpers.run_folder import lines
from helpers.small_run import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.checkpoint.manifest import LocalShard, read_checkpoint_manifest
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import load_model
from mythos_dist.config.load import config_from, load_config
from mythos_dist.config.schema import AverageConfig, Config
from mythos_dist.data.manifest import read_shard_manifest
from mythos_dist.errors import UserError
from mythos_dist.model.parameter_table import checkpoint_bytes
from mythos_dist.train.average import WeightAverage, add_averages

EXACT = ("loss", "grad_norm", "n_loops", "batch_id", "lr", "expert_load_max")
launches = pytest.mark.launch
LAYOUTS = {
    "one rank": (1, ""),
    "zero 3": (2, "parallel.zero=3"),
    "pipe 2": (2, "parallel.pipe=2"),
    "tensor 2, expert 2, zero 2": (4, "parallel.tensor=2 parallel.expert=2 parallel.zero=2"),
}


def expected_average(samples: list[np.ndarray], kind: str, decay: float = 0.0) -> np.ndarray:
    """The documented recurrence: fp32, each operation rounded by itself."""
    average = samples[0].copy()
    for k, sample in enumerate(samples[1:], 2):
        rate = 1 / k if kind == "mean" else (1 - decay) / (1 - decay**k)
        average = average + (sample - average) * np.float32(rate)
    return average


def shards_of(weights: np.ndarray) -> dict[str, LocalShard]:
    values = {"parameter": torch.from_numpy(weights.copy())}
    return {"w": LocalShard(Piece.full(weights.shape), weights.shape, values, True)}


@given(
    steps=st.integers(1, 60),
    every=st.integers(1, 7),
    last=st.none() | st.integers(1, 9),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.9999]),
    kind=st.sampled_from(["mean", "ema"]),
)
def test_averages_follow_their_closed_formula(steps, every, last, decay, kind):
    """At the end of a run: bit for bit by the recurrence over the samples, and to fp32 rounding by the sum with the
    documented weights. A mean is of the last `last` samples, or of all if there are fewer."""
    settings = AverageConfig(kind=kind, every=every, last=last, decay=decay)
    weights = np.random.default_rng(steps).standard_normal((steps, 5)).astype(np.float32)
    shards = shards_of(weights[0])
    add_averages(shards)
    average = WeightAverage(settings, shards)
    for step in range(1, steps + 1):
        shards["w"].weights.copy_(torch.from_numpy(weights[step - 1]))
        average.update(step, steps)
    samples = [weights[step - 1] for step in range(1, steps + 1) if step % every == 0]
    if kind == "mean" and last:
        samples = samples[-last:]
    assert average.snapshots == len(samples)
    actual = shards["w"].values["average"].numpy()
    if not samples:
        assert not actual.any()
        return
    assert np.array_equal(actual, expected_average(samples, kind, decay))
    shares = [1.0 if kind == "mean" else decay**i for i in range(len(samples))]
    exact = sum(share * sample.astype(float) for share, sample in zip(shares, reversed(samples), strict=True))
    np.testing.assert_allclose(actual, exact / sum(shares), rtol=1e-5, atol=1e-5)


def test_an_exchange_and_back_changes_no_bit():
    """NaN, infinity, negative zero and subnormal values included, in tensors of several blocks."""
    weights = np.array([np.nan, np.inf, -0.0, 1e-45, 1.0, 2.0], np.float32)
    shards = shards_of(weights)
    add_averages(shards)
    shards["w"].values["average"].copy_(torch.arange(6.0))
    average = WeightAverage(AverageConfig(kind="mean"), shards)
    average.swap()
    assert shards["w"].weights.tolist() == list(range(6))
    average.swap()
    assert shards["w"].weights.numpy().tobytes() == weights.tobytes()
    assert shards["w"].values["average"].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("average.kind=mean average.last=5", r"average.last=5 snapshots, one in average.every=2 steps, take 10 steps"),
        ("average.kind=mean average.last=5", r"set average.last to at most 4"),
        ("average.kind=ema average.every=9", r"average.every=9 is more than train.steps=8"),
        ("average.kind=mean average.every=9", r"average.every=9 is more than train.steps=8"),
        ("average.evaluate=true", r"average.evaluate=true, but average.kind=off"),
        ("average.kind=ema average.decay=1", r"average.decay=1 must be at least 0 and below 1"),
    ],
)
def test_averages_that_a_run_cannot_have_are_refused(tmp_path, settings, message):
    file = tmp_path / "config.yaml"
    file.write_text("data: {path: shards}\ntrain: {steps: 8}\naverage: {every: 2, last: 4}\n")
    assert load_config(file, ["average.kind=mean"]).average.steps == 8
    with pytest.raises(UserError, match=message):
        load_config(file, settings.split())


@pytest.fixture(scope="module")
def run(settings) -> list[str]:
    # A large eps: Adam's update is then a smooth function of the gradient, as a comparison of layouts needs.
    arguments = (
        "train.steps=8 train.global_batch=4 checkpoint.every=1 checkpoint.keep=99 loops.distribution=poisson "
        "train.dtype=fp32 train.eval_every=2 optim.eps=1e-3 optim.warmup_steps=0 experts.bias_update_rate=0.01 "
        "average.kind=mean average.every=2 average.last=3 average.evaluate=true"
    )
    return [*settings, *arguments.split()]


@pytest.fixture(scope="module")
def averaged(run, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each layout."""
    folders = {}
    for name, (ranks, layout) in LAYOUTS.items():
        folders[name] = tmp_path_factory.mktemp("averaged")
        result = train(ranks, *run, *layout.split(), f"run.dir={folders[name]}", seconds=900)
        assert result.codes == [0] * ranks, result.tails
    return folders


def exact(run_dir: Path) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in lines(run_dir, "metrics.jsonl")]


def tensors_of(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    opened = Checkpoint(run_dir / "checkpoints" / f"step-{step:08d}")
    return {
        f"{kind}/{name}": opened.full_tensor(kind, name)
        for name, tensor in opened.manifest.tensors.items()
        for kind in tensor.kinds
    }


def samples_in(run_dir: Path, step: int) -> int:
    manifest = read_checkpoint_manifest(run_dir / "checkpoints" / f"step-{step:08d}")
    return manifest.optimizer.get("average_samples", 0)


def averages_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix("average/"): value for key, value in tensors.items() if key.startswith("average/")}


def weights_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters and buffers."""
    kinds = ("parameter/", "buffer/")
    return {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(kinds)}


@launches
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoints_average_is_that_of_the_sampled_weights(averaged, layout):
    """Samples at steps 2, 4, 6, 8; the last window of three begins at step 4, so the one before has one sample. Bit for
    bit, the router's bias included, at every layout."""
    states = {step: tensors_of(averaged[layout], step) for step in range(1, 9)}
    for step, sampled in {2: [2], 3: [2], 4: [4], 5: [4], 6: [4, 6], 7: [4, 6], 8: [4, 6, 8]}.items():
        averages = averages_of(states[step])
        weights = [weights_of(states[at]) for at in sampled]
        assert samples_in(averaged[layout], step) == len(sampled)
        assert averages.keys() == weights[0].keys() and "recurrent.block.ffn.router.bias" in averages
        for name, average in averages.items():
            expected = expected_average([each[name] for each in weights], "mean")
            assert np.array_equal(average, expected), (step, name)
    assert samples_in(averaged[layout], 1) == 0 and not any(map(np.any, averages_of(states[1]).values()))


@launches
@pytest.mark.timeout(2400)
def test_every_layout_has_the_same_averages_and_losses(averaged):
    """Up to the order of sums, against one rank."""
    expected = averages_of(tensors_of(averaged["one rank"], 8))
    evaluations = lines(averaged["one rank"], "eval.jsonl")
    assert [line.get("average_samples") for line in evaluations] == [None, 1, 1, 2, 3]
    for layout, folder in averaged.items():
        for name, average in averages_of(tensors_of(folder, 8)).items():
            np.testing.assert_allclose(average, expected[name], rtol=0, atol=1e-6, err_msg=f"{layout}: {name}")
        for line, reference in zip(lines(folder, "eval.jsonl"), evaluations, strict=True):
            assert line.keys() == reference.keys()
            for key in line.keys() & {"heldout_loss", "heldout_loss_average"}:
                assert line[key] == pytest.approx(reference[key], rel=1e-5), (layout, key)
    # One sample: the average is the weights of the same step.
    for line in evaluations[1:3]:
        assert line["heldout_loss_average"] == line["heldout_loss"]
    assert evaluations[-1]["heldout_loss_average"] != evaluations[-1]["heldout_loss"]


@launches
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("zero 3", ""),
        pytest.param("pipe 2", "", marks=pytest.mark.long),
        pytest.param("one rank", "train.dtype=bf16", marks=pytest.mark.long),
        pytest.param("tensor 2, expert 2, zero 2", "train.dtype=fp16", marks=pytest.mark.long),
        pytest.param("zero 3", "train.dtype=bf16", marks=pytest.mark.long),
    ],
)
def test_averages_and_their_evaluation_do_not_change_training(averaged, run, tmp_path, layout, more):
    """The lines of a run without them, bit for bit."""
    ranks, parallel = LAYOUTS[layout]
    folder = averaged[layout]
    if more:
        folder = tmp_path / "with"
        assert set(train(ranks, *run, *parallel.split(), *more.split(), f"run.dir={folder}").codes) == {0}
    off = [*parallel.split(), *more.split(), "average.kind=off", "average.evaluate=false"]
    assert set(train(ranks, *run, *off, f"run.dir={tmp_path / 'off'}").codes) == {0}
    assert exact(folder) == exact(tmp_path / "off")
    losses = [[line["heldout_loss"] for line in lines(each, "eval.jsonl")] for each in (folder, tmp_path / "off")]
    assert losses[0] == losses[1]
    assert not averages_of(tensors_of(tmp_path / "off", 8))


@launches
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("layout", ["zero 3", pytest.param("tensor 2, expert 2, zero 2", marks=pytest.mark.long)])
def test_a_killed_run_resumes_its_average_bit_for_bit(averaged, run, tmp_path, layout):
    """Killed between two samples of a window."""
    ranks, parallel = LAYOUTS[layout]
    arguments = [*run, *parallel.split(), f"run.dir={tmp_path}"]
    env = {"KILL_AFTER": str(tmp_path / "checkpoints" / "step-00000005" / "checkpoint.json")}
    assert train(ranks, *arguments, env=env).codes == [-signal.SIGKILL] * ranks
    resumed = train(ranks, *arguments)
    assert resumed.codes == [0] * ranks and "resuming from" in resumed.out, resumed.tails
    assert "average" not in resumed.err
    assert exact(tmp_path) == exact(averaged[layout])
    assert lines(tmp_path, "eval.jsonl") == lines(averaged[layout], "eval.jsonl")
    state, expected = tensors_of(tmp_path, 8), tensors_of(averaged[layout], 8)
    assert state.keys() == expected.keys() and all(np.array_equal(state[key], expected[key]) for key in state)


@launches
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_rollback_takes_the_average_back_with_the_weights(run, tmp_path, killed):
    """Batches 4, 5 and 6 are bad: steps 5 to 7 are trained again, and step 6 is sampled again. The average is of the
    checkpoints that are left, of Muon's weights, also where the run is killed during the rollback."""
    faults = ",".join(f"bad_batch@{batch}:0" for batch in (4, 5, 6))
    settings = f"average.kind=ema average.decay=0.75 optim.name=muon parallel.tensor=2 faults.inject={faults}"
    arguments = [*run, *settings.split(), f"run.dir={tmp_path}"]
    if killed:
        ended = launch(2, train_until_rolled_back, arguments)
        assert set(ended.codes) <= {-signal.SIGKILL, 4}, ended.tails
    result = train(2, *arguments, seconds=900)
    assert result.codes == [0, 0] and (killed or "to the checkpoint of step 4" in result.err), result.tails
    weights = [weights_of(tensors_of(tmp_path, step)) for step in (2, 4, 6, 8)]
    assert samples_in(tmp_path, 8) == 4
    for name, average in averages_of(tensors_of(tmp_path, 8)).items():
        expected = expected_average([each[name] for each in weights], "ema", 0.75)
        assert np.array_equal(average, expected), name


@launches
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("target", LAYOUTS)
def test_averages_move_to_another_layout_bit_for_bit(averaged, run, tmp_path, target):
    """From each layout to the next. Step 9 takes no sample, so its checkpoint has what was loaded."""
    source = averaged[list(LAYOUTS)[list(LAYOUTS).index(target) - 1]]
    ranks, parallel = LAYOUTS[target]
    shutil.copytree(source, tmp_path / "run")
    result = train(ranks, *run, *parallel.split(), f"run.dir={tmp_path / 'run'}", "train.steps=9")
    assert result.codes == [0] * ranks, result.tails
    before, after = tensors_of(source, 8), tensors_of(tmp_path / "run", 9)
    for name, average in averages_of(after).items():
        assert np.array_equal(average, before[f"average/{name}"]), name
    assert not np.array_equal(after["parameter/embed.weight"], before["parameter/embed.weight"])


@launches
@pytest.mark.timeout(2400)
def test_averaging_can_be_switched_on_off_and_changed(averaged, run, tmp_path):
    """Each start says so; the average then has the samples since that start."""
    folder = tmp_path / "run"
    shutil.copytree(averaged["one rank"], folder)
    arguments = [*run, f"run.dir={folder}", "average.evaluate=false"]
    off = train(1, *arguments, "train.steps=9", "average.kind=off")
    assert "average.kind=off: later checkpoints will not have the average of 3 snapshots" in off.err
    assert not averages_of(tensors_of(folder, 9))
    on = train(1, *arguments, "train.steps=12", "average.kind=ema", "average.decay=0.75")
    assert "the average of the weights begins now: the checkpoint of step 9 has none" in on.err
    states = {step: tensors_of(folder, step) for step in (10, 12)}
    for name, average in averages_of(states[12]).items():
        samples = [weights_of(states[step])[name] for step in (10, 12)]
        assert np.array_equal(average, expected_average(samples, "ema", 0.75)), name
    changed = train(1, *arguments, "train.steps=14", "average.kind=ema", "average.decay=0.5")
    assert "the average of the weights starts over: average.decay=0.5 (was 0.75)" in changed.err
    assert samples_in(folder, 13) == 0 and samples_in(folder, 14) == 1
    assert [result.codes for result in (off, on, changed)] == [[0]] * 3


@launches
@pytest.mark.timeout(2400)
def test_a_longer_run_never_averages_samples_from_before_its_window(averaged, run, tmp_path):
    """The last window of 10 steps has the samples 6, 8 and 10. The mean of 4, 6 and 8 cannot become that one, so the
    run says that it starts over. The last window of 14 steps begins at step 10, as if the run had had that length."""
    for steps, samples, warned in ((10, {9: 3, 10: 1}, True), (14, {9: 3, 10: 1, 12: 2, 14: 3}, False)):
        folder = tmp_path / str(steps)
        shutil.copytree(averaged["one rank"], folder)
        result = train(1, *run, f"run.dir={folder}", f"train.steps={steps}")
        assert result.codes == [0], result.tails
        assert {step: samples_in(folder, step) for step in samples} == samples
        assert ("the average of the weights starts over at its next snapshot" in result.err) == warned, result.err


@launches
@pytest.mark.timeout(2400)
def test_a_new_stage_begins_its_average_anew(averaged, run, tmp_path):
    """Also if everything else is carried over; its checkpoints have as many bytes as planned."""
    parent = averaged["one rank"] / "checkpoints" / "step-00000006"
    stage = [f"run.dir={tmp_path}", f"start_from={parent}", "start_from_state=everything"]
    result = train(1, *run, *stage)
    assert result.codes == [0] and "starts over: average of the weights" in result.out, result.tails
    assert [samples_in(tmp_path, step) for step in (1, 2)] == [0, 1]
    state = tensors_of(tmp_path, 2)
    assert all(np.array_equal(averages_of(state)[name], value) for name, value in weights_of(state).items())
    config = config_from(read_checkpoint_manifest(tmp_path / "checkpoints" / "step-00000002").config)
    parameters = [key.partition("/")[2] for key in state if key.startswith("parameter/")]
    sizes = [4 * math.prod(value.shape) for key, value in state.items() if key.partition("/")[2] in parameters]
    assert checkpoint_bytes(config) == sum(sizes)


@launches
@pytest.mark.timeout(2400)
def test_an_exported_average_is_what_was_evaluated(averaged, run, shards, tmp_path):
    """The export holds the average bit for bit; a run that starts from it evaluates it before step 1, and text is
    generated with it. The mean of the exports and checkpoints of the samples is the same up to fp32 rounding."""
    source, out = averaged["tensor 2, expert 2, zero 2"], tmp_path / "average"
    tools = REPOSITORY / "tools"
    exported = run_tool(tools / "export_checkpoint.py", source, "--average", "--out", out)
    assert exported.codes == [0] and "step 8, average of 3 snapshots" in exported.out, exported.err
    averages = averages_of(tensors_of(source, 8))
    model, config, step = load_model(out)
    trained = load_config(run[0], run[1:])
    assert (step, config.model, config.loops, config.act) == (8, trained.model, trained.loops, trained.act)
    assert {name: value.numpy().tobytes() for name, value in model.state_dict().items()} == {
        name: value.tobytes() for name, value in averages.items()
    }
    begin = [f"run.dir={tmp_path / 'run'}", f"start_from={out}", "average.kind=off", "average.evaluate=false"]
    assert train(1, *run, *begin, "train.steps=1").codes == [0]
    logged = lines(source, "eval.jsonl")[-1]["heldout_loss_average"]
    assert lines(tmp_path / "run", "eval.jsonl")[0]["heldout_loss"] == pytest.approx(logged, rel=1e-5)
    tokenizer = shards / read_shard_manifest(shards).tokenizer
    text = run_tool(tools / "generate.py", out, "--prompt", "The", "--max-new-tokens", 2, "--tokenizer", tokenizer)
    assert text.codes == [0] and text.out.startswith("[after 8 steps] The"), text.err

    weights = tmp_path / "weights"
    assert run_tool(tools / "export_checkpoint.py", source, "--out", weights, "--quiet").codes == [0]
    samples = [*(source / "checkpoints" / f"step-0000000{step}" for step in (4, 6)), weights]
    mean = run_tool(tools / "average_checkpoints.py", *samples, "--out", tmp_path / "mean")
    assert mean.codes == [0] and "mean of 3 checkpoints (steps 4, 6, 8)" in mean.out, mean.err
    states = [weights_of(tensors_of(source, step)) for step in (4, 6, 8)]
    for name, value in load_model(tmp_path / "mean")[0].state_dict().items():
        expected = np.mean([state[name] for state in states], axis=0, dtype=np.float64).astype(np.float32)
        assert np.array_equal(value.numpy(), expected), name
        np.testing.assert_allclose(value.numpy(), averages[name], rtol=1e-6, atol=1e-7)


def evaluate_averages(config: Config) -> list[float]:
    """On each rank: three steps, then the losses of the weights, of their average, and of the weights again."""
    from mythos_dist.config.deepspeed import deepspeed_config
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.engine import Engine

    def without_persistent_parameters(*arguments: Any) -> dict[str, Any]:
        settings = deepspeed_config(*arguments)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    mesh = build_mesh(config.parallel)
    with mock.patch("mythos_dist.train.engine.deepspeed_config", without_persistent_parameters):
        engine = Engine(config, mesh)
    for step, mine in zip((1, 2, 3), batches(config, mesh.data.rank, mesh.data.size), strict=False):
        engine.train_step(mine, step)
        engine.average.update(step, 3)
    passes = [(batch, torch.ones(len(batch.labels), dtype=torch.bool)) for batch in mine]
    evaluations = engine.evaluate, engine.evaluate_average, engine.evaluate, engine.evaluate_average
    return [evaluate(passes).loss for evaluate in evaluations]


@launches
def test_zero_3_evaluates_averages_of_parameters_that_a_pass_gathers(config):
    """DeepSpeed keeps small parameters unsharded; here none, as in a large model. Against one rank."""
    config = change(
        config,
        train=dict(dtype="fp32", global_batch=4, micro_batch=2),
        optim=dict(lr=1e-2, warmup_steps=0, eps=1e-3),
        average=dict(kind="mean", every=1, last=3),
    )
    (expected,) = run_ranks(1, evaluate_averages, config)
    weights, average, weights_again, average_again = expected
    assert weights_again == weights and average_again == average and abs(average - weights) > 1e-3 * weights
    for losses in run_ranks(2, evaluate_averages, change(config, parallel=dict(zero=3))):
        assert losses[2:] == losses[:2]
        assert losses == pytest.approx(expected, rel=1e-5)
