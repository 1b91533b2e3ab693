"""Which checkpoint a run resumes from when its folder has odd names, links, unreadable files, or other writers."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from helpers.launch import run_ranks
from helpers.small_checkpoint import names

import mythos_dist.checkpoint.reader
from mythos_dist.checkpoint.manifest import read_checkpoint_manifest
from mythos_dist.checkpoint.reader import Checkpoint, checkpoints_of
from mythos_dist.checkpoint.restore import find_checkpoint, open_checkpoint
from mythos_dist.checkpoint.signature import VARIABLE
from mythos_dist.errors import UserError


def step_to_resume(checkpoints: Path) -> int | None:
    checkpoint, _ = find_checkpoint(checkpoints)
    return checkpoint and checkpoint.manifest.step


def test_folders_with_other_names_are_not_checkpoints(run):
    """`step-best-one` has eight characters after `step-`, as a checkpoint has."""
    run.save(2)
    folder = run.checkpoints / "step-00000002"
    others = "step-best-one step-0000000a step-+0000002 step-0000 002 step-000000002 step-2 xstep-00000009".split(" ")
    for name in [*others, "step-٠٠٠٠٠٠٠٩"]:
        shutil.copytree(folder, run.checkpoints / name)
    for latest in (
        None,
        "step-best-one",
        "xstep-00000009",
        "./step-00000002",
        str(folder),
        "../run/step-best-one",
    ):
        (run.checkpoints / "latest").unlink(missing_ok=True)
        if latest:
            (run.checkpoints / "latest").write_text(latest + "\n")
        assert [path.name for path in checkpoints_of(run.checkpoints)] == ["step-00000002"]
        assert step_to_resume(run.checkpoints) == 2
    assert run.save(4)


def test_latest_may_be_a_link_to_a_checkpoint(run):
    """As users create by hand; the next save replaces the link."""
    for step in (2, 4):
        run.save(step)
    (run.checkpoints / "latest").unlink()
    (run.checkpoints / "latest").symlink_to("step-00000002", target_is_directory=True)
    assert step_to_resume(run.checkpoints) == 2
    assert run.save(6) and (run.checkpoints / "latest").read_text() == "step-00000006\n"


def test_a_latest_that_cannot_be_replaced_is_an_error_before_training(run):
    run.save(2)
    (run.checkpoints / "latest").unlink()
    (run.checkpoints / "latest").mkdir()
    with pytest.raises(UserError, match="latest: is a folder"):
        find_checkpoint(run.checkpoints)


def test_steps_of_more_than_eight_digits_are_in_order(run):
    for step in (99_999_999, 100_000_000, 100_000_002):
        assert run.save(step, keep=2)
    assert [path.name for path in checkpoints_of(run.checkpoints)] == ["step-100000002", "step-100000000"]


def test_an_unreadable_checkpoints_folder_does_not_start_the_run_from_scratch(group, tmp_path, monkeypatch):
    file, link, locked = tmp_path / "file", tmp_path / "link", tmp_path / "locked"
    file.write_text("x")
    link.symlink_to(tmp_path / "unmounted")
    locked.mkdir()
    scandir = os.scandir

    def denied(path):
        if not isinstance(path, int) and Path(path) == locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(mythos_dist.checkpoint.reader.os, "scandir", denied)
    for path, message in (
        (file, "is not a folder|is a file"),
        (link, "not mounted"),
        (locked, "cannot be listed .Permission denied"),
    ):
        for find in (find_checkpoint, open_checkpoint):
            with pytest.raises(UserError, match=message):
                find(path)
    assert find_checkpoint(tmp_path / "absent") == (None, [])


def test_a_dangling_link_is_reported_and_the_next_checkpoint_is_loaded(run, tmp_path):
    run.save(2)
    (run.checkpoints / "step-00000004").symlink_to(tmp_path / "unmounted")
    (run.checkpoints / "latest").unlink()
    checkpoint, damaged = find_checkpoint(run.checkpoints)
    assert checkpoint and checkpoint.manifest.step == 2
    assert len(damaged) == 1 and "step-00000004" in damaged[0]


@pytest.mark.parametrize("moment", ["listed", "opened", "hashed"])
def test_a_checkpoint_that_another_process_removes_is_skipped(run, moment, monkeypatch):
    """At each point between listing and loading. It is not reported as damage."""
    for step in (2, 4):
        run.save(step)
    doomed = run.checkpoints / "step-00000004"

    def with_removal(function):
        def call(*arguments, **options):
            if moment == "listed":
                result = function(*arguments, **options)
            shutil.rmtree(doomed, ignore_errors=True)
            return result if moment == "listed" else function(*arguments, **options)

        return call

    name = {"listed": "checkpoints_of", "opened": "read_checkpoint_manifest", "hashed": "file_hash"}[moment]
    modules = {"listed": mythos_dist.checkpoint.restore, "hashed": mythos_dist.checkpoint.sources}
    module = modules.get(moment, mythos_dist.checkpoint.reader)
    monkeypatch.setattr(module, name, with_removal(getattr(module, name)))
    checkpoint, damaged = find_checkpoint(run.checkpoints)
    assert checkpoint and checkpoint.manifest.step == 2 and damaged == []
    with pytest.raises(UserError):
        Checkpoint(doomed)


def test_a_checkpoint_that_is_removed_while_it_is_read_is_an_error_with_its_path(run):
    run.save(2)
    checkpoint = Checkpoint(run.checkpoints / "step-00000002")
    shutil.rmtree(checkpoint.folder)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors: cannot be read"):
        checkpoint.full_tensor("parameter", "w")


def test_a_file_that_cannot_be_read_is_reported_as_damage(run, monkeypatch):
    for step in (2, 4):
        run.save(step)
    bad = run.checkpoints / "step-00000004" / "rank-00000.safetensors"
    real = mythos_dist.checkpoint.sources.file_hash

    def broken(file, sha256=None):
        if file == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, sha256)

    monkeypatch.setattr(mythos_dist.checkpoint.sources, "file_hash", broken)
    checkpoint, damaged = find_checkpoint(run.checkpoints)
    assert checkpoint and checkpoint.manifest.step == 2 and "Input/output error" in damaged[0]


def test_a_replaced_checkpoint_gets_its_name_back_if_publishing_was_killed(run):
    """Killed between the two renames, when neither checkpoint has the final name."""
    for step in (2, 4):
        run.save(step, keep=1)
    (run.checkpoints / "step-00000004").rename(run.checkpoints / "step-00000004.replaced-by-2")
    run.saver(start=3)
    assert names(run.checkpoints) == ["latest", "step-00000004"]
    assert read_checkpoint_manifest(run.checkpoints / "step-00000004").start == 1


def disagree(checkpoints: str, keys: list[str]) -> str:
    """On each rank, with its own key: the message of `find_checkpoint`."""
    import torch.distributed as dist

    os.environ[VARIABLE] = keys[dist.get_rank()]
    if not keys[dist.get_rank()]:
        del os.environ[VARIABLE]
    try:
        find_checkpoint(Path(checkpoints))
    except UserError as error:
        return str(error)
    return "found"


@pytest.mark.launch
def test_ranks_with_different_keys_all_exit_with_a_message(run, tmp_path):
    """None of them hangs in a collective."""
    run.save(2)
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text(f"{file.name} secret of at least sixteen bytes")
        file.chmod(0o600)
    one, other = map(str, files)
    for keys, message in (
        ([one, other], "ranks have different signing keys"),
        ([one, ""], r"ranks [1] have no signing key"),
        ([one, str(tmp_path)], "Is a directory"),
        ([one, one], "is not signed"),
    ):
        for output in run_ranks(2, disagree, str(run.checkpoints), keys, seconds=240):
            assert message in output
