"""Any damage to a folder of shards is reported, and an undamaged folder passes.

Hashes detect most damage. Tests of the other checks first update all hashes with `renew`.
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
from helpers.selection import first_is_quick

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
    """{compression: folder}: three parts and their joined tails in more than a hundred shards; some documents are
    empty."""
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
    """`change` the list of entries, and update the fingerprint."""
    change_json(folder / split / "index.json", lambda index: change(index["shards"]))
    renew_fingerprint(folder)


def entry_of(shards: list[dict], name: str) -> dict:
    basename = name.partition("/")[2]
    return next(one for one in shards if one["raw_data"]["basename"] == basename)


def size_and_hashes(content: bytes) -> dict:
    hashes = {"sha1": hashlib.sha1(content).hexdigest(), "xxh64": xxhash.xxh64(content).hexdigest()}
    return {"bytes": len(content), "hashes": hashes}


def renew(folder: Path, name=BAD) -> None:
    """Update hashes and size in the index, and the fingerprint, to the present file of a shard."""
    content = (folder / name).read_bytes()
    change = lambda shards: entry_of(shards, name)["raw_data"].update(size_and_hashes(content))  # noqa: E731
    change_index(folder, change, name.partition("/")[0])


def flip(file: Path, at: int) -> None:
    """Flip one bit of the byte at `at`."""
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def change_tokens(folder: Path, change, name=BAD) -> None:
    """`change` a shard's tokens in place, uint16 (windows * (seq_len + 1),), and update all hashes."""
    content = bytearray((folder / name).read_bytes())
    begin = int(np.frombuffer(content, "<u4", offset=4, count=1)[0])
    change(np.frombuffer(content, "<u2", offset=begin))
    (folder / name).write_bytes(content)
    renew(folder, name)


def read_tokens(folder: Path, split: str) -> list[np.ndarray]:
    """The windows of each shard on disk, read with numpy and without the index."""
    shards = []
    for file in sorted((folder / split).glob("part-*/*")):
        content = file.read_bytes()
        if file.suffix == ".zstd":
            content = pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
        samples, begin = np.frombuffer(content, "<u4", count=2)
        shards.append(np.frombuffer(content, "<u2", offset=begin).reshape(samples, SEQ_LEN + 1))
    return shards


def only_bad(report) -> str:
    """The problems of shard BAD, in a report without any other problem."""
    assert report.problems == [] and [one["shard"] for one in report.bad] == [BAD], report
    return "; ".join(report.bad[0]["problems"])


def only_problem(report) -> str:
    assert report.bad == [] and len(report.problems) == 1, report
    return report.problems[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("compression", [None, "zstd:1"])
def test_a_good_folder_passes_and_is_not_changed(made, compression, workers):
    """The report's counts are compared with the files, read with numpy."""
    folder = made[compression]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")}
    report = verify(folder, workers=workers)
    assert report.ok and not report.remarks, report
    windows = [shard for split in ("train", "heldout") for shard in read_tokens(folder, split)]
    assert report.shards == len(windows) > 110
    assert report.windows == sum(map(len, windows)) and report.tokens == sum(shard.size for shard in windows)
    assert report.bytes == sum(file.stat().st_size for file in folder.glob("*/part-*/*"))
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")} == before


def test_counts_do_not_depend_on_the_size_of_pieces(made, monkeypatch):
    monkeypatch.setattr(verify_shard, "PIECE_BYTES", 16)
    assert verify(made[None]).ok


def test_tokens_of_four_bytes(byte_tokenizer, write_parquet, tmp_path):
    large = type(byte_tokenizer)(byte_tokenizer.path, first=70_000, vocab_size=70_256)
    convert(write_parquet(text=["zero"] * 50), large, SEQ_LEN, tmp_path / "out", heldout=0, quiet=True)
    assert verify(tmp_path / "out").ok
    change_json(tmp_path / "out" / "manifest.json", lambda manifest: manifest.update(vocab_size=70_000 + ord("z")))
    (bad,) = verify(tmp_path / "out").bad
    assert bad["problems"] == ["contains the token 70122, outside vocab_size=70122"]


# Damage to a file (and, in TO_THE_FILE, the expected problem). A header is: 4 bytes, offsets, JSON.
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
    "a broken link": (lambda file: (file.unlink(), file.symlink_to("nowhere")), "is missing"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "cannot be read .Is a directory"),
}
HASHES = "has another sha1 and xxh64 than index.json lists"


@pytest.mark.parametrize("where", IN_WINDOWS)
def test_a_flipped_bit_is_found_by_the_hashes(folder, where):
    IN_WINDOWS[where](folder / BAD)
    assert only_bad(verify(folder)).startswith(HASHES)


@pytest.mark.parametrize("what", IN_HEADER)
def test_a_flipped_bit_of_the_header_is_found_twice(folder, what):
    """By the hashes, and, if these are updated, by the expected header."""
    IN_HEADER[what](folder / BAD)
    problem = f"has other {what} in its header than index.json"
    assert only_bad(verify(folder)) == f"{HASHES}; {problem}"
    renew(folder)
    assert only_bad(verify(folder)) == problem


def test_every_offset_is_checked(folder):
    """The last one, and one in the middle, which is still within the file but begins inside another window."""
    content = bytearray((folder / BAD).read_bytes())
    samples = int(np.frombuffer(content, "<u4", count=1)[0])
    for i in (samples // 2, samples):
        damaged = content.copy()
        np.frombuffer(damaged, "<u4", offset=4, count=samples + 1)[i] -= 2
        (folder / BAD).write_bytes(damaged)
        renew(folder)
        assert only_bad(verify(folder)) == "has other offsets in its header than index.json"


@pytest.mark.parametrize("name", TO_THE_FILE)
@pytest.mark.parametrize("compression", first_is_quick([None, "zstd:1"]))
def test_a_file_that_is_not_the_one_listed(folder, packed, compression, name):
    damage, expected = TO_THE_FILE[name]
    where, suffix = (packed, ".zstd") if compression else (folder, "")
    damage(where / (BAD + suffix))
    report = verify(where)
    assert [one["shard"] for one in report.bad] == [BAD + suffix] and not report.problems
    (problem,) = report.bad[0]["problems"]
    assert re.match(expected, problem), problem


def repack(folder: Path, content: bytes) -> None:
    """Write a shard's compressed file, and update its hashes in the index."""
    (folder / f"{BAD}.zstd").write_bytes(content)
    change_index(folder, lambda shards: entry_of(shards, BAD)["zip_data"].update(size_and_hashes(content)))


def test_a_compressed_shard_is_decompressed_and_checked_again(packed):
    """Hashes of the compressed file are right in all but the first case."""
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
    """With updated hashes. 259 is the last token inside the vocabulary, 260 the first outside."""
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
def test_a_missing_or_additional_eos_token(folder, split, change):
    """In either split, with updated hashes."""
    num_eos = sum(int((shard == EOS).sum()) for shard in read_tokens(folder, split))

    def edit(tokens):
        positions = np.flatnonzero((tokens == EOS) == (change < 0))
        tokens[positions[0]] = 50 if change < 0 else EOS

    name = BAD if split == "train" else "heldout/part-00001/shard.00000.mds"
    change_tokens(folder, edit, name)
    expected = f"{split}: the shards contain {num_eos + change} EOS tokens, not documents - eos_dropped of SplitCounts("
    assert only_problem(verify(folder)).startswith(expected)


def test_a_bad_shard_is_not_also_reported_as_missing_eos_tokens(folder):
    """EOS tokens are not compared if a shard could not be read."""
    (folder / BAD).unlink()
    only_bad(verify(folder))


def add(*changes: tuple[str, int]):
    """A function that adds to counts of the manifest: (name, difference)."""

    def change(manifest):
        for name, by in changes:
            *groups, key = name.split(".")
            where = manifest
            for group in groups:
                where = where[group]
            where[key] += by

    return change


SPLIT_WINDOW = SEQ_LEN + 1
# Changes of the manifest, and the problem that each causes.
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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(*case, id=f"{i}", marks=[pytest.mark.launch] * bool(i % 8))
        for i, case in enumerate(MANIFEST_DAMAGE)
    ],
)
def test_contradictions_of_the_manifest_are_found(folder, change, expected):
    change_json(folder / "manifest.json", change)
    report = verify(folder)
    messages = [*report.problems, *(problem for one in report.bad for problem in one["problems"])]
    assert any(re.search(expected, one) for one in messages), messages


def test_an_unfinished_conversion_is_refused(folder, tmp_path):
    """With the remedy, instead of being reported as damage shard by shard."""
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "absent")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished conversion"):
        verify(folder)
    (folder / "unfinished").mkdir()
    with pytest.raises(UserError, match=r"not finished; run the same command again \(`mythos shards`"):
        verify(folder)


def test_files_that_are_not_in_an_index_are_remarks(folder):
    (folder / "train" / "notes.json").write_text("{}")
    (folder / "train" / "part-00000" / "shard.00000.mds.tmp").write_text("half")
    (folder / "unfinished").mkdir()
    report = verify(folder)
    assert report.ok
    assert len(report.remarks) == 2
    assert any("2 files not listed in index.json: notes.json, part-00000/" in one for one in report.remarks)


@pytest.mark.launch
def test_the_tool_lists_all_bad_shards_and_the_remedy(folder):
    other = "heldout/part-00002/shard.00000.mds"
    flip(folder / BAD, -2)
    (folder / other).unlink()
    result = subprocess.run([sys.executable, TOOL, folder], capture_output=True, text=True, timeout=240)
    assert result.returncode == 1 and result.stderr == ""
    *lines, verdict = result.stdout.splitlines()
    assert lines == [f"{BAD}: {HASHES}", f"{other}: is missing"]
    assert "2 bad shards, 0 problems" in verdict and "copy these files there again" in verdict
    as_json = subprocess.run([sys.executable, TOOL, folder, "--json"], capture_output=True, text=True, timeout=240)
    assert as_json.returncode == 1
    assert [one["shard"] for one in json.loads(as_json.stdout)["bad"]] == [BAD, other]


@pytest.mark.launch
def test_the_tools_exit_codes(folder):
    def run(*arguments):
        return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=240)

    good = run(folder)
    assert good.returncode == 0 and good.stdout.endswith(": all good\n")
    assert run(folder, "--quiet").stdout == ""
    refused = run(folder / "train")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr
