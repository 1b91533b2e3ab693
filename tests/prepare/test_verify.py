"""Every damage to a folder of shards is found and named, and a good folder passes.

Hashes find most of it. Where a test is about the other checks, `renew` makes all hashes agree with the damage first.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from mythos_dist.data.manifest import index_fingerprint
from mythos_dist.errors import UserError
from mythos_dist.prepare import mds, part, verify_shard
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.verify import verify

TOOL = Path(__file__).parents[2] / "tools" / "verify_shards.py"
SEQ_LEN = 32
EOS = 2  # of ByteTokenizer, whose vocabulary is 260
BAD = "train/part-00001/shard.00000.mds"  # the shard that tests damage


@pytest.fixture(scope="module")
def made(byte_tokenizer, tmp_path_factory):
    """{compression: folder}: three parts and their tails, more than a hundred shards, some documents empty."""
    work = tmp_path_factory.mktemp("verify")
    draw = random.Random(0)
    texts = ["" if i % 20 == 0 else "".join(draw.choices("etaoin ", k=draw.randint(1, 900))) for i in range(300)]
    pq.write_table(pa.table({"text": texts}), work / "corpus.parquet", row_group_size=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mds, "SIZE_LIMIT", 2500)
        patch.setattr(part, "MIN_PART_BYTES", 1)
        patch.setattr(os, "fsync", lambda descriptor: None)
        for name, compression in (("plain", None), ("zstd", "zstd:1")):
            convert(
                work / "corpus.parquet",
                byte_tokenizer,
                SEQ_LEN,
                work / name,
                heldout=0.2,
                compression=compression,
                quiet=True,
            )
    return {None: work / "plain", "zstd:1": work / "zstd"}


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the uncompressed shards, to damage."""
    return shutil.copytree(made[None], tmp_path / "copy")


@pytest.fixture
def packed(made, tmp_path):
    """A copy of the compressed shards, to damage."""
    return shutil.copytree(made["zstd:1"], tmp_path / "packed")


def change_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def renew_fingerprint(folder: Path) -> None:
    digest = index_fingerprint(folder)
    change_json(folder / "manifest.json", lambda manifest: manifest.update(fingerprint=digest))


def change_index(folder: Path, change, split="train") -> None:
    """`change` the list of entries; the fingerprint agrees."""
    change_json(folder / split / "index.json", lambda index: change(index["shards"]))
    renew_fingerprint(folder)


def entry_of(shards: list[dict], name: str) -> dict:
    basename = name.partition("/")[2]
    return next(one for one in shards if one["raw_data"]["basename"] == basename)


def described(content: bytes) -> dict:
    hashes = {"sha1": hashlib.sha1(content).hexdigest(), "xxh64": xxhash.xxh64(content).hexdigest()}
    return {"bytes": len(content), "hashes": hashes}


def renew(folder: Path, name=BAD) -> None:
    """Hashes and sizes in the index, and the fingerprint, as the shard's file is now."""
    content = (folder / name).read_bytes()
    change = lambda shards: entry_of(shards, name)["raw_data"].update(described(content))  # noqa: E731
    change_index(folder, change, name.partition("/")[0])


def flip(file: Path, at: int) -> None:
    """One bit of the byte at `at`."""
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def change_tokens(folder: Path, change, name=BAD) -> None:
    """`change` a shard's tokens in place: uint16 (windows * (seq_len + 1),). All hashes agree."""
    content = bytearray((folder / name).read_bytes())
    begin = int(np.frombuffer(content, "<u4", offset=4, count=1)[0])
    change(np.frombuffer(content, "<u2", offset=begin))
    (folder / name).write_bytes(content)
    renew(folder, name)


def read_tokens(folder: Path, split: str) -> list[np.ndarray]:
    """The windows of each shard on disk, through numpy alone; the index is not asked."""
    found = []
    for file in sorted((folder / split).glob("part-*/*")):
        content = file.read_bytes()
        if file.suffix == ".zstd":
            content = pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
        samples, begin = np.frombuffer(content, "<u4", count=2)
        found.append(np.frombuffer(content, "<u2", offset=begin).reshape(samples, SEQ_LEN + 1))
    return found


def only_bad(report) -> str:
    """What is wrong with the one bad shard of a report that names nothing else."""
    assert report.problems == [] and [one["shard"] for one in report.bad] == [BAD], report
    return "; ".join(report.bad[0]["problems"])


def only_problem(report) -> str:
    assert report.bad == [] and len(report.problems) == 1, report
    return report.problems[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("compression", [None, "zstd:1"])
def test_a_good_folder_passes_and_is_left_as_it_was(made, compression, workers):
    """Counts against the files themselves, read with numpy."""
    folder = made[compression]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")}
    report = verify(folder, workers=workers)
    assert report.ok and not report.remarks, report
    windows = [shard for split in ("train", "heldout") for shard in read_tokens(folder, split)]
    assert report.shards == len(windows) > 110
    assert report.windows == sum(map(len, windows)) and report.tokens == sum(shard.size for shard in windows)
    assert report.bytes == sum(file.stat().st_size for file in folder.glob("*/part-*/*"))
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")} == before


def test_the_smallest_pieces_count_the_same(made, monkeypatch):
    """Counts do not depend on where a piece ends."""
    monkeypatch.setattr(verify_shard, "PIECE_BYTES", 16)
    assert verify(made[None]).ok


def test_tokens_of_four_bytes(byte_tokenizer, write_parquet, tmp_path):
    large = type(byte_tokenizer)(byte_tokenizer.path, first=70_000, vocab_size=70_256)
    convert(write_parquet(text=["zero"] * 50), large, SEQ_LEN, tmp_path / "out", heldout=0, quiet=True)
    assert verify(tmp_path / "out").ok
    change_json(tmp_path / "out" / "manifest.json", lambda manifest: manifest.update(vocab_size=70_000 + ord("z")))
    (bad,) = verify(tmp_path / "out").bad
    assert bad["problems"] == ["contains the token 70122, outside vocab_size=70122"]


# What happens to a file, and what must be said of it. Its header: 4 bytes, offsets, JSON.
IN_HEADER = {
    "number of windows": lambda file: flip(file, 0),
    "offsets": lambda file: flip(file, 4),
    "columns": lambda file: flip(file, file.read_bytes().index(b'"tokens"') + 3),
}
IN_WINDOWS = {"middle": lambda file: flip(file, file.stat().st_size // 2), "end": lambda file: flip(file, -1)}
TO_THE_FILE = {
    "shortened": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has .* bytes, not"),
    "lengthened": (lambda file: file.write_bytes(file.read_bytes() + b"0"), "has .* bytes, not"),
    "emptied": (lambda file: file.write_bytes(b""), "has 0 bytes, not"),
    "missing": (lambda file: file.unlink(), "is missing"),
    "a link to nothing": (lambda file: (file.unlink(), file.symlink_to("nowhere")), "is missing"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "cannot be read .Is a directory"),
}
HASHES = "has another sha1 and xxh64 than index.json lists"


@pytest.mark.parametrize("where", IN_WINDOWS)
def test_a_flipped_bit_is_found_by_the_hashes(folder, where):
    IN_WINDOWS[where](folder / BAD)
    assert only_bad(verify(folder)).startswith(HASHES)


@pytest.mark.parametrize("what", IN_HEADER)
def test_a_flipped_bit_of_the_header_is_found_twice(folder, what):
    """By the hashes, and where these agree by what the header must be."""
    IN_HEADER[what](folder / BAD)
    meaning = f"has other {what} in its header than index.json"
    assert only_bad(verify(folder)) == f"{HASHES}; {meaning}"
    renew(folder)
    assert only_bad(verify(folder)) == meaning


def test_every_offset_is_held_against_the_format(folder):
    """The last one, and one that still lies within the file: a window would begin in the middle of another."""
    content = bytearray((folder / BAD).read_bytes())
    samples = int(np.frombuffer(content, "<u4", count=1)[0])
    for i in (samples // 2, samples):
        damaged = content.copy()
        np.frombuffer(damaged, "<u4", offset=4, count=samples + 1)[i] -= 2
        (folder / BAD).write_bytes(damaged)
        renew(folder)
        assert only_bad(verify(folder)) == "has other offsets in its header than index.json"


@pytest.mark.parametrize("name", TO_THE_FILE)
@pytest.mark.parametrize("compression", [None, "zstd:1"])
def test_a_file_that_is_not_the_one_listed(folder, packed, compression, name):
    damage, expected = TO_THE_FILE[name]
    where, suffix = (packed, ".zstd") if compression else (folder, "")
    damage(where / (BAD + suffix))
    report = verify(where)
    assert [one["shard"] for one in report.bad] == [BAD + suffix] and not report.problems
    (problem,) = report.bad[0]["problems"]
    assert re.match(expected, problem), problem


def repack(folder: Path, content: bytes) -> None:
    """Write a shard's compressed file; its own hashes in the index agree."""
    (folder / f"{BAD}.zstd").write_bytes(content)
    change_index(folder, lambda shards: entry_of(shards, BAD)["zip_data"].update(described(content)))


def test_a_compressed_shard_is_unpacked_and_checked_again(packed):
    """Hashes of the file agree in all but the first case."""
    good = (packed / f"{BAD}.zstd").read_bytes()
    raw = pa.CompressedInputStream(pa.BufferReader(good), "zstd").read()
    compress = pa.Codec("zstd").compress
    changed = bytearray(raw)
    changed[-2] ^= 4  # the low byte of the last token
    flip(packed / f"{BAD}.zstd", len(good) // 2)
    (bad,) = verify(packed).bad
    assert bad["problems"][0] == HASHES
    cases = [
        (compress(bytes(changed), asbytes=True), f"decompressed, it {HASHES}"),
        (good[:-20], "cannot be decompressed"),
        (b"no zstd at all", "cannot be decompressed"),
        (compress(raw[:-1], asbytes=True), "cannot be decompressed"),
        (compress(raw + b"0", asbytes=True), "cannot be decompressed"),
    ]
    for content, expected in cases:
        repack(packed, content)
        (bad,) = verify(packed).bad
        assert len(bad["problems"]) == 1 and bad["problems"][0].startswith(expected), bad
    repack(packed, good)
    assert verify(packed).ok


def test_a_token_outside_the_vocabulary(folder):
    """Hashes agree. 260 is the first that is outside, and 259 the last that is not."""
    for place in (0, 100, -1):
        change_tokens(folder, lambda tokens, place=place: tokens.__setitem__(place, 259))
    assert all("EOS" in problem for problem in verify(folder).problems) and not verify(folder).bad
    for place in (0, 100, -1):
        saved = (folder / BAD).read_bytes()
        change_tokens(folder, lambda tokens, place=place: tokens.__setitem__(place, 260))
        (bad,) = verify(folder).bad
        assert bad == {"shard": BAD, "problems": ["contains the token 260, outside vocab_size=260"]}
        (folder / BAD).write_bytes(saved)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_lost_document_end(folder, split, change):
    """One EOS fewer or more, in either split; hashes agree."""
    found = sum(int((shard == EOS).sum()) for shard in read_tokens(folder, split))

    def edit(tokens):
        there = np.flatnonzero((tokens == EOS) == (change < 0))
        tokens[there[0]] = 50 if change < 0 else EOS

    name = BAD if split == "train" else "heldout/part-00001/shard.00000.mds"
    change_tokens(folder, edit, name)
    expected = f"{split}: the shards contain {found + change} EOS tokens, not documents - eos_dropped of SplitCounts("
    assert only_problem(verify(folder)).startswith(expected)


def test_a_bad_shard_is_not_also_a_lost_document(folder):
    """Where a shard was not read, EOS tokens cannot be counted."""
    (folder / BAD).unlink()
    only_bad(verify(folder))


def add(*changes: tuple[str, int]):
    """Counts of the manifest, each changed by so much."""

    def change(manifest):
        for name, by in changes:
            *groups, key = name.split(".")
            where = manifest
            for group in groups:
                where = where[group]
            where[key] += by

    return change


SPLIT_WINDOW = SEQ_LEN + 1
# In each of the second kind, all equations hold but the one that is named.
MANIFEST_DAMAGE = [
    *[
        (add((f"documents.{name}", 1)), "read == written")
        for name in ("read", "empty", "low_score", "duplicate", "short")
    ],
    (add(("documents.written", 1)), "read == written"),
    *[
        (add((f"splits.train.{name}", 1)), r"tokens \+ documents == tokens_written \+ tokens_dropped")
        for name in ("tokens", "documents", "tokens_written", "tokens_dropped")
    ],
    (add(("splits.train.windows", 1)), r"tokens_written == windows \* \(seq_len \+ 1\)"),
    (add(("documents.written", 1), ("documents.read", 1)), "written == documents of the splits"),
    (
        add(("splits.heldout.tokens", 5), ("splits.heldout.tokens_written", 5)),
        r"tokens_written == windows \* \(seq_len \+ 1\)",
    ),
    (
        add(("splits.train.tokens", SPLIT_WINDOW), ("splits.train.tokens_dropped", SPLIT_WINDOW)),
        r"eos_dropped <= tokens_dropped < \(seq_len \+ 1\)",
    ),
    (
        add(
            *(("splits.train.documents", 40), ("splits.train.tokens", -40), ("splits.train.eos_dropped", 40)),
            *(("documents.written", 40), ("documents.read", 40)),
        ),
        r"eos_dropped <= tokens_dropped < \(seq_len \+ 1\)",
    ),
    (add(("splits.train.eos_dropped", 1)), "EOS tokens, not documents - eos_dropped"),
    (
        add(
            *(("splits.train.documents", 1), ("splits.train.tokens", -1)),
            *(("documents.written", 1), ("documents.read", 1)),
        ),
        "EOS tokens, not documents - eos_dropped",
    ),
    (
        add(
            *(("splits.train.windows", 1), ("splits.train.tokens_written", SPLIT_WINDOW)),
            ("splits.train.tokens", SPLIT_WINDOW),
        ),
        r"train/index.json lists [\d,]+ windows, manifest.json [\d,]+",
    ),
    (add(("documents.repaired", 10**6)), "repaired <= read"),
    (add(("documents.repaired", -1)), "no count is negative"),
    (add(("documents.empty", -100), ("documents.low_score", 100)), "no count is negative"),
    (add(("vocab_size", 1 << 16)), "vocab_size=65796 <= 65536 does not hold for uint16"),
    (add(("vocab_size", -141)), "contains the token 119, outside vocab_size=119"),
    (add(("eos_id", 258)), "eos_id=260 < vocab_size=260"),
    (add(("eos_id", 1)), "EOS tokens"),
    (add(("seq_len", 1)), "index.json has column_encodings"),
    (lambda manifest: manifest.update(dtype="uint32"), "index.json has column_encodings"),
    (lambda manifest: manifest.update(compression="zstd:1"), "index.json has compression=None instead of 'zstd:1'"),
    (lambda manifest: manifest.update(fingerprint="0" * 64), "not the one that manifest.json was written for"),
    (
        lambda manifest: manifest.update(tokenizer_sha256="0" * 64),
        "is not the tokenizer that the shards were made with",
    ),
    (lambda manifest: manifest.update(tokenizer="other.model"), "the tokenizer 'other.model' cannot be read"),
    (
        lambda manifest: manifest.update(seq_len="32"),
        "manifest.json: cannot be read .*seq_len: expected a whole number, not '32'",
    ),
    (lambda manifest: manifest.update(dtype="text"), "manifest.json: an invalid value"),
]


@pytest.mark.parametrize("change, expected", MANIFEST_DAMAGE, ids=[f"{i}" for i in range(len(MANIFEST_DAMAGE))])
def test_a_manifest_that_does_not_fit(folder, change, expected):
    change_json(folder / "manifest.json", change)
    report = verify(folder)
    said = [*report.problems, *(problem for one in report.bad for problem in one["problems"])]
    assert any(re.search(expected, one) for one in said), said


def test_a_folder_that_was_never_finished_is_no_damage(folder, tmp_path):
    """It is refused, with what to do, instead of being reported shard by shard."""
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "absent")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished conversion"):
        verify(folder)
    (folder / "unfinished").mkdir()
    with pytest.raises(UserError, match=r"not finished; run the same command of tools/make_shards.py again"):
        verify(folder)


def test_files_that_no_index_names_are_remarks(folder):
    (folder / "train" / "notes.json").write_text("{}")
    (folder / "train" / "part-00000" / "shard.00000.mds.tmp").write_text("half")
    (folder / "unfinished").mkdir()
    report = verify(folder)
    assert report.ok
    assert len(report.remarks) == 2
    assert any("2 files not listed in index.json: notes.json, part-00000/" in one for one in report.remarks)


@pytest.mark.launch
def test_two_bad_shards_are_both_listed_and_the_tool_says_what_to_do(folder):
    other = "heldout/part-00002/shard.00000.mds"
    flip(folder / BAD, -2)
    (folder / other).unlink()
    told = subprocess.run([sys.executable, TOOL, folder], capture_output=True, text=True, timeout=240)
    assert told.returncode == 1 and told.stderr == ""
    *lines, verdict = told.stdout.splitlines()
    assert lines == [f"{BAD}: {HASHES}", f"{other}: is missing"]
    assert "2 bad shards, 0 problems" in verdict and "copy these files again" in verdict
    machine = subprocess.run([sys.executable, TOOL, folder, "--json"], capture_output=True, text=True, timeout=240)
    assert machine.returncode == 1
    assert [one["shard"] for one in json.loads(machine.stdout)["bad"]] == [BAD, other]


@pytest.mark.launch
def test_the_tools_exit_codes(folder):
    def run(*arguments):
        return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=240)

    good = run(folder)
    assert good.returncode == 0 and good.stdout.endswith(": all good\n")
    assert run(folder, "--quiet").stdout == ""
    refused = run(folder / "train")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr
