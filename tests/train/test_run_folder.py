"""Starts in run folders that are unusable, read-only, damaged, without checkpoints, or changed by another process."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers.disk import small_disk
from helpers.launch import launch, train, train_here

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import Lineage
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import remove_temporaries, write_atomically
from mythos_dist.train.restarts import PreviousStart, record_restart
from mythos_dist.train.resume import schedule_changes
from mythos_dist.train.run_folder import check_run_folder, claim_run_folder, refuse_to_start_over, start_logging
from mythos_dist.train.spikes import read_rollbacks

# Unusable folders


def with_run_dir(config: Config, run_dir: str | Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run_dir)))


def problems(config: Config, run_dir: str | Path) -> str:
    """The message with which `check_run_folder` refuses the folder."""
    with pytest.raises(UserError) as refused:
        check_run_folder(with_run_dir(config, run_dir))
    return str(refused.value)


def test_a_folder_that_cannot_be_created_is_refused_before_anything_is_written(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    expected = {
        "file": "is a file",
        "file/below/it": "below it|is below",
        "loop": "cycle",
        "loop/below": "cycle",
        "dangling": "a link to nowhere, which does not exist",
        "dangling/below": "a link to nowhere, which does not exist",
        "n" * 300: "too long",
        "nul\0": "control character",
        "/proc/1/fdinfo/run": "in|denied|not",
    }
    for name, pattern in expected.items():
        if not name.startswith("/proc"):
            text = problems(config, name)
            assert re.search(pattern, text) and "run.dir" in text, (name, text)
        if "\0" not in name:
            with pytest.raises(UserError):  # also for problems that the check cannot detect
                claim_run_folder(with_run_dir(config, name))
    assert sorted(os.listdir()) == before


def test_a_file_system_without_locks_is_refused(config, tmp_path, monkeypatch):
    """As Lustre without the option flock."""

    def flock(file, flags):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=r"Function not implemented.*-o flock"):
        claim_run_folder(with_run_dir(config, tmp_path / "run"))


def test_a_read_only_folder_is_refused(config, tmp_path):
    """A file system that is mounted read-only, which stops root too, and a folder without write permission."""
    with small_disk(tmp_path / "disk", 1000):
        (tmp_path / "disk" / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        for name in ("run", "new", "new/below"):
            assert "mounted read-only" in problems(config, tmp_path / "disk" / name)
            with pytest.raises(UserError, match="read-only"):
                claim_run_folder(with_run_dir(config, tmp_path / "disk" / name))
    (tmp_path / "theirs").mkdir(mode=0o555)
    for folder in [tmp_path, *tmp_path.parents[:3]]:
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        assert "permission denied" in problems(config, tmp_path / "theirs").lower()
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["checkpoints", "logs", "wandb"])
def test_a_file_where_the_run_needs_a_folder_is_named(config, tmp_path, name):
    (tmp_path / name).write_text("")
    assert f"{tmp_path / name} is not a folder" in problems(config, tmp_path)


@pytest.mark.parametrize(
    "name",
    "STOP metrics.jsonl eval.jsonl restarts.jsonl config.yaml COMPLETED writer.lock writer.json loops.png".split(),
)
def test_a_folder_where_the_run_writes_a_file_is_named(config, tmp_path, name):
    (tmp_path / name).mkdir()
    assert f"{tmp_path / name} is a folder" in problems(config, tmp_path)


def test_all_problems_of_a_folder_are_reported_at_once(config, tmp_path):
    (tmp_path / "STOP").mkdir()
    (tmp_path / "logs").write_text("")
    text = problems(config, tmp_path)
    assert "STOP" in text and "logs" in text


def test_a_log_file_that_cannot_be_opened_is_a_user_error(tmp_path):
    (tmp_path / "logs" / "rank-00000.log").mkdir(parents=True)
    with pytest.raises(UserError, match=r"rank-00000\.log cannot be written \(Is a directory\)"):
        start_logging(tmp_path, cast(Any, SimpleNamespace(rank=0, node="here")), 1)


@pytest.mark.launch
def test_an_unusable_folder_ends_a_start_with_exit_code_2_on_every_rank(settings, tmp_path):
    (tmp_path / "file").write_text("")
    result = train(2, *settings, f"run.dir={tmp_path / 'file' / 'run'}")
    assert result.codes == [2, 2] and "Traceback" not in "".join(result.tails), result.tails
    assert f"{tmp_path / 'file'} is a file" in result.err


# Atomic writes


def test_a_file_is_fsynced_before_it_gets_its_name(tmp_path, monkeypatch):
    """fsync of the content, rename, fsync of the folder; after a failure only the old file exists."""
    calls = []

    def record(name: str, function):
        def recorded(*arguments):
            where = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[0])
            calls.append((name, Path(where).name))
            return function(*arguments)

        monkeypatch.setattr(os, name, recorded)

    record("fsync", os.fsync)
    record("replace", os.replace)
    (tmp_path / "a.json").write_text("old")
    write_atomically(tmp_path / "a.json", "new")
    temporary = f"a.json.tmp-{os.getpid()}"
    assert calls == [("fsync", temporary), ("replace", temporary), ("fsync", tmp_path.name)]
    assert (tmp_path / "a.json").read_text() == "new"

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a.json", "newer")
    assert (tmp_path / "a.json").read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_only_temporary_files_of_the_run_are_removed(tmp_path):
    """They are selected by their exact names; files of users are kept."""
    ours = ["config.yaml.tmp-12", "metrics.jsonl.tmp-345"]
    theirs = ["config.yaml.tmp", "config.yaml.tmp-12b", "my-config.yaml.tmp-12", "notes.tmp-1", "config.yaml"]
    for name in ours + theirs:
        (tmp_path / name).write_text("")
    (tmp_path / "eval.jsonl.tmp-9").mkdir()
    remove_temporaries(tmp_path, ["config.yaml", "metrics.jsonl", "eval.jsonl"])
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "eval.jsonl.tmp-9"])


def test_a_damaged_config_file_is_reported_with_its_remedy(config, tmp_path):
    """Truncated anywhere, as older versions left it when they were killed, or not UTF-8. A complete file in another
    form, as a user may write it, is read."""
    file, complete = tmp_path / "config.yaml", dump_config(config)
    truncated = [complete[:size].encode() for size in range(0, len(complete) - 1, 7)]
    truncated += [complete[: complete.index(f"\n{name}:") + 1].encode() for name in ("train", "run", "faults")]
    for content in [*truncated, b"\xff\xfe\x00", b"\0" * 100]:
        file.write_bytes(content)
        text = problems(config, tmp_path)
        assert str(file) in text and "remove it, and the same command writes it again" in text, (content, text)
        assert file.read_bytes() == content
    file.write_text(complete)
    check_run_folder(with_run_dir(config, tmp_path))
    written = {"model": dataclasses.asdict(config.model), "train": {"dtype": "fp32", "seq_len": 32, "steps": 6}}
    written |= {"optim": dataclasses.asdict(config.optim), "data": {"path": config.data.path}}
    file.write_text(json.dumps(written | {"train": dataclasses.asdict(config.train)}))
    check_run_folder(with_run_dir(config, tmp_path))


@pytest.mark.parametrize(
    "content",
    ["", "[", "{}", "[1]", '[{"step": 1}]', '[{"step": 1, "to": 0, "batches": ["x"], "why": ""}]', "\0\0", "null"],
)
def test_a_damaged_rollbacks_file_is_reported_with_its_remedy(config, tmp_path, content):
    (tmp_path / "rollbacks.json").write_text(content)
    if content == "{}":  # an empty object means no rollbacks
        assert read_rollbacks(tmp_path) == []
        return
    text = problems(config, tmp_path)
    assert f"{tmp_path / 'rollbacks.json'} is damaged" in text and "remove it" in text


# Runs without their checkpoints


def run_without_checkpoints(tmp_path: Path, completed: bool, published: int | None, steps: int) -> Path:
    """The folder of a run with `steps` lines of metrics, whose checkpoint of step `published` is missing."""
    fence = Fence.take(tmp_path)
    fence.record_status("running", "", steps, published)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step + 1}}}\n' for step in range(steps)))
    if completed:
        (tmp_path / "COMPLETED").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("completed", "published", "steps", "parts"),
    [
        (True, None, 6, ["the marker COMPLETED", "drop the 6 steps", "remove COMPLETED and metrics.jsonl"]),
        (True, None, 0, ["the marker COMPLETED", "remove COMPLETED there"]),
        (False, 4, 5, ["has saved a checkpoint of step 4", "drop the 5 steps", "remove metrics.jsonl"]),
        (False, None, 5, None),  # killed before its first checkpoint
        (False, 4, 0, None),  # no metrics to lose
    ],
)
def test_a_run_whose_checkpoints_are_missing_does_not_start_over(tmp_path, completed, published, steps, parts):
    run_dir = run_without_checkpoints(tmp_path, completed, published, steps)
    if parts is None:
        refuse_to_start_over(run_dir)
        return
    with pytest.raises(UserError) as refused:
        refuse_to_start_over(run_dir)
    assert all(part in str(refused.value) for part in parts), refused.value
    Fence.take(run_dir)  # another start that saved nothing: still refused
    with pytest.raises(UserError):
        refuse_to_start_over(run_dir)
    (run_dir / "checkpoints" / "step-00000004").mkdir(parents=True)
    refuse_to_start_over(run_dir)


@pytest.mark.launch
def test_runs_that_had_checkpoints_are_refused_without_them_and_keep_their_files(settings, tmp_path):
    """A completed run, and one that was killed after its first checkpoint; no file changes."""
    done, killed = tmp_path / "done", tmp_path / "killed"
    assert train(1, *settings, f"run.dir={done}").codes == [0]
    stop = {"KILL_AFTER": str(killed / "checkpoints" / "step-00000004" / "checkpoint.json")}
    assert train(1, *settings, f"run.dir={killed}", "train.steps=1000", env=stop).codes == [-9]
    for run_dir in (done, killed):
        shutil.rmtree(run_dir / "checkpoints")
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        result = train(1, *settings, f"run.dir={run_dir}", *(["train.steps=1000"] if run_dir == killed else []))
        assert result.codes == [2] and "holds no checkpoint" in result.err, result.err
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


# A folder that changes between the search for a checkpoint and the lock


def start_beside_orphans(arguments: Sequence[str], source: str, run_dir: str, steps: Sequence[int]) -> None:
    """Train; between the search for a checkpoint and the lock, simulate ranks of an earlier start: publish the
    checkpoints `steps` of `source` and remove the others."""

    from mythos_dist.train import prepare

    claim = prepare.claim_run_folder

    def change_and_claim(config: Config):
        checkpoints = Path(run_dir, "checkpoints")
        shutil.rmtree(checkpoints)
        for step in steps:
            shutil.copytree(Path(source, "checkpoints", f"step-{step:08d}"), checkpoints / f"step-{step:08d}")
        (checkpoints / "latest").write_text(f"step-{max(steps):08d}\n")
        if 6 in steps:
            for name in ("metrics.jsonl", "eval.jsonl", "COMPLETED"):
                shutil.copy(Path(source, name), Path(run_dir, name))
        return claim(config)

    prepare.claim_run_folder = change_and_claim
    train_here(arguments)


@pytest.mark.launch
def test_a_start_searches_again_for_a_checkpoint_once_it_has_the_lock(settings, tmp_path):
    """Meanwhile, ranks that outlived a killed launcher complete the run: it is left as it is. Or they publish a newer
    checkpoint and remove the first one: the start resumes from the newer one."""
    complete = tmp_path / "complete"
    assert train(1, *settings, f"run.dir={complete}").codes == [0]
    lines = (complete / "metrics.jsonl").read_text().splitlines(keepends=True)
    for steps, message in (((4, 6), "is complete: 6 of 6 steps"), ((4,), "resuming after step 4")):
        run_dir = tmp_path / str(max(steps))
        shutil.copytree(complete, run_dir)
        (run_dir / "COMPLETED").unlink()
        for step in (4, 6):
            shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")
        (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
        (run_dir / "metrics.jsonl").write_text("".join(lines[:4]))
        arguments = [*settings, f"run.dir={run_dir}"]
        result = launch(1, start_beside_orphans, arguments, str(complete), str(run_dir), steps)
        assert result.codes == [0] and message in result.out, (result.out, result.tails)
        assert (run_dir / "COMPLETED").exists()
        losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert losses == [json.loads(line)["loss"] for line in lines]


# Changes of the schedule in a resumed run


def checkpoint_of(config: Config, step: int) -> Checkpoint:
    manifest = SimpleNamespace(step=step, config=dataclasses.asdict(config), lineage=Lineage())
    return cast(Checkpoint, SimpleNamespace(manifest=manifest))


def rate(step: int, steps: int) -> float:
    """tiny_cpu: lr 2e-3, 5 steps of warm-up, then a cosine to a tenth of it."""
    return 2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1, (step - 5) / (steps - 5)))) / 2)


@pytest.mark.parametrize(
    ("before", "now", "done", "step"),
    [
        (20, 40, 20, 21),  # completed, then raised: the cosine is at half of its steps again
        (40, 20, 10, 11),  # lowered during the run
        (20, 40, 1, 6),  # before the end of the warm-up: reported for the first step after it
        (20, 20, 20, None),
        (20, 20, 3, None),
    ],
)
def test_a_changed_number_of_steps_reports_the_changed_learning_rate(before, now, done, step):
    tiny = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
    old, new = (load_config(tiny, [f"train.steps={steps}"]) for steps in (before, now))
    messages = list(schedule_changes(new, checkpoint_of(old, done)))
    if step is None:
        assert messages == []
        return
    (text,) = messages
    assert f"train.steps={now}, and the checkpoint of step {done} was saved with {before}" in text
    assert f"the learning rate of step {step} is {rate(step, now):.2e} instead of {rate(step, before):.2e}" in text
    assert ("optim.schedule=wsd" in text) == (done == before), "only a rise after a decay has a remedy"


def test_a_wsd_run_may_become_longer_before_its_decay():
    tiny = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
    old, new = (load_config(tiny, [f"train.steps={steps}", "optim.schedule=wsd"]) for steps in (100, 200))
    assert list(schedule_changes(new, checkpoint_of(old, 89))) == []
    (late,) = schedule_changes(new, checkpoint_of(old, 96))
    assert "the learning rate of step 97 is 2.00e-03 instead of 7.40e-04 (9.20e-04 in step 96); this rise" in late


def test_a_schedule_that_an_earlier_version_did_not_have_is_named():
    """Settings that a checkpoint lacks are not compared; it was saved with a cosine."""
    tiny = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
    old, new = load_config(tiny), load_config(tiny, ["optim.schedule=constant"])
    (text,) = schedule_changes(new, checkpoint_of(old, 10))
    assert text.startswith("optim.schedule='constant', and the checkpoint of step 10 was saved with 'cosine'")


# The cost of a restart


@pytest.mark.parametrize(
    ("writer", "mtime", "lost", "idle"),
    [
        # Step 2 ended at time 1000, step 4 at 1010. The run stopped with a checkpoint of step 4 two days ago.
        (
            {"state": "stopped", "why": "stopped after step 4: rank 0 received SIGTERM", "time": 1012},
            1012,
            12 + 30,
            172_000,
        ),
        ({"state": "completed", "time": 1012}, 1012, 12 + 30, 172_000),
        ({"state": "completed", "time": 1012}, 90_000, 12 + 30, 172_000),  # the folder was copied a day later
        # Killed: the time of its last keepalive (mtime) counts.
        ({"state": "running", "time": 900}, 1020, 20 + 30, 171_992),
        # Started after the end of step 2 and killed before its first step: earlier time counts for another start.
        ({"state": "running", "time": 1008, "began": 1008}, 1009, 2 + 30, 172_002),
    ],
)
def test_time_in_which_nothing_ran_counts_as_idle_and_not_as_lost(tmp_path, monkeypatch, writer, mtime, lost, idle):
    """The startup took 30 s, and the line is written at 1,012 + 172,000 + 30."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "time": 1000}\n{"step": 4, "time": 1010}\nnonsense\n')
    (tmp_path / "writer.json").write_text(json.dumps({"start": 1, **writer}))
    os.utime(tmp_path / "writer.json", (mtime, mtime))
    previous = PreviousStart.read(tmp_path, 2)
    monkeypatch.setattr("time.time", lambda: 173_042.0)
    line = record_restart(previous, Fence.take(tmp_path), 2, {"import": 10.0, "rendezvous": 20.0})
    assert (line["seconds_lost"], line["seconds_idle"]) == (lost, idle)
    assert json.loads((tmp_path / "restarts.jsonl").read_text()) == line
    assert previous.last_step == 4


@pytest.mark.launch
def test_a_start_after_a_kill_after_the_last_checkpoint_prunes_checkpoints(settings, tmp_path):
    """It reports that the run is complete, and removes the checkpoints that the killed start would have removed."""
    arguments = [*settings, f"run.dir={tmp_path / 'run'}"]
    assert train(1, *arguments, "checkpoint.keep=3").codes == [0]
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000002.tmp-1")
    (tmp_path / "run" / "COMPLETED").unlink()
    done = train(1, *arguments, "checkpoint.keep=2")
    assert done.codes == [0] and "is complete: 6 of 6 steps" in done.out, done.tails
    assert (tmp_path / "run" / "COMPLETED").exists()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000004", "step-00000006"]
