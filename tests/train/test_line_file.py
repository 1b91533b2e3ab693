"""Files of lines: what an old start of a run, a kill, a bad disk or an editor does to them."""

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
    found = LineFile(file, fence)
    found.rewind(lambda line: line["step"] <= last)
    return found


def test_an_old_start_appends_nothing(tmp_path):
    """It was stopped (SIGSTOP), another start resumed after step 2, and then it continues."""
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
def test_an_old_start_that_had_looked_already_appends_to_no_file_that_counts(tmp_path, lines_before):
    """Stopped between its look and its line: it writes, into a file that has no name any more or none of it."""
    file, fence = tmp_path / "metrics.jsonl", Fence.take(tmp_path)
    old = opened(file, fence)
    for step in range(lines_before):
        old.append({"step": step})
    new = opened(file, Fence.take(tmp_path), last=lines_before - 1)
    old._guard = nullcontext
    old.append({"step": 8})
    new.append({"step": 9})
    assert steps(file) == [*range(lines_before), 9]


def test_an_old_start_that_had_looked_already_replaces_nothing_for_long(tmp_path):
    """Stopped just before the rename of its own copy: the newest start's file comes back with its next line."""
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


def test_a_fence_that_an_old_start_has_overwritten_is_put_back(tmp_path):
    """writer.json of start 1 over that of start 2; and two starts of one number are two."""
    old, new = Fence.take(tmp_path), Fence.take(tmp_path)
    old._write("failed", "", 3)
    new.check()
    assert newest_start(tmp_path)["start"] == 2
    old._write("failed", "", 3)
    third = Fence.take(tmp_path)
    assert third.start == new.start
    with pytest.raises(UserError, match="taken over by start 2"):
        new.check()
    third.check()


def test_a_lost_writer_json_does_not_begin_to_count_anew(tmp_path):
    (tmp_path / "restarts.jsonl").write_text('{"start": 2}\n{"start": 3}\n')
    for content in (b"", b"\xff\xfe", b'{"start": 3, "ho', b"[1]"):
        (tmp_path / "writer.json").write_bytes(content)
        assert Fence.take(tmp_path).start == 4


def test_a_process_that_holds_the_guard_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """It was stopped there; the next start takes over, and the old one is refused when it goes on."""
    monkeypatch.setattr("mythos_dist.checkpoint.fence._LOCK_TIMEOUT", 0.05)
    old = Fence.take(tmp_path)
    with old.guard():
        new = Fence.take(tmp_path)
        with new.guard():
            pass
    with pytest.raises(UserError, match="taken over"), old.guard():
        raise AssertionError("it may not write")


def test_broken_lines_are_left_out_with_a_warning_and_a_torn_end_without(tmp_path, caplog):
    """Bytes that are no UTF-8, lines without `step`, other JSON, and NULs that a power failure leaves."""
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.5}).encode() for step in (1, 2)]
    bad = [b"\xff\xfe\x80", b'{"loss": 3}', b"[1, 2]", b'{"step": "2"}', b"\0\0\0", b"[" * 5000]
    file.write_bytes(b"\n".join([good[0], *bad, good[1], b'{"step": 3, "lo']))

    def keep(line: dict) -> bool | None:
        return line["step"] <= 2 if isinstance(line.get("step"), int) else None

    found = LineFile(file)
    found.rewind(keep)
    assert file.read_bytes() == b"\n".join(good) + b"\n"
    assert "6 lines that hold no values were left out" in caplog.text
    found.append({"step": 3})
    caplog.clear()
    with file.open("ab") as stream:
        stream.write(b'{"step": 4, "lo')
    found.rewind(keep)
    assert steps(file) == [1, 2] and not caplog.records
