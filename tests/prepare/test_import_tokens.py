"""Imports of token files: the shards of the same text, each token once, for any workers; bad input is named."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from helpers.conversion import contents, read_windows
from helpers.token_files import (
    EOS,
    documents_of,
    windows_of,
    write_mds,
    write_megatron,
    write_nanoset,
    write_saved_dataset,
)

from mythos_dist.data.manifest import Filters, ShardManifest, TokenCounts, TokenRules, read_shard_manifest
from mythos_dist.errors import UserError
from mythos_dist.prepare import token_converter
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.spans import Columns
from mythos_dist.prepare.tokens import documents as documents_module
from mythos_dist.prepare.tokens import flat, rows
from mythos_dist.prepare.verify import verify

REPOSITORY = Path(__file__).parents[2]
SEQ_LEN = 16
WORDS = "the quick brown fox jumps over the lazy dog and runs".split()
TEXTS = [" ".join(WORDS[number % 7 :] + [str(number)] * (number % 5)) for number in range(60)]
TOKENS = [[byte + 3 for byte in text.encode()] for text in TEXTS]  # ByteTokenizer's
WITH_EOS = [[*row, EOS] for row in TOKENS]
STREAM = [token for row in WITH_EOS for token in row]
SAMPLES = [STREAM[i : i + 32] for i in range(0, len(STREAM), 32)]  # the last one is shorter

WRITERS: dict[str, Callable[[Path], Path]] = {
    "megatron": lambda path: write_megatron(path / "a", WITH_EOS, "uint16"),
    "megatron-without-eos": lambda path: write_megatron(path / "a", TOKENS, "int64", sequences=3),
    "nanoset": lambda path: write_nanoset(path / "a.ds", WITH_EOS),
    "nanoset-4-bytes": lambda path: write_nanoset(path / "a.ds", WITH_EOS, size=4, metadata=False),
    "datasets": lambda path: write_saved_dataset(path / "saved", TOKENS, shards=2),
    "mds-bytes": lambda path: write_mds(path / "mds", SAMPLES, size_limit=2000, hashes=["sha1"]),
    "mds-ndarray": lambda path: write_mds(path / "mds", SAMPLES, "ndarray:int32", "int32", compression="zstd"),
}


def import_tokens(source, tokenizer, out, seq_len=SEQ_LEN, *, filters=None, heldout=0.0, workers=0, **rules):
    columns = Columns(tokens=TokenRules(**rules))
    return convert(
        *(source, tokenizer, seq_len, out),
        filters=filters,
        columns=columns,
        heldout=heldout,
        workers=workers,
        quiet=True,
    )


def counts_of(manifest: ShardManifest) -> TokenCounts:
    assert manifest.token_counts is not None
    return manifest.token_counts


@pytest.fixture
def many_parts(part_per_span, monkeypatch):
    """Each 64 tokens of uint16 are a part, and documents of more than 40 tokens come in pieces."""
    monkeypatch.setattr(flat, "TEXT_CHUNK_BYTES", 128)
    for module in (rows, flat):
        monkeypatch.setattr(module, "BLOCK_TOKENS", 24)
    monkeypatch.setattr(flat, "FIRST_BLOCK_TOKENS", 8)
    for module in (documents_module, token_converter):
        monkeypatch.setattr(module, "LONG_TOKENS", 40)


# --- the same shards as the text


@pytest.mark.parametrize("name", WRITERS)
def test_shards_are_those_of_the_text(name, tmp_path, write_parquet, byte_tokenizer, make_stream):
    """Windows of both splits, counts, and the batches of training. 0.005: so few documents that windows are held out,
    because the hash of a text and that of its tokens choose different documents."""
    source = WRITERS[name](tmp_path)
    for heldout in (0.0, 0.005):
        text, tokens = tmp_path / f"text-{heldout}", tmp_path / f"tokens-{heldout}"
        expected = convert(write_parquet(text=TEXTS), byte_tokenizer, SEQ_LEN, text, heldout=heldout, quiet=True)
        manifest = import_tokens(source, byte_tokenizer, tokens, heldout=heldout)
        assert manifest.heldout_by == expected.heldout_by
        assert (manifest.documents, manifest.splits) == (expected.documents, expected.splits)
        for split in ("train", "heldout"):
            assert read_windows(tokens, split) == read_windows(text, split)
        assert read_shard_manifest(tokens) == manifest and verify(tokens).ok
    eos = 0 if name in ("megatron-without-eos", "datasets") else len(TEXTS)
    counts = counts_of(manifest)
    assert (counts.read, counts.eos, counts.left_out) == (sum(map(len, TOKENS)) + eos, eos, 0)
    settings = {"seq_len": SEQ_LEN, "vocab_size": byte_tokenizer.vocab_size, "global_batch": 4}
    streams = [make_stream(path=path, **settings) for path in (text, tokens)]
    for step in range(5):
        batches = [[[x.tolist() for x in batch] for batch in stream.step(step)] for stream in streams]
        assert batches[0] == batches[1]


def test_several_sources_and_formats_follow_one_another(tmp_path, byte_tokenizer):
    sources = [
        write_megatron(tmp_path / "b", TOKENS[:20]),
        write_nanoset(tmp_path / "a.ds", TOKENS[20:40]),
        write_saved_dataset(tmp_path / "saved", TOKENS[40:]),
    ]
    manifest = import_tokens(sources, byte_tokenizer, tmp_path / "out")
    assert read_windows(tmp_path / "out", "train") == windows_of(TOKENS, SEQ_LEN)[0]
    assert [one.name for one in manifest.inputs] == ["b", "a.ds", "saved"]
    (tmp_path / "folder").mkdir()
    for name, some in (("y", TOKENS[30:]), ("x", TOKENS[:30])):
        write_megatron(tmp_path / "folder" / name, some)
    import_tokens(tmp_path / "folder", byte_tokenizer, tmp_path / "in-order-of-names")
    assert read_windows(tmp_path / "in-order-of-names", "train") == windows_of(TOKENS, SEQ_LEN)[0]


# --- documents


def test_documents_are_held_out_by_a_hash_of_their_tokens(tmp_path, byte_tokenizer):
    """The same documents from every format and dtype; of those longer than LONG_TOKENS, by their beginning."""
    heldout = 0.3

    def is_heldout(tokens):
        digest = xxhash.xxh3_128(np.array(tokens, "<u4").tobytes()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < heldout

    held = [row for row in TOKENS if is_heldout(row)]
    assert 5 < len(held) < 40
    for name in ("megatron", "nanoset-4-bytes", "datasets", "mds-bytes"):
        (tmp_path / name).mkdir()
        manifest = import_tokens(
            WRITERS[name](tmp_path / name), byte_tokenizer, tmp_path / f"{name}/out", heldout=heldout
        )
        assert manifest.heldout_by == "document"
        assert read_windows(tmp_path / name / "out", "heldout") == windows_of(held, SEQ_LEN)[0]
        kept = [row for row in TOKENS if row not in held]
        assert read_windows(tmp_path / name / "out", "train") == windows_of(kept, SEQ_LEN)[0]


def test_empty_and_short_documents_are_left_out_and_counted(tmp_path, byte_tokenizer):
    some = [[5, 6, EOS], [EOS, EOS], [], [7, EOS, 8, 9, 10], [11] * 30]
    manifest = import_tokens(write_megatron(tmp_path / "a", some), byte_tokenizer, tmp_path / "out", 3)
    expected = documents_of(some, by_rows=True)
    written = [tokens for tokens, _ in expected if tokens]
    windows, dropped = windows_of(written, 3)
    assert read_windows(tmp_path / "out", "train") == windows
    assert (manifest.documents.read, manifest.documents.empty) == (len(expected), len(expected) - len(written))
    assert counts_of(manifest).read == sum(map(len, some))
    assert counts_of(manifest).eos == sum(had_eos for _, had_eos in expected)
    assert manifest.splits["train"].tokens_dropped == len(dropped)
    manifest = import_tokens(tmp_path / "a", byte_tokenizer, tmp_path / "long", 3, filters=Filters(min_tokens=3))
    assert manifest.documents.short == 2 and counts_of(manifest).left_out == 3
    assert read_windows(tmp_path / "long", "train") == windows_of([[8, 9, 10], [11] * 30], 3)[0]


@pytest.mark.parametrize("limit", [1, 100, 777, 100_000])
def test_the_document_that_reaches_the_limit_is_the_last(limit, tmp_path, byte_tokenizer, many_parts):
    kept, size = [], 0
    for row in TOKENS:
        if size < limit:
            kept.append(row)
            size += len(row) + 1
    source = write_megatron(tmp_path / "a", WITH_EOS, "uint16")
    manifest = import_tokens(source, byte_tokenizer, tmp_path / "out", 8, filters=Filters(limit_tokens=limit))
    assert manifest.tokens == sum(map(len, kept)) and manifest.documents.read == len(kept)
    assert (counts_of(manifest).read, counts_of(manifest).eos) == (size, len(kept))


# --- parts, workers and resuming


def windows_of_parts(step: int) -> list[list[int]]:
    """A document belongs to the part in which it begins; partial windows of all parts are joined at the end."""
    parts: dict[int, list[list[int]]] = {}
    position = 0
    for row in TOKENS:
        parts.setdefault(position // step, []).append(row)
        position += len(row) + 1
    windows, tails = [], []
    for part in sorted(parts):
        full, tail = windows_of(parts[part], SEQ_LEN)
        windows += full
        tails += tail
    size = SEQ_LEN + 1
    return windows + [tails[i : i + size] for i in range(0, len(tails) // size * size, size)]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, byte_tokenizer, many_parts):
    source = write_nanoset(tmp_path / "a.ds", WITH_EOS)
    import_tokens(source, byte_tokenizer, tmp_path / "alone")
    assert len(list((tmp_path / "alone" / "train").glob("part-*"))) > 20
    assert read_windows(tmp_path / "alone", "train") == windows_of_parts(64)
    import_tokens(source, byte_tokenizer, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


def test_an_interrupted_import_resumes_with_the_missing_parts(tmp_path, byte_tokenizer, many_parts, monkeypatch):
    source = write_megatron(tmp_path / "a", WITH_EOS, "uint16")
    import_tokens(source, byte_tokenizer, tmp_path / "expected", heldout=0.1)
    read, firsts = token_converter.read_token_documents, []

    def interrupted(span, *arguments):
        firsts.append(span.first)
        if len(firsts) == 8:
            raise KeyboardInterrupt
        return read(span, *arguments)

    monkeypatch.setattr(token_converter, "read_token_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_tokens(source, byte_tokenizer, tmp_path / "out", heldout=0.1)
    with pytest.raises(UserError, match=r"documents eos.*, but these shards were made with .*documents auto"):
        import_tokens(source, byte_tokenizer, tmp_path / "out", heldout=0.1, documents="eos")
    import_tokens(source, byte_tokenizer, tmp_path / "out", heldout=0.1)
    assert firsts[7] == firsts[8] and len(set(firsts)) == len(firsts) - 1
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_wrong_id_in_a_late_part_ends_the_import(tmp_path, byte_tokenizer, many_parts):
    """One of two workers reads it. Other files are another input: what was converted of the wrong ones is not kept."""
    source = write_nanoset(tmp_path / "a.ds", WITH_EOS)
    right = source.read_bytes()
    source.write_bytes(right[:-2] + struct.pack("<H", 300))
    last = len(WITH_EOS) - 1
    with pytest.raises(UserError, match=rf"a\.ds: row {last}, token {len(WITH_EOS[-1]) - 1} is 300, but the tokenizer"):
        import_tokens(source, byte_tokenizer, tmp_path / "out", workers=2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    source.write_bytes(right)
    with pytest.raises(UserError, match=r"inputs=1 files: .*, but these shards were made with 1 files"):
        import_tokens(source, byte_tokenizer, tmp_path / "out", workers=2)


# --- bad input


def changed(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def bad_megatron(change_idx=None, change_bin=None):
    def write(path: Path) -> Path:
        prefix = write_megatron(path / "a", TOKENS)
        for end, change in (("idx", change_idx), ("bin", change_bin)):
            if change:
                changed(path / f"a.{end}", change)
        return prefix

    return write


def bad_nanoset(name: str, change):
    def write(path: Path) -> Path:
        file = write_nanoset(path / "a.ds", TOKENS)
        changed(path / name, change)
        return file

    return write


def bad_dataset(change=None, column="input_ids", some=TOKENS, **columns):
    def write(path: Path) -> Path:
        folder = write_saved_dataset(path / "saved", some, column, **columns)
        if change:
            changed(folder / "data-00000-of-00001.arrow", change)
        return folder

    return write


def bad_mds(change, **options):
    def write(path: Path) -> Path:
        folder = write_mds(path / "mds", SAMPLES, **options)
        change(folder)
        return folder

    return write


def text_mds(path: Path) -> Path:
    from streaming import MDSWriter

    with MDSWriter(out=str(path / "mds"), columns={"tokens": "str"}) as writer:
        writer.write({"tokens": "text"})
    return path / "mds"


def splits_dataset(path: Path) -> Path:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"input_ids": TOKENS})}).save_to_disk(str(path / "all"))
    return path / "all"


def own_shards(path: Path) -> Path:
    (path / "out" / "train").mkdir(parents=True)
    (path / "out" / "manifest.json").write_text('{"format_version": 2}')
    return write_mds(path / "out" / "train", SAMPLES)


BAD = {
    "a truncated .bin": (
        bad_megatron(None, lambda b: b[:-4]),
        r"a.bin: has .* bytes, but its index describes .*not writ",
    ),
    "a .bin of another index": (bad_megatron(None, lambda b: b + b[:4]), r"a.bin: has .* it belongs to another index"),
    "another version": (
        bad_megatron(lambda b: b[:9] + struct.pack("<Q", 2) + b[17:]),
        r"a.idx: has version 2 of the index, but version 1 is read",
    ),
    "a legacy index": (bad_megatron(lambda b: b"TNTIDX\0\0" + b[8:]), r"a.idx: is an index of Megatron-LM before 2020"),
    "another file": (bad_megatron(lambda b: b"PK" + b[2:]), r"a.idx: is not the index of a Megatron data set"),
    "floats": (bad_megatron(lambda b: b[:17] + b"\x07" + b[18:]), r"dtype float32, which tokens do not have"),
    "a truncated .idx": (bad_megatron(lambda b: b[:-1]), r"a.idx: has .* bytes, but its header describes"),
    "a multimodal .idx": (bad_megatron(lambda b: b + bytes(len(TOKENS))), r"is an index of a multimodal data set"),
    "a wrong sequence": (bad_megatron(lambda b: b[:34] + b"\x01" + b[35:]), r"a.idx: sequence 1 does not follow"),
    "unfinished documents": (
        bad_megatron(lambda b: b[:-8] + struct.pack("<q", len(TOKENS) - 1)),
        rf"its documents are sequences 0 to {len(TOKENS) - 1} of {len(TOKENS)}",
    ),
    "a truncated .ds": (bad_nanoset("a.ds", lambda b: b[:-2]), r"a.ds: has .* bytes, but its index describes"),
    "a truncated .ds.index": (bad_nanoset("a.ds.index", lambda b: b[:-1]), r"a.ds.index: has .* not 8 per document"),
    "an unordered .ds.index": (
        bad_nanoset("a.ds.index", lambda b: b[8:16] + b[:8] + b[16:]),
        r"a.ds.index: is not ascending",
    ),
    "other metadata": (
        bad_nanoset("a.ds.metadata", lambda b: b.replace(b"|2", b"|4")),
        r"metadata: describes .* of 4 bytes",
    ),
    "a truncated Arrow file": (bad_dataset(lambda b: b[:-8]), r"arrow: is truncated"),
    "no Arrow file": (bad_dataset(lambda b: b"x" * 20 + b[-8:]), r"arrow: is not an Arrow stream"),
    "text": (bad_dataset(column="text"), r"no column input_ids or tokens; the columns are text; .*`mythos shards`"),
    "strings as tokens": (
        bad_dataset(column="tokens", some=[["a"]]),
        r"column 'tokens' holds list<.*string>, not lists of",
    ),
    "padding": (
        bad_dataset(attention_mask=[[1] * 8 + [0] * (len(row) - 8) for row in TOKENS]),
        r"rows 0 to 59: a row is padded \(its attention_mask has a 0\)",
    ),
    "null": (bad_dataset(some=[[5, None], [6, 7]]), r"rows 0 to 1: a row, or a token of one, is null"),
    "several splits": (splits_dataset, r"holds several splits; name one of them: .*all/train"),
    "a missing shard": (bad_mds(lambda folder: (folder / "shard.00000.mds").unlink()), r"shard.00000.mds is missing"),
    "a truncated shard": (
        bad_mds(lambda folder: changed(folder / "shard.00000.mds", lambda b: b[:-1])),
        r"shard.00000.mds has .* bytes, but index.json says",
    ),
    "a damaged shard": (
        bad_mds(lambda folder: changed(folder / "shard.00000.mds", lambda b: b[:-1] + b"\x01"), hashes=["sha1"]),
        r"shard.00000.mds: is damaged: its sha1 is not the one in index.json",
    ),
    "another dtype": (
        lambda path: write_mds(path / "mds", SAMPLES[:-1], dtype="uint16"),
        r"row 0, token 0 is \d+, but the tokenizer has ids .* --bytes-dtype",
    ),
    "another dtype that does not divide the bytes": (
        lambda path: write_mds(path / "mds", [[5, 6, 7]], dtype="uint16"),
        r"shard.00000.mds: sample 0 cannot be read \(6 bytes are not int64; .*--bytes-dtype",
    ),
    "text in MDS": (text_mds, r"column 'tokens' holds str, not token ids"),
    "no EOS": (
        lambda path: write_mds(path / "mds", TOKENS),
        r"none of its [\d,]+ tokens is EOS \(2\), .* --eos, or, .*--documents stored",
    ),
    "own shards": (own_shards, r"is a folder of shards of mythos_dist"),
    "nothing": (lambda path: path / "none", r"no such file, folder or prefix"),
    "an empty folder": (lambda path: path, r"no token files that are read here: Megatron"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_nothing_is_written(name, tmp_path, byte_tokenizer):
    write, message = BAD[name]
    (tmp_path / "source").mkdir()
    source = write(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        import_tokens(source, byte_tokenizer, tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_all_problems_are_reported_at_once(tmp_path, byte_tokenizer):
    for name in "ab":
        write_megatron(tmp_path / name, TOKENS)
        changed(tmp_path / f"{name}.bin", lambda content: content[:-4])
    with pytest.raises(UserError, match=r"(?s)2 problems.*a\.bin: has .*b\.bin: has"):
        import_tokens([tmp_path / "a", tmp_path / "b"], byte_tokenizer, tmp_path / "out")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(
        UserError, match=r"(?s)3 problems.*format=parquet is not .*documents=rows is not .*a.bin are miss"
    ):
        import_tokens(tmp_path / "a", byte_tokenizer, tmp_path / "out", format="parquet", documents="rows")


def test_rows_that_look_like_windows_are_noted(tmp_path, byte_tokenizer, capsys):
    """And the text that a source begins with is shown."""
    source = write_saved_dataset(tmp_path / "saved", SAMPLES[:-1])
    columns = Columns(tokens=TokenRules())
    convert(source, byte_tokenizer, SEQ_LEN, tmp_path / "out", columns=columns)
    shown = capsys.readouterr().err
    assert "saved begins with 'the quick brown fox jump'" in shown
    assert "begins with rows of 32 tokens each, which become documents; if they are windows of one stream" in shown


@pytest.mark.launch
def test_the_command_imports_and_reports(tmp_path, corpus, tokenizer):
    """A real tokenizer; the shards of the text; exit code 2 for a wrong source."""
    texts = pq.read_table(corpus)["text"].to_pylist()[:40]
    some = [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts]
    prefix = write_megatron(tmp_path / "a", some, "uint16")
    command = [sys.executable, "tools/import_tokens.py", "--tokenizer", str(tokenizer.path), "--seq-len", "64"]
    command += ["--heldout", "0", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, f"{prefix}.bin", "--json"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["token_counts"] == {"read": sum(map(len, some)), "eos": len(some), "left_out": 0}
    stream = [token for row in some for token in row]
    windows = [stream[i : i + 65] for i in range(0, len(stream) // 65 * 65, 65)]
    assert read_windows(tmp_path / "out", "train") == windows
    again = subprocess.run([*command, str(prefix)], capture_output=True, text=True, cwd=REPOSITORY)
    assert again.returncode == 0 and "nothing to do" in again.stderr and "EOS was added to 0 documents" in again.stdout
    bad = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, text=True, cwd=REPOSITORY)
    assert bad.returncode == 2 and "no such file, folder or prefix" in bad.stderr and "Traceback" not in bad.stderr
