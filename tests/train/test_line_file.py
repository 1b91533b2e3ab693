"""Files of JSON lines stay correct after writes of an old start, kills, disk errors and edits."""

import json
from contextlib import nullcontext

import pytest

from mythos_dist.checkpoint.fence import Fence, newest_start
from mythos_dist.errors import UserError
from mythos_dist.files import write_atomically
from mythos_dist.train.line_file import LineFile


def steps(file) -> list[int]:
    return [json.loads(text)["step"] for text in file.read_text().splitlines()]


def opened(file, fence, last: int = -1) -> LineFile:
    line_file = LineFile(file, fence)
    line_file.rewind(lambda line: line["step"] <= last)
    return line_file


def test_an_old_start_appends_nothing(tmp_path):
    """It is suspended (SIGSTOP), a new start resumes after step 2, and then the old one continues."""
    file = tmp_path / "metrics.jsonl"
    old = opened(file, Fence.take(tmp_path))
    assert all(old.append({"step": step}) for step in (1, 2, 3))
    new = opened(file, Fence.take(tmp_path), last=2)
    assert new.append({"step": 3})
    assert not old.append({"step": 4})
    with pytest.raises(UserError, match="taken over by start 2"):
        opened(file, Fence(tmp_path, 1))
    assert new.append({"step": 4}) and steps(file) == [1, 2, 3, 4]


@pytest.mark.parametrize("lines_before", [0, 2])
def test_an_old_start_suspended_after_its_check_does_not_append_to_the_new_file(tmp_path, lines_before):
    """Suspended between check and write: it writes to a file that has been unlinked."""
    file, fence = tmp_path / "metrics.jsonl", Fence.take(tmp_path)
    old = opened(file, fence)
    for step in range(lines_before):
        old.append({"step": step})
    new = opened(file, Fence.take(tmp_path), last=lines_before - 1)
    old._guard = nullcontext
    old.append({"step": 8})
    new.append({"step": 9})
    assert steps(file) == [*range(lines_before), 9]


def test_a_file_that_an_old_start_has_replaced_is_restored(tmp_path):
    """It was suspended just before the rename of its copy: the newest start restores its file with its next line."""
    file = tmp_path / "metrics.jsonl"
    Fence.take(tmp_path)
    new = opened(file, Fence.take(tmp_path))
    new.append({"step": 1})
    write_atomically(file, '{"step": 77}\n')
    new.append({"step": 2})
    assert steps(file) == [1, 2]
    file.unlink()
    new.append({"step": 3})
    assert steps(file) == [1, 2, 3]


def test_a_fence_that_an_old_start_has_overwritten_is_restored(tmp_path):
    """writer.json of start 1 replaces that of start 2. Two starts with the same number are distinguished."""
    old, new = Fence.take(tmp_path), Fence.take(tmp_path)
    (tmp_path / "writer.json").write_text(old._content("failed", "", 3))
    new.check()
    assert newest_start(tmp_path)["start"] == 2
    (tmp_path / "writer.json").write_text(old._content("failed", "", 3))
    third = Fence.take(tmp_path)
    assert third.start == new.start
    with pytest.raises(UserError, match="taken over by start 2"):
        new.check()
    third.check()


def test_starts_are_still_counted_after_writer_json_is_damaged(tmp_path):
    (tmp_path / "restarts.jsonl").write_text('{"start": 2}\n{"start": 3}\n')
    for content in (b"", b"\xff\xfe", b'{"start": 3, "ho', b"[1]"):
        (tmp_path / "writer.json").write_bytes(content)
        assert Fence.take(tmp_path).start == 4


def test_a_start_waits_only_for_a_limited_time_for_the_guard(tmp_path, monkeypatch):
    """The process that holds it is suspended: the next start takes over, and the old one is refused afterwards."""
    monkeypatch.setattr("mythos_dist.checkpoint.fence._LOCK_TIMEOUT", 0.05)
    old = Fence.take(tmp_path)
    with old.guard():
        new = Fence.take(tmp_path)
        with new.guard():
            pass
    with pytest.raises(UserError, match="taken over"), old.guard():
        raise AssertionError("it must not write")


def test_broken_lines_are_removed_with_a_warning_and_a_truncated_last_line_without(tmp_path, caplog):
    """Bytes that are not UTF-8, lines without `step`, other JSON, and NULs as after a power failure."""
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.5}).encode() for step in (1, 2)]
    bad = [b"\xff\xfe\x80", b'{"loss": 3}', b"[1, 2]", b'{"step": "2"}', b"\0\0\0", b"[" * 5000]
    file.write_bytes(b"\n".join([good[0], *bad, good[1], b'{"step": 3, "lo']))

    def keep(line: dict) -> bool | None:
        return line["step"] <= 2 if isinstance(line.get("step"), int) else None

    line_file = LineFile(file)
    line_file.rewind(keep)
    assert file.read_bytes() == b"\n".join(good) + b"\n"
    assert "6 invalid lines were removed" in caplog.text
    line_file.append({"step": 3})
    caplog.clear()
    with file.open("ab") as stream:
        stream.write(b'{"step": 4, "lo')
    line_file.rewind(keep)
    assert steps(file) == [1, 2] and not caplog.records
