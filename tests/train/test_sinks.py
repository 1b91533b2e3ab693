"""Metrics in TensorBoard and Weights & Biases, read back with TensorBoard's reader and wandb's own messages."""

import dataclasses
import json
import logging
import struct
from pathlib import Path

import pytest
from helpers.launch import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mythos_dist.config.schema import RunConfig
from mythos_dist.errors import UserError
from mythos_dist.files import read_json_lines
from mythos_dist.train import sinks
from mythos_dist.train.checks import check_sinks
from mythos_dist.train.metrics import Metrics


def scalars_of(run_dir: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: tag -> step -> value."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def wandb_records(file: Path):
    """The records of an offline run: LevelDB's log format after a header of 7 bytes, one message each."""
    from wandb.proto import wandb_internal_pb2

    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


@pytest.mark.launch
def test_a_resumed_run_is_one_run_in_wandb_and_tensorboard(settings, tmp_path):
    """Without a network, and with the default wandb=offline: each step has the values of metrics.jsonl, once."""
    run_dir, sink = tmp_path / "run", ["run.tensorboard=true", "run.group=study", "run.tags=[small,first]"]
    for steps, place in ((4, run_dir), (6, tmp_path / "moved")):
        if place != run_dir:
            run_dir = run_dir.rename(place)
        options = [*settings, *sink, f"run.dir={run_dir}", f"train.steps={steps}", "run.wandb=offline"]
        result = train(1, *options, env={"WANDB_BASE_URL": "http://127.0.0.1:9"})
        assert result.codes == [0], result.err
    lines, shown = read_json_lines(run_dir / "metrics.jsonl"), scalars_of(run_dir)
    for name in ("loss", "lr", "tokens_per_second", "skipped"):
        assert shown[name] == pytest.approx({line["step"]: float(line[name]) for line in lines}, rel=1e-6)
    evaluations = {line["step"]: line["heldout_loss"] for line in read_json_lines(run_dir / "eval.jsonl")}
    assert shown["heldout_loss"] == pytest.approx(evaluations, rel=1e-6)
    assert shown["planned/memory_gb"].keys() == {line["step"] for line in lines if "planned" in line}

    losses, ids = {}, set()
    for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in wandb_records(file):
            if record.HasField("run") and record.run.run_id:
                ids.add((record.run.run_id, record.run.project, record.run.run_group, tuple(record.run.tags)))
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if "loss" in items:
                step = json.loads(items["_step"]) if "_step" in items else record.history.step.num
                losses[step] = json.loads(items["loss"])
    assert ids == {((run_dir / "wandb_id").read_text().strip(), "mythos_dist", "study", ("small", "first"))}
    assert losses == {line["step"]: line["loss"] for line in lines}


@pytest.fixture
def config(config, tmp_path):
    run = RunConfig(dir=str(tmp_path), wandb="disabled", tensorboard=True)
    return dataclasses.replace(config, run=run)


def test_steps_after_a_rollback_replace_the_earlier_ones_in_tensorboard(config, tmp_path):
    metrics = Metrics(config, tmp_path, 0)
    for step in range(1, 6):
        metrics._write("metrics.jsonl", {"step": step, "loss": float(step), "depth": {"act_mass": [0.5, 0.5]}})
    metrics.rewind(2)
    for step in (3, 4):
        metrics._write("metrics.jsonl", {"step": step, "loss": 10.0 * step})
    metrics.close()
    assert scalars_of(tmp_path) == {"loss": {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}}


class Broken(sinks.Sink):
    """Fails at its second line."""

    def __init__(self, *_):
        self.lines = 0

    def log(self, step, values):
        self.lines += 1
        if self.lines == 2:
            raise OSError(28, "No space left on device")


def test_a_sink_that_fails_gets_one_warning_and_the_others_everything(config, tmp_path, monkeypatch, caplog):
    """Whether it fails when it is opened, or later."""

    class Unopened(sinks.Sink):
        def __init__(self, *_):
            raise RuntimeError("https://user:password@server refused")

    broken = {"first": (lambda config: True, Unopened), "second": (lambda config: True, Broken)}
    monkeypatch.setattr(sinks, "_SINKS", broken | sinks._SINKS)
    with caplog.at_level(logging.WARNING):
        metrics = Metrics(config, tmp_path, 0)
        for step in range(1, 5):
            metrics._write("metrics.jsonl", {"step": step, "loss": 1.0})
        metrics.fsync()
        metrics.close()
    warnings = [record.getMessage().partition(" ")[0] for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["first", "second"] and "password" not in caplog.text
    assert [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert list(scalars_of(tmp_path)["loss"]) == [1, 2, 3, 4]


def test_a_missing_package_is_named_before_the_run_begins(config, monkeypatch):
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tensorboard, which is not installed: pip install"):
        check_sinks(config)
