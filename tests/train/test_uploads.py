"""What a run reports of its uploads, for a process that says what the test wants."""

import json

import pytest
import torch.distributed as dist
from helpers.run_folder import at
from helpers.small_run import SMALL, TINY

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.remote import read_state
from mythos_dist.config.load import load_config
from mythos_dist.parallel.launcher import RankInfo
from mythos_dist.train import uploads
from mythos_dist.train.session import Session
from mythos_dist.train.stop import StopHandler


class Process:
    """In place of `UploadProcess`."""

    def __init__(self, settings):
        self.settings, self.events, self.notified = settings, [], 0

    def notify(self) -> None:
        self.notified += 1

    def poll(self) -> list[dict]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        self.events = []


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that has published steps 2 and 4."""
    monkeypatch.setattr(uploads, "UploadProcess", Process)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in (2, 4):
        at(tmp_path, step).mkdir(parents=True)
        (at(tmp_path, step) / "checkpoint.json").touch()
    overrides = [*SMALL, f"run.dir={tmp_path}", "checkpoint.remote=s3://bucket/run", "checkpoint.remote_wait=1"]
    config = load_config(TINY, overrides)
    yield uploads.RunUploads(config, Session(RankInfo(), StopHandler()), Fence.take(tmp_path), "the-id")
    dist.destroy_process_group()


def report(run, *events: dict) -> bool:
    run._process.events = [*events]
    return run.poll()


def test_a_failure_is_one_warning_and_its_end_one_line(run, tmp_path, caplog, capsys):
    run.add(2)
    failed = {"event": "failed", "reason": "s3://bucket/run/x: cannot be written; access is denied"}
    for _ in range(3):
        assert not report(run, failed)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == (
        "checkpoint.remote: s3://bucket/run/x: cannot be written; access is denied; training continues, the upload is "
        "tried again; 2 checkpoints waiting"
    )
    assert run.take_entries() == {"upload_problem": failed["reason"]} and run.take_entries() == {}
    state = read_state(tmp_path)
    assert state and (state.run, state.waiting, state.problem) == ("the-id", [2, 4], failed["reason"])
    assert run.is_waiting(2) and run.is_waiting(4)
    assert report(run, {"event": "uploaded", "step": 4, "bytes": 7, "seconds": 0.5})
    assert "uploads to s3://bucket/run work again" in capsys.readouterr().out
    assert run.take_entries() == {"uploads": [{"step": 4, "bytes": 7, "seconds": 0.5}]}
    assert run.is_waiting(2) and not run.is_waiting(4)
    state = read_state(tmp_path)
    assert state and (state.uploaded, state.waiting, state.problem) == (4, [2], "")


def test_the_end_names_what_is_not_uploaded_and_why(run, caplog):
    report(run, {"event": "uploaded", "step": 4, "bytes": 7, "seconds": 0.5}, {"event": "failed", "reason": "full"})
    run.finish(stopped=False)
    assert "the checkpoint of step 2 was not uploaded to s3://bucket/run (full)" in caplog.text
    assert "the same command uploads them" in caplog.text


def test_a_run_that_was_superseded_keeps_nothing_for_it_and_does_not_wait(run, caplog):
    report(run, {"event": "superseded", "reason": "start 2 has taken over"})
    assert "this start uploads nothing more" in caplog.text and not run.is_waiting(2)
    run.finish(stopped=True)


def test_what_a_damaged_file_keeps_from_being_uploaded_is_reported(run, caplog):
    report(run, {"event": "damaged", "step": 2, "reason": "rank-00000.safetensors is not what its manifest says"})
    assert "the checkpoint of step 2 cannot be uploaded: rank-00000.safetensors is not" in caplog.text
    assert not run.is_waiting(2)


def test_the_settings_of_the_process_hold_no_credentials(run, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    text = run._process.settings.to_text()
    assert json.loads(text)["token"] and "hunter2" not in text
    assert type(run._process.settings).parse(text) == run._process.settings
