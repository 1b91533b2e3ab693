"""Manifests, damage, and which checkpoint a run resumes from; the folders are written here, without ranks."""

import importlib.metadata
import random
import shutil

import numpy as np
import pytest

import mythos_dist
from mythos_dist.checkpoint.manifest import (
    CheckpointManifest,
    FileEntry,
    TensorEntry,
    library_versions,
    read_checkpoint_manifest,
)
from mythos_dist.checkpoint.names import is_pinned
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.publish import prune, publish
from mythos_dist.checkpoint.reader import Checkpoint, checkpoints_of
from mythos_dist.checkpoint.save import is_due
from mythos_dist.checkpoint.tensor_file import write_tensors
from mythos_dist.config.schema import CheckpointConfig, Config, TrainConfig
from mythos_dist.errors import UserError

MATRIX = np.arange(60, dtype=np.float32).reshape(5, 12)


def make(folder, step=10, start=1) -> CheckpointManifest:
    """A checkpoint of one matrix: columns sharded over two ranks, the second shard split over two replicas by ZeRO."""
    temporary = folder / f"step-{step:08d}.tmp-{start}"
    temporary.mkdir(parents=True)
    values = {
        "rank-00000.safetensors": (Piece((5, 7), (0, 0), 0, 35), MATRIX[:, :7].reshape(-1)),
        "rank-00001.safetensors": (
            Piece((5, 7), (0, 7), 0, 17),
            np.pad(MATRIX[:, 7:], ((0, 0), (0, 2))).reshape(-1)[:17],
        ),
        "rank-00002.safetensors": (
            Piece((5, 7), (0, 7), 17, 35),
            np.pad(MATRIX[:, 7:], ((0, 0), (0, 2))).reshape(-1)[17:],
        ),
    }
    files = {}
    for name, (piece, elements) in values.items():
        size, digest = write_tensors(temporary / name, {"parameter/w": elements.shape}, [elements.data])
        files[name] = FileEntry(size, digest, {"w": piece})
    manifest = CheckpointManifest(
        step=step, tokens=step * 8, start=start, layout={"ranks": 3}, config={"model": {"dim": 12}}, data="d",
        versions={"torch": "2"}, optimizer={"steps": step, "skipped_steps": 0, "loss_scale": {}},
        tensors={"w": TensorEntry((5, 12), ("parameter",))}, files=files,
    )  # fmt: skip
    publish(temporary, manifest)
    return manifest


def test_a_manifest_round_trips(tmp_path):
    manifest = make(tmp_path)
    assert read_checkpoint_manifest(tmp_path / "step-00000010") == manifest
    assert manifest.num_parameters == 60
    assert (tmp_path / "latest").read_text() == "step-00000010\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]


def test_a_piece_is_read_from_all_files_that_hold_elements_of_it(tmp_path):
    make(tmp_path)
    checkpoint = Checkpoint(tmp_path / "step-00000010")
    assert np.array_equal(checkpoint.full_tensor("parameter", "w"), MATRIX)
    piece = Piece((3, 12), (1, 0), 5, 30)  # other rows, another range
    out = np.zeros(25, np.float32)
    checkpoint.read("parameter", "w", piece, out)
    assert np.array_equal(out, MATRIX[1:4].reshape(-1)[5:30])


def test_missing_tensors_and_elements_are_reported(tmp_path):
    make(tmp_path)
    checkpoint = Checkpoint(tmp_path / "step-00000010")
    with pytest.raises(UserError, match="holds no exp_avg w"):
        checkpoint.full_tensor("exp_avg", "w")
    del checkpoint.manifest.files["rank-00002.safetensors"]
    with pytest.raises(UserError, match=r"holds 48 of 60 elements"):
        Checkpoint(checkpoint.folder, checkpoint.manifest).full_tensor("parameter", "w")


def test_every_kind_of_damage_is_found_and_named(tmp_path):
    make(tmp_path)
    folder = tmp_path / "step-00000010"
    checkpoint = Checkpoint(folder)
    assert checkpoint.find_damage() == []
    file = folder / "rank-00001.safetensors"
    good = file.read_bytes()
    for bad, message in [
        (good[:-1], f"{len(good) - 1} bytes instead of {len(good)}"),
        (b"", f"0 bytes instead of {len(good)}"),
        (None, "is missing"),
        *((good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :], "its hash") for i in range(0, len(good), 7)),
    ]:
        file.unlink(missing_ok=True)
        if bad is not None:
            file.write_bytes(bad)
        (line,) = checkpoint.find_damage()
        assert str(file) in line and message in line
        assert bool(checkpoint.find_damage(hashes=False)) == ("hash" not in message)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path):
    make(tmp_path)
    file = tmp_path / "step-00000010" / "checkpoint.json"
    good = file.read_bytes()
    draw = random.Random(0)
    for position in [*draw.sample(range(len(good)), 200), 0, len(good) - 1]:
        file.write_bytes(good[:position] + bytes([good[position] ^ 1 << draw.randrange(8)]) + good[position + 1 :])
        with pytest.raises(UserError, match=r"checkpoint\.json: is damaged"):
            read_checkpoint_manifest(file.parent)
    for content in (b"", good[:-40], good + b"x"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint_manifest(file.parent)
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        read_checkpoint_manifest(file.parent)


def test_latest_comes_first_and_then_the_newest(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    (tmp_path / "step-00000040.tmp-1").mkdir()
    (tmp_path / "step-00000050").write_text("a file")

    def order() -> list[int]:
        return [int(path.name[5:]) for path in checkpoints_of(tmp_path)]

    assert order() == [30, 20, 10]
    (tmp_path / "latest").write_text("step-00000010\n")  # a user goes back
    assert order() == [10, 30, 20]
    for content in (
        b"step-00000099\n",
        b"",
        b"\xff\xfe",
        b"../..",
        b"../x/step-00000010",
        b"/step-00000010",
        b"s" * 5000,
    ):
        (tmp_path / "latest").write_bytes(content)
        assert order() == [30, 20, 10]
    (tmp_path / "latest").unlink()
    assert order() == [30, 20, 10]
    assert checkpoints_of(tmp_path / "absent") == []


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    make(tmp_path, start=1)
    assert read_checkpoint_manifest(tmp_path / "step-00000010").start == 1
    make(tmp_path, start=2)
    assert read_checkpoint_manifest(tmp_path / "step-00000010").start == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]


def test_pruning_keeps_the_newest_and_the_pinned_checkpoints(tmp_path):
    """And those of later steps: the run went back to an earlier step, and must not delete what it resumes from."""
    manifests = {step: make(tmp_path, step) for step in (5, 10, 15, 20, 25, 80, 30)}
    prune(tmp_path, manifests[30], 2, lambda step: is_pinned(step, (5,), 20))
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == [5, 20, 25, 30, 80]
    shutil.rmtree(tmp_path / "step-00000080")
    prune(tmp_path, manifests[30], 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000030"]


def test_checkpoints_are_due_at_intervals_pins_and_the_last_step():
    config = Config(train=TrainConfig(steps=50), checkpoint=CheckpointConfig(every=20, pin=(3,), pin_every=25))
    assert [step for step in range(1, 51) if is_due(step, config.train.steps, config.checkpoint)] == [3, 20, 25, 40, 50]
    assert [step for step in range(1, 51) if is_pinned(step, (3,), 25)] == [3, 25, 50]
    assert not is_pinned(10, (), 0)


def test_versions_do_not_require_the_package_to_be_installed(monkeypatch):
    """A checkout on PYTHONPATH has no metadata: the first checkpoint ended such a run."""

    def version(name: str) -> str:
        if name == "mythos_dist":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert library_versions()["mythos_dist"] == mythos_dist.__version__
