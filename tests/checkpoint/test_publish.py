"""What a run removes and what it leaves alone, and failures of the disk at every point of a publication."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.small_checkpoint import VALUES, names

import mythos_dist.files
from mythos_dist.checkpoint.manifest import read_checkpoint_manifest
from mythos_dist.checkpoint.reader import Checkpoint, checkpoints_of
from mythos_dist.checkpoint.restore import find_checkpoint
from mythos_dist.errors import UserError

OF_THE_USER = """
step-00000002.bak step-00000002.old step-00000002.12 step-00000002.tmp step-00000002.tmp-x step-00000002.tmp-1.bak
step-00000002.replaced-by-you step-00000002.tmp-1-mine step-0000002.tmp-1 step-best-one step-best.tmp-1 step-0000000²
latest.bak latest.tmp latest.tmp-1x
""".split()


def copy(checkpoint: Path, name: str) -> Path:
    return Path(shutil.copytree(checkpoint, checkpoint.with_name(name)))


def test_copies_that_a_user_keeps_beside_the_checkpoints_stay(run):
    """Through later starts, saves, and the deletion of the checkpoint that they were made of."""
    run.save(2)
    for name in OF_THE_USER:
        copy(run.checkpoints / "step-00000002", name)
    for step, start in ((4, 2), (6, 3)):
        assert run.save(step, start, keep=1)
    assert names(run.checkpoints) == sorted([*OF_THE_USER, "latest", "step-00000006"])
    for name in OF_THE_USER:
        assert len(names(run.checkpoints / name)) == 2
    assert [path.name for path in checkpoints_of(run.checkpoints)] == ["step-00000006"]
    (run.checkpoints / "latest").unlink()
    checkpoint, damaged = find_checkpoint(run.checkpoints)
    assert checkpoint and checkpoint.manifest.step == 6 and damaged == []


def test_what_earlier_starts_left_unfinished_is_removed_and_nothing_of_a_later_start(run):
    run.save(2)
    for name in ("step-00000004.tmp-1", "step-00000004.tmp-3", "step-00000004.tmp-0-0123abcd"):
        copy(run.checkpoints / "step-00000002", name)
    (run.checkpoints / "latest.tmp-1").write_text("step-0")
    run.saver(start=2)
    assert names(run.checkpoints) == ["latest", "step-00000002", "step-00000004.tmp-3"]


def test_an_unfinished_folder_with_a_file_of_the_user_stays(run, caplog):
    run.save(2)
    left = copy(run.checkpoints / "step-00000002", "step-00000004.tmp-1")
    (left / "notes.txt").write_text("mine")
    (run.checkpoints / "step-00000006.tmp-1").symlink_to(run.checkpoints / "step-00000002")
    run.saver(start=2)
    assert names(left) == ["checkpoint.json", "notes.txt", "rank-00000.safetensors"]
    assert "notes.txt" in caplog.text
    assert names(run.checkpoints / "step-00000006.tmp-1") == ["checkpoint.json", "rank-00000.safetensors"]


def test_keep_deletes_only_what_this_run_wrote(run, tmp_path, caplog):
    """Not: a checkpoint with a file of the user, a link to one, another run's, an empty folder, one of a newer format;
    and none of them counts as one of those that are kept."""
    for step in (2, 4, 6):
        run.save(step, keep=9)
    run.save(8, keep=9, seed=1)
    shutil.move(run.checkpoints / "step-00000008", tmp_path)
    shutil.copytree(tmp_path / "step-00000008", run.checkpoints / "step-00000008")  # of another run
    elsewhere = tmp_path / "elsewhere"
    (run.checkpoints / "step-00000004").rename(elsewhere)
    (run.checkpoints / "step-00000004").symlink_to(elsewhere)
    (run.checkpoints / "step-00000006" / "notes.txt").write_text("mine")
    (run.checkpoints / "step-00000010").mkdir()
    newer = copy(run.checkpoints / "step-00000002", "step-00000001")
    file = newer / "checkpoint.json"
    manifest = read_checkpoint_manifest(run.checkpoints / "step-00000002")
    file.write_text(type(manifest)(**{**vars(manifest), "format_version": 2}).to_text())
    run.save(12, start=2, keep=1)
    run.save(14, start=2, keep=1)
    assert names(run.checkpoints) == ["latest", *(f"step-{step:08d}" for step in (1, 4, 6, 8, 10, 14))]
    assert names(elsewhere) == ["checkpoint.json", "rank-00000.safetensors"]
    for words in ("notes.txt", "it is a link or a file", "another run.seed", "it is empty", "its format is that"):
        assert words in caplog.text
    caplog.clear()
    run.save(16, start=2, keep=1)
    assert not caplog.text, "it warns once"


@pytest.mark.parametrize("what", ["file", "link", "dangling link", "foreign file", "another run", "empty folder"])
def test_what_has_the_name_of_the_next_checkpoint_gets_another_name(run, tmp_path, what):
    """It was overwritten, or saving failed for ever."""
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
    """Counts what reaches the disk, and fails at one of these calls."""

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


def whole(folder: Path) -> dict[int, int]:
    """Step -> start of each checkpoint whose every byte is right."""
    found = {}
    for path in checkpoints_of(folder):
        checkpoint = Checkpoint(path)
        assert checkpoint.find_damage() == []
        assert np.array_equal(checkpoint.full_tensor("exp_avg", "w").reshape(-1), VALUES)
        found[checkpoint.manifest.step] = checkpoint.manifest.start
    return found


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_failing_fsync_or_rename_at_any_point_loses_no_checkpoint(run, code):
    """Publication of a new step, and of one that replaces another: before and after the next start's cleaning up."""
    for at in range(1, 40):
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        run.save(2, start=1)
        run.save(4, start=1)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, code)
            saved = run.save(4, start=2, keep=1)
        assert saved == (at > len(SAVING)), f"failure {at}, {disk.calls}"  # behind that, old ones are removed
        before = whole(run.checkpoints)
        run.saver(start=3)
        now = whole(run.checkpoints)
        assert now in ({2: 1, 4: 1}, {2: 1, 4: 2}, {4: 2}), f"failure {at}: {before}, {now}"
        assert now.get(4) == 2 if saved else 2 in now
        assert len(names(run.checkpoints)) == len(now) + 1, names(run.checkpoints)
        if len(disk.calls) < at:
            assert now == {4: 2}
            return
    raise AssertionError(f"it never ends: {disk.calls}")


def test_all_is_on_disk_before_it_has_its_name(run, monkeypatch):
    """fsync of the files, of their folder, then the rename, then of the folder of names; the same for `latest`."""
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


def test_a_file_system_that_cannot_sync_folders_is_no_failure_and_a_broken_disk_is(tmp_path, monkeypatch):
    for code, fails in ((errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True), (errno.ENOSPC, True)):

        def fsync(handle, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)
        if fails:
            with pytest.raises(OSError, match=os.strerror(code)):
                mythos_dist.files.fsync_folder(tmp_path)
        else:
            mythos_dist.files.fsync_folder(tmp_path)


def test_a_place_where_no_checkpoints_can_be_written_is_the_users_mistake(run):
    run.checkpoints.parent.mkdir()
    run.checkpoints.write_text("a file")
    with pytest.raises(UserError, match="checkpoints: cannot be written"):
        run.saver()
