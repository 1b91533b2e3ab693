"""What a run removes and what it keeps, and disk failures at every point of publishing a checkpoint."""

import errno
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from helpers.small_checkpoint import VALUES, manifest, names

import mythos_dist.files
from mythos_dist.checkpoint.manifest import Ancestor, Lineage, read_checkpoint_manifest
from mythos_dist.checkpoint.reader import Checkpoint, checkpoints_of
from mythos_dist.checkpoint.restore import find_checkpoint
from mythos_dist.config.schema import MythosConfig
from mythos_dist.errors import UserError

USER_NAMES = """
step-00000002.bak step-00000002.old step-00000002.12 step-00000002.tmp step-00000002.tmp-x step-00000002.tmp-1.bak
step-00000002.replaced-by-you step-00000002.tmp-1-mine step-0000002.tmp-1 step-best-one step-best.tmp-1 step-0000000²
latest.bak latest.tmp latest.tmp-1x
""".split()


def copy(checkpoint: Path, name: str) -> Path:
    return Path(shutil.copytree(checkpoint, checkpoint.with_name(name)))


def test_copies_that_a_user_keeps_beside_the_checkpoints_are_kept(run):
    """After later starts and saves, and after the original checkpoint was deleted."""
    run.save(2)
    for name in USER_NAMES:
        copy(run.checkpoints / "step-00000002", name)
    for step, start in ((4, 2), (6, 3)):
        assert run.save(step, start, keep=1)
    assert names(run.checkpoints) == sorted([*USER_NAMES, "latest", "step-00000006"])
    for name in USER_NAMES:
        assert len(names(run.checkpoints / name)) == 2
    assert [path.name for path in checkpoints_of(run.checkpoints)] == ["step-00000006"]
    (run.checkpoints / "latest").unlink()
    checkpoint, damaged = find_checkpoint(run.checkpoints)
    assert checkpoint and checkpoint.manifest.step == 6 and damaged == []


def test_unfinished_folders_of_earlier_starts_are_removed_and_those_of_later_starts_kept(run):
    run.save(2)
    for name in ("step-00000004.tmp-1", "step-00000004.tmp-3", "step-00000004.tmp-0-0123abcd"):
        copy(run.checkpoints / "step-00000002", name)
    (run.checkpoints / "latest.tmp-1").write_text("step-0")
    run.saver(start=2)
    assert names(run.checkpoints) == ["latest", "step-00000002", "step-00000004.tmp-3"]


def test_an_unfinished_folder_with_a_user_file_is_kept(run, caplog):
    run.save(2)
    left = copy(run.checkpoints / "step-00000002", "step-00000004.tmp-1")
    (left / "notes.txt").write_text("mine")
    (run.checkpoints / "step-00000006.tmp-1").symlink_to(run.checkpoints / "step-00000002")
    run.saver(start=2)
    assert names(left) == ["checkpoint.json", "notes.txt", "rank-00000.safetensors"]
    assert "notes.txt" in caplog.text
    assert names(run.checkpoints / "step-00000006.tmp-1") == ["checkpoint.json", "rank-00000.safetensors"]


def test_keep_deletes_only_what_this_run_wrote(run, tmp_path, caplog):
    """A checkpoint with a user file, a link to a checkpoint, another run's, an empty folder and a newer format stay,
    and do not count towards `keep`."""
    for step in (2, 4, 6):
        run.save(step, keep=9)
    run.save(8, keep=9, seed=1)
    shutil.move(run.checkpoints / "step-00000008", tmp_path)
    shutil.copytree(tmp_path / "step-00000008", run.checkpoints / "step-00000008")  # of another run
    linked = tmp_path / "linked"
    (run.checkpoints / "step-00000004").rename(linked)
    (run.checkpoints / "step-00000004").symlink_to(linked)
    (run.checkpoints / "step-00000006" / "notes.txt").write_text("mine")
    (run.checkpoints / "step-00000010").mkdir()
    newer = copy(run.checkpoints / "step-00000002", "step-00000001")
    file = newer / "checkpoint.json"
    newer_manifest = replace(read_checkpoint_manifest(run.checkpoints / "step-00000002"), format_version=3)
    file.write_text(newer_manifest.to_text())
    run.save(12, start=2, keep=1)
    run.save(14, start=2, keep=1)
    assert names(run.checkpoints) == ["latest", *(f"step-{step:08d}" for step in (1, 4, 6, 8, 10, 14))]
    assert names(linked) == ["checkpoint.json", "rank-00000.safetensors"]
    for reason in ("notes.txt", "it is a link or a file", "another run.seed", "it is empty", "its format is that"):
        assert reason in caplog.text
    caplog.clear()
    run.save(16, start=2, keep=1)
    assert not caplog.text, "it warns once"


def test_keep_removes_checkpoints_of_earlier_stages_and_of_no_other_run(run, caplog):
    """Stages of one run differ in any setting but the widths; where the newest stage began is recorded."""

    def save(start: int, step: int, stage: str, begin: int = 0, dim: int = 256, parents: tuple = ()) -> None:
        config = {
            "model": asdict(MythosConfig()) | {"dim": dim},
            "run": {"stage": stage, "stage_begin": begin},
            "optim": {"lr": begin + 1.0},
        }
        saver = run.saver(start, keep=9 if step < 8 else 1)
        saver.save(replace(manifest(step, start), config=config, lineage=Lineage(parents)))
        assert saver.finish()

    save(1, 2, "a")
    save(1, 3, "other widths", dim=32)
    save(1, 4, "a")
    save(1, 5, "other lineage", parents=(Ancestor("p", 1, 8, "weights", {}),))
    save(1, 6, "too late")
    shutil.copytree(run.checkpoints, run.checkpoints.with_name("copy"))
    shutil.rmtree(run.checkpoints)  # what this process has published it may remove
    shutil.copytree(run.checkpoints.with_name("copy"), run.checkpoints)
    save(2, 8, "b", begin=4)
    assert names(run.checkpoints) == ["latest", *(f"step-{step:08d}" for step in (3, 5, 6, 8))]
    for stage in ("other widths", "other lineage", "too late"):
        assert f"it is of stage {stage} of another run" in caplog.text


@pytest.mark.parametrize("what", ["file", "link", "dangling link", "foreign file", "another run", "empty folder"])
def test_anything_in_the_place_of_the_next_checkpoint_is_renamed(run, tmp_path, what):
    """It used to be overwritten, or saving failed forever."""
    run.save(2)
    taken = run.checkpoints / "step-00000004"
    if what == "file":
        taken.write_text("mine")
    elif what.endswith("link"):
        taken.symlink_to(run.checkpoints / "step-00000002" if what == "link" else tmp_path / "nowhere")
    elif what == "another run":
        run.save(4, seed=3)
        shutil.move(taken, tmp_path)
        shutil.copytree(tmp_path / taken.name, taken)
    else:
        taken.mkdir()
        if what == "foreign file":
            (taken / "notes.txt").write_text("mine")
    assert run.save(4, start=2)
    assert names(run.checkpoints) == ["latest", "step-00000002", "step-00000004", "step-00000004.kept"]
    assert Checkpoint(taken).manifest.start == 2
    kept = run.checkpoints / "step-00000004.kept"
    assert kept.is_symlink() == what.endswith("link")
    run.save(6, start=3, keep=1)
    assert os.path.lexists(kept)


SAVING = "fsync fsync fsync rename rename fsync fsync replace fsync".split()  # of a step that was saved before


class Disk:
    """Counts fsyncs and renames, and fails at one of them."""

    def __init__(self, monkeypatch, fail_at: int, code: int):
        self.calls: list[str] = []
        self.fail_at, self.code = fail_at, code
        for module, name in ((os, "fsync"), (os, "rename"), (os, "replace")):
            monkeypatch.setattr(module, name, self.wrapped(name, getattr(module, name)))
        monkeypatch.setattr(Path, "rename", lambda path, to: (os.rename(path, to), Path(to))[1])
        monkeypatch.setattr(Path, "replace", lambda path, to: (os.replace(path, to), Path(to))[1])

    def wrapped(self, name, call):
        def run(*arguments):
            self.calls.append(name)
            if len(self.calls) == self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            return call(*arguments)

        return run


def intact(folder: Path) -> dict[int, int]:
    """Step -> start of each checkpoint, after a check of all bytes."""
    start_of_step = {}
    for path in checkpoints_of(folder):
        checkpoint = Checkpoint(path)
        assert checkpoint.find_damage() == []
        assert np.array_equal(checkpoint.full_tensor("exp_avg", "w").reshape(-1), VALUES)
        start_of_step[checkpoint.manifest.step] = checkpoint.manifest.start
    return start_of_step


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_failing_fsync_or_rename_at_any_point_loses_no_checkpoint(run, code):
    """While a checkpoint replaces one of the same step; checked before and after the next start cleans up."""
    for at in range(1, 40):
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        run.save(2, start=1)
        run.save(4, start=1)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, code)
            saved = run.save(4, start=2, keep=1)
        assert saved == (at > len(SAVING)), f"failure {at}, {disk.calls}"  # after that, old ones are removed
        before = intact(run.checkpoints)
        run.saver(start=3)
        now = intact(run.checkpoints)
        assert now in ({2: 1, 4: 1}, {2: 1, 4: 2}, {4: 2}), f"failure {at}: {before}, {now}"
        assert now.get(4) == 2 if saved else 2 in now
        assert len(names(run.checkpoints)) == len(now) + 1, names(run.checkpoints)
        if len(disk.calls) < at:
            assert now == {4: 2}
            return
    raise AssertionError(f"no save had fewer calls: {disk.calls}")


def test_files_are_on_disk_before_they_get_their_final_names(run, monkeypatch):
    """fsync of the files and their folder, then the rename, then fsync of the parent folder; the same for `latest`."""
    events = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name_of(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    run.save(2)
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(name_of(handle)), fsync(handle)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append(f"-> {to.name}"), rename(path, to), to)[2])
    monkeypatch.setattr(os, "replace", lambda path, to: (events.append(f"-> {to.name}"), replace(path, to)))
    run.save(4)
    assert events == [
        "rank-00000.safetensors",
        "checkpoint.json",
        "step-00000004.tmp-1",
        "-> step-00000004",
        "checkpoints",
        "latest.tmp-1",
        "-> latest",
        "checkpoints",
    ]


def test_unsupported_fsync_of_folders_is_ignored_and_a_disk_failure_is_not(tmp_path, monkeypatch):
    for code, fails in ((errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True), (errno.ENOSPC, True)):

        def fsync(handle, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)
        if fails:
            with pytest.raises(OSError, match=os.strerror(code)):
                mythos_dist.files.fsync_folder(tmp_path)
        else:
            mythos_dist.files.fsync_folder(tmp_path)


def test_an_unwritable_checkpoints_folder_is_a_user_error(run):
    run.checkpoints.parent.mkdir()
    run.checkpoints.write_text("a file")
    with pytest.raises(UserError, match="checkpoints: cannot be written"):
        run.saver()
