"""tools/average_checkpoints.py and export_checkpoint.py --average, on checkpoints of one matrix and one buffer."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_checkpoint import manifest
from safetensors.numpy import load_file

from mythos_dist.checkpoint.describe import inspect, summary_lines
from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import LocalShard
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.save import Saver
from mythos_dist.config.schema import CheckpointConfig
from mythos_dist.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch, capsys):
    """`tool(name, arguments…)` returns the tool's output; raises the UserError that it would print."""

    def run(name: str, *arguments: object) -> str:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def save(group, tmp_path):
    """`save(step, values, …)` saves the tensors `values`, by "kind/name", and returns the checkpoint's folder."""

    def save(step: int, values: dict[str, np.ndarray], samples: int = 0, **model: object) -> Path:
        shards: dict[str, LocalShard] = {}
        for key, value in values.items():
            kind, _, name = key.partition("/")
            shard = shards.setdefault(name, LocalShard(Piece.full(value.shape), value.shape, {}, writes=True))
            shard.values[kind] = torch.from_numpy(value.reshape(-1).copy())
        checkpoints = tmp_path / "run" / "checkpoints"
        saver = Saver(checkpoints, CheckpointConfig(background=False, keep=99), Fence(checkpoints.parent, 1), shards)
        one = replace(manifest(step), config={"model": model})
        if samples:
            one.optimizer["average_samples"] = samples
        saver.save(one)
        assert saver.finish()
        return checkpoints / f"step-{step:08d}"

    return save


def some_values(seed: int, shape: tuple[int, ...] = (5, 12)) -> dict[str, np.ndarray]:
    """Of very different sizes, so that sums in fp32 would be inexact."""
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.integers(-6, 6, shape)
    return {
        "parameter/prelude.0.w": (random.standard_normal(shape) * scale).astype(np.float32),
        "exp_avg/prelude.0.w": np.ones(shape, np.float32),
        "exp_avg_sq/prelude.0.w": np.ones(shape, np.float32),
        "buffer/router.bias": random.standard_normal(7).astype(np.float32),
    }


@pytest.mark.parametrize("weights", [[], [1, 2, 1], [0.1, 1e-3, 7]])
def test_the_mean_equals_numpys(save, tool, tmp_path, weights):
    """In float64 and rounded once, bit for bit; the buffer, too. The step is that of the newest checkpoint."""
    values = [some_values(seed) for seed in range(3)]
    folders = [save(step, one) for step, one in zip((4, 9, 6), values, strict=True)]
    options = ["--weights", *weights] if weights else []
    output = tool("average_checkpoints", *folders, "--out", tmp_path / "mean", *options)
    assert "mean of 3 checkpoints (steps 4, 9, 6): 60 parameters" in output
    stored = load_file(tmp_path / "mean" / "model.safetensors")
    assert sorted(stored) == ["prelude.0.w", "router.bias"]
    shares = weights or [1, 1, 1]
    for key in ("parameter/prelude.0.w", "buffer/router.bias"):
        total = np.zeros(values[0][key].shape)
        for one, share in zip(values, shares, strict=True):
            total += one[key].astype(np.float64) * share
        expected = (total / sum(map(float, shares))).astype(np.float32)
        assert np.array_equal(stored[key.partition("/")[2]], expected)


def test_the_mean_of_a_tensor_of_many_blocks_equals_numpys(save, tool, tmp_path, monkeypatch):
    monkeypatch.setattr("mythos_dist.checkpoint.averaged._BLOCK_ELEMENTS", 7)
    values = [some_values(seed) for seed in range(2)]
    folders = [save(step, one) for step, one in enumerate(values, 1)]
    tool("average_checkpoints", *folders, "--out", tmp_path / "mean", "--quiet")
    key = "parameter/prelude.0.w"
    expected = np.mean([one[key] for one in values], axis=0, dtype=np.float64).astype(np.float32)
    assert np.array_equal(load_file(tmp_path / "mean" / "model.safetensors")["prelude.0.w"], expected)


def test_export_writes_the_average_of_a_checkpoint(save, tool, tmp_path):
    """The average of parameters and buffers under their names, instead of the weights."""
    averages = {"average/prelude.0.w": np.full((5, 12), 3, np.float32), "average/router.bias": np.ones(7, np.float32)}
    folder = save(4, some_values(0) | averages, samples=2)
    assert "step 4, average of 2 snapshots: 60" in tool(
        "export_checkpoint", folder, "--average", "--out", tmp_path / "average"
    )
    tool("export_checkpoint", folder, "--out", tmp_path / "weights", "--quiet")
    stored = {name: load_file(tmp_path / name / "model.safetensors") for name in ("average", "weights")}
    for name in ("prelude.0.w", "router.bias"):
        assert np.array_equal(stored["average"][name], averages[f"average/{name}"])
    assert np.array_equal(stored["weights"]["prelude.0.w"], some_values(0)["parameter/prelude.0.w"])
    described = "\n".join(summary_lines(inspect(folder)[1]))
    assert "60; weights and the optimizer's moments; average of 2 snapshots of the weights" in described
    without = save(5, some_values(0))
    with pytest.raises(UserError, match=r"has no average of the weights: its run had average\.kind=off"):
        tool("export_checkpoint", without, "--average", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_other_models_are_refused_with_all_their_widths(save, tool, tmp_path):
    """By name with both values, of every other model; without settings, by the tensors."""
    first = save(1, some_values(0), dim=32, n_heads=4, lora_rank=4)
    second = save(2, some_values(0, (6, 12)), dim=48, n_heads=4, lora_rank=2)
    third = save(3, some_values(0, (7, 12)), dim=64, n_heads=4, lora_rank=4)
    with pytest.raises(UserError) as error:
        tool("average_checkpoints", first, second, third, "--out", tmp_path / "mean")
    for message in (
        f"model.dim=32 in {first}, but 48 in {second}",
        f"model.lora_rank=4 in {first}, but 2 in {second}",
        f"model.dim=32 in {first}, but 64 in {third}",
    ):
        assert message in str(error.value)
    assert "n_heads" not in str(error.value)
    unnamed = save(4, some_values(0, (6, 12)))
    with pytest.raises(UserError, match=r"does not fit .*: other or missing 1 tensor: prelude\.0\.w"):
        tool("average_checkpoints", first, unnamed, "--out", tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_damaged_checkpoint_is_named_and_nothing_is_written(save, tool, tmp_path):
    """Whichever of them it is."""
    folders = [save(step, some_values(step)) for step in (1, 2, 3)]
    file = folders[0] / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        tool("average_checkpoints", *folders, "--out", tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_wrong_arguments_of_an_average_are_refused(save, tool, tmp_path):
    one, two = save(1, some_values(1)), save(2, some_values(2))
    out = ["--out", tmp_path / "mean"]
    for arguments, message in (
        ([one, *out], "give two or more"),
        ([one, two, *out, "--weights", "1"], "1 weight for 2 checkpoints"),
        ([one, two, *out, "--weights", "0", "x"], r"--weights 0: expected a number(.|\n)*--weights x: expected"),
        ([one, two, *out, "--weights", "nan", "inf"], r"--weights nan: expected(.|\n)*--weights inf: expected"),
        ([one, tmp_path / "absent", *out], "no such folder"),
        ([one, two, "--out", one / "mean"], "is inside"),
        ([one, two, "--out", one.parent / "mean"], "is inside"),
        ([one, two, "--out", tmp_path], "exists"),
    ):
        with pytest.raises(UserError, match=message):
            tool("average_checkpoints", *arguments)
    assert not (tmp_path / "mean").exists()
