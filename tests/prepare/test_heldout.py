"""The held-out split of few documents: the exact last windows, at any number of workers, also after an interruption."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers.conversion import SPLITS, assert_holds, contents, expect, read_windows

from mythos_dist.data.manifest import read_shard_manifest
from mythos_dist.errors import UserError
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.heldout import is_heldout, text_digest
from mythos_dist.prepare.spans import Columns
from mythos_dist.prepare.verify import verify

SEQ_LEN = 15  # windows of 16 bytes
SHARE = 0.24  # of `many_parts`


def text(length: int, seed: int = 0) -> str:
    """`length` characters that differ by seed, so that no two windows are equal by chance."""
    words = (f"{seed}-{i} " for i in range(length))
    return "".join(words)[:length]


def write_files(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, one in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(one)
    return folder


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(
    ("texts", "heldout", "windows"),
    [
        ([text(3000)], 0.02, (183, 4)),  # 3,000 bytes and EOS: 187 windows and 9 tokens
        ([text(3000)], 0.5, (93, 94)),
        ([text(3000)], 0.999, (1, 186)),
        ([text(3000)], 0.0, (187, 0)),
        ([text(500, 1), text(700, 2)], 0.02, (73, 2)),
        ([text(160, seed) for seed in range(20)], 0.01, (199, 2)),
        ([text(20_000, 1), text(3, 2)], 0.02, (1225, 25)),
        ([text(3, 2), text(20_000, 1)], 0.5, (625, 625)),
        ([text(31)], 0.02, (1, 1)),  # with EOS exactly two windows
        ([text(30)], 0.02, (1, 0)),  # less than two
        ([text(5, seed) for seed in range(100)], 0.02, (36, 1)),  # documents shorter than a window
    ],
)
def test_few_documents_give_a_held_out_split_and_no_token_is_lost_or_in_both(
    byte_tokenizer, tmp_path, texts, heldout, windows, compression
):
    """Against a plain loop and window counts by hand; `verify` then checks all files and counts."""
    source, out = write_files(tmp_path / "texts", texts), tmp_path / "out"
    manifest = convert(source, byte_tokenizer, SEQ_LEN, out, heldout=heldout, compression=compression, quiet=True)
    converted = tuple(manifest.splits[split].windows for split in SPLITS)
    assert converted == windows
    assert verify(out).ok, verify(out)
    summary = manifest.summary()
    assert ("training runs without evaluation" in summary) == (converted[1] == 0)
    assert ("cut from the end of the text" in summary) == (converted[1] > 0)
    assert manifest.heldout_by == ("window" if heldout else "document")
    if compression is None:
        assert_holds(out, manifest, expect([[(one, None) for one in texts]], byte_tokenizer, SEQ_LEN, heldout))


def test_few_lines_are_held_out_by_window_and_many_by_document(byte_tokenizer, tmp_path):
    lines = [text(40, seed) for seed in range(60)]
    for count, by in ((3, "window"), (60, "document")):
        file = tmp_path / f"{count}.txt"
        file.write_text("\n".join(lines[:count]))
        columns = Columns(sample_by="line")
        manifest = convert(
            file, byte_tokenizer, SEQ_LEN, tmp_path / f"{count}.out", heldout=0.1, columns=columns, quiet=True
        )
        assert manifest.heldout_by == by and manifest.splits["heldout"].windows, count
        documents = [(one, None) for one in lines[:count]]
        assert_holds(tmp_path / f"{count}.out", manifest, expect([documents], byte_tokenizer, SEQ_LEN, 0.1))


def test_a_long_document_is_not_held_out_if_it_is_most_of_the_text(byte_tokenizer, tmp_path):
    """Its hash would hold it out: 61 documents with a share of 0.3."""
    texts = (text(5000, seed) for seed in range(100, 200))
    long = next(one for one in texts if is_heldout(text_digest(one.encode()), 0.3))
    source = write_files(tmp_path / "texts", [*(text(40, seed) for seed in range(60)), long])
    manifest = convert(source, byte_tokenizer, SEQ_LEN, tmp_path / "out", heldout=0.3, quiet=True)
    windows = [manifest.splits[split].windows for split in SPLITS]
    assert windows[1] == pytest.approx(0.3 * sum(windows), abs=1)


@pytest.fixture
def many_parts(part_per_span, write_parquet):
    """Four documents, each a part. With the share SHARE, hashes hold out some of them before the rule changes."""
    texts = [text(60 + 7 * seed, seed) for seed in range(7, 11)]
    assert 0 < sum(is_heldout(text_digest(one.encode()), SHARE) for one in texts) < 3
    return write_parquet(rows=1, text=texts), [[(one, None)] for one in texts]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_held_out_windows_are_the_same_at_any_number_of_workers(many_parts, byte_tokenizer, tmp_path, workers):
    source, parts = many_parts
    expected = expect(parts, byte_tokenizer, SEQ_LEN, SHARE)
    manifest = convert(source, byte_tokenizer, SEQ_LEN, tmp_path / "out", heldout=SHARE, workers=workers, quiet=True)
    assert manifest.heldout_by == "window"
    assert_holds(tmp_path / "out", manifest, expected)
    windows = Counter(map(tuple, (one for split in SPLITS for one in read_windows(tmp_path / "out", split))))
    assert max(windows.values()) == 1


class Stop(BaseException):
    """Stands for the end of the process."""


@pytest.mark.launch
def test_a_conversion_stopped_at_any_file_operation_gives_the_same_bytes(
    many_parts, byte_tokenizer, tmp_path, monkeypatch
):
    """Stopped before its n-th rename, unlink or rmtree, for every n, then started again: also when parts with held-out
    documents must be converted again, and after the held-out windows were moved."""
    source, _ = many_parts

    def run(out):
        return convert(source, byte_tokenizer, SEQ_LEN, out, heldout=SHARE, quiet=True)

    expected = run(tmp_path / "uninterrupted")
    assert expected.heldout_by == "window"
    counted = limit = 0

    def stopping(operation):
        def count_or_stop(*args, **options):
            nonlocal counted
            counted += 1
            if counted == limit:
                raise Stop
            return operation(*args, **options)

        return count_or_stop

    for n in range(1, 1000):
        out, counted, limit = tmp_path / "out", 0, n
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping(os.replace))
            patch.setattr(os, "rename", stopping(os.rename))
            patch.setattr(Path, "unlink", stopping(Path.unlink))
            patch.setattr(shutil, "rmtree", stopping(shutil.rmtree))
            try:
                run(out)
                break
            except Stop:
                pass
        assert run(out) == expected, n
        assert contents(out) == contents(tmp_path / "uninterrupted"), n
        shutil.rmtree(out)
    assert n > 30


def test_text_that_fills_no_window_is_refused_with_its_number_of_tokens(byte_tokenizer, tmp_path):
    """The number includes held-out text: with a share of 0.5, the hash holds out some of these documents."""
    for seed in range(8):
        source = write_files(tmp_path / f"texts{seed}", [text(14, seed)])
        with pytest.raises(UserError, match="14 tokens of text do not fill one window of seq_len=15"):
            convert(source, byte_tokenizer, SEQ_LEN, tmp_path / "out", heldout=0.5, quiet=True)


def test_verify_finds_contradictory_counts_of_held_out_windows(byte_tokenizer, tmp_path):
    """The held-out split ends with a complete window, so none of its tokens can have been dropped."""
    out = tmp_path / "out"
    convert(write_files(tmp_path / "texts", [text(3000)]), byte_tokenizer, SEQ_LEN, out, heldout=0.1, quiet=True)
    good = (out / "manifest.json").read_text()
    assert read_shard_manifest(out).heldout_by == "window"
    for change, problem in (
        (('"heldout_by": "window"', '"heldout_by": "line"'), "heldout_by is document or window"),
        (('"tokens_dropped": 0', '"tokens_dropped": 1'), "tokens_dropped == 0"),
    ):
        (out / "manifest.json").write_text(good.replace(*change))
        assert any(problem in one for one in verify(out).problems), problem
