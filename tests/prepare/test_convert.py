"""Conversions against a plain loop: each document once, correct counts, the same bytes for any workers and inputs."""

import hashlib
import json
import shutil
import threading
from collections import Counter
from time import sleep

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.conversion import SPLITS, ByteTokenizer, assert_holds, contents, expect, read_windows
from helpers.selection import examples, first_is_quick
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_dist.data.manifest import Filters, Skipped, read_shard_manifest
from mythos_dist.errors import UserError
from mythos_dist.prepare import batches, documents, lines, mds, spans
from mythos_dist.prepare import convert as convert_module
from mythos_dist.prepare import part as part_module
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.corpus import read_documents
from mythos_dist.prepare.part_converter import to_dtype
from mythos_dist.prepare.spans import Columns

WORDS = "the quick brown fox jumps over the lazy dog, naïve 日本 🙂".split()
TEXTS = [" ".join(WORDS[number % 7 :] + [str(number)] * (number % 5)) for number in range(120)]
DOCUMENTS = [(text, None) for text in TEXTS]


def in_parts(some, size):
    return [some[i : i + size] for i in range(0, len(some), size)]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """TEXTS five times: in twelve row groups of two files, JSON lines, compressed JSON lines and plain text."""
    folder = tmp_path_factory.mktemp("texts")
    pq.write_table(pa.table({"text": TEXTS[:60]}), folder / "a.parquet", row_group_size=10)
    pq.write_table(pa.table({"text": TEXTS[60:]}), folder / "b.parquet", row_group_size=10)
    json_lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (folder / "c.jsonl").write_bytes(json_lines)
    (folder / "sub").mkdir()
    (folder / "sub" / "d.jsonl.zst").write_bytes(pa.Codec("zstd").compress(json_lines, asbytes=True))
    (folder / "sub" / "e.txt").write_text("\n".join(TEXTS))
    return folder


FOLDER_PARTS = [*in_parts(DOCUMENTS, 10), DOCUMENTS, DOCUMENTS, DOCUMENTS]  # e.txt by line


def convert_folder(text_folder, tokenizer, out, seq_len=32, **options):
    options = {"heldout": 0.1, "columns": Columns(sample_by="line"), "quiet": True, **options}
    return convert(text_folder, tokenizer, seq_len, out, **options)


@pytest.fixture(scope="module")
def finished(text_folder, byte_tokenizer, tmp_path_factory):
    """A conversion of `text_folder` with a part for each row group. Tests that change it copy it first."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_module, "MIN_PART_BYTES", 1)
        patch.setattr(part_module, "PARTS", 1 << 30)
        convert_folder(text_folder, byte_tokenizer, out)
    return out


# --- against the plain loop


def test_one_part_holds_the_documents_in_order(write_parquet, byte_tokenizer, tmp_path):
    manifest = convert(write_parquet(text=TEXTS), byte_tokenizer, 16, tmp_path / "out", heldout=0.2, quiet=True)
    expected = expect([DOCUMENTS], byte_tokenizer, 16, heldout=0.2)
    assert min(expected.documents.values()) > 5
    assert_holds(tmp_path / "out", manifest, expected)
    assert read_shard_manifest(tmp_path / "out") == manifest


def test_mixed_formats_in_many_parts_hold_the_same_documents(finished, byte_tokenizer):
    manifest = read_shard_manifest(finished)
    assert_holds(finished, manifest, expect(FOLDER_PARTS, byte_tokenizer, 32, heldout=0.1))
    assert [one.name for one in manifest.inputs] == [
        "a.parquet",
        "b.parquet",
        "c.jsonl",
        "sub/d.jsonl.zst",
        "sub/e.txt",
    ]
    assert set(contents(finished)) >= {"manifest.json", "tokenizer.model", "train/part-tails/shard.00000.mds"}
    assert not (finished / "unfinished").exists()


@pytest.mark.launch
def test_streaming_reads_the_same_windows(finished):
    from streaming import StreamingDataset

    for split in SPLITS:
        data = StreamingDataset(local=str(finished / split), batch_size=1)
        assert [data[i]["tokens"].tolist() for i in range(data.num_samples)] == read_windows(finished, split)


@pytest.mark.launch
def test_shards_of_a_trained_tokenizer_decode_to_the_corpus(shards, corpus, tokenizer):
    """Read with streaming; only the end of each split's last document is dropped."""
    from streaming import StreamingDataset

    originals, decoded = list(read_documents(corpus)), []
    manifest = read_shard_manifest(shards)
    for split in SPLITS:
        data = StreamingDataset(local=str(shards / split), batch_size=1)
        tokens = np.concatenate([data[i]["tokens"] for i in range(data.num_samples)])
        *complete, truncated = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)
        decoded += [tokenizer.decode(document[:-1]) for document in complete]
        assert any(text.startswith(tokenizer.decode(truncated)) for text in originals)
        counts = manifest.splits[split]
        assert counts.documents - counts.eos_dropped == len(complete)
    assert len(originals) - 2 <= len(decoded) <= len(originals)
    assert not Counter(decoded) - Counter(originals)
    assert sum(one.tokens for one in manifest.splits.values()) == sum(len(tokenizer.encode(t)) for t in originals)
    assert manifest.inputs[0].hash == f"sha256:{hashlib.sha256(corpus.read_bytes()).hexdigest()}"
    assert manifest.tokenizer_sha256 == hashlib.sha256((shards / "tokenizer.model").read_bytes()).hexdigest()
    assert (manifest.seq_len, manifest.vocab_size, manifest.eos_id) == (64, 1000, tokenizer.eos_id)


@pytest.mark.launch
def test_text_such_as_the_eos_string_is_not_encoded_as_eos(tokenizer, write_parquet, tmp_path):
    texts = ["</s>", "a</s>b <s> <unk> <0x02>", "</s>" * 50] * 10
    manifest = convert(write_parquet(text=texts), tokenizer, 16, tmp_path / "out", heldout=0, quiet=True)
    assert_holds(tmp_path / "out", manifest, expect([[(text, None) for text in texts]], tokenizer, 16))
    num_eos = sum(window.count(tokenizer.eos_id) for window in read_windows(tmp_path / "out", "train"))
    assert num_eos == 30 - manifest.splits["train"].eos_dropped


@pytest.fixture(scope="module")
def property_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("property")


SOME_TEXTS = st.sampled_from(["", "a", "bb", "é", "x" * 30, "🙂" * 20, "a longer text that spans windows " * 3])


@pytest.mark.launch
@settings(max_examples=examples(120))
@given(
    some=st.lists(
        st.tuples(SOME_TEXTS | st.text(max_size=6), st.none() | st.sampled_from([1.0, 2.0, 3.0, float("nan")])),
        max_size=25,
    ),
    rows=st.integers(1, 8),
    seq_len=st.integers(1, 12),
    heldout=st.sampled_from([0.0, 0.3, 0.9]),
    filters=st.builds(
        Filters,
        min_score=st.none() | st.just(2.0),
        min_tokens=st.none() | st.integers(1, 40),
        limit_tokens=st.none() | st.integers(1, 300),
        dedup=st.booleans(),
    ),
    long=st.sampled_from([4, 20, 1 << 20]),
    kind=st.sampled_from(["parquet", "jsonl"]),
)
def test_any_filters_over_any_documents(
    property_folder, byte_tokenizer, some, rows, seq_len, heldout, filters, long, kind
):
    """Long documents in pieces, combined filters, parts whose documents are all left out, any token limit."""
    shutil.rmtree(property_folder / "out", ignore_errors=True)
    file = property_folder / f"a.{kind}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_module, "MIN_PART_BYTES", 1)
        patch.setattr(part_module, "PARTS", 1 << 30)
        for module in (batches, documents):
            patch.setattr(module, "LONG_BYTES", long)
            patch.setattr(module, "BATCH_BYTES", 2 * long)
        patch.setattr("mythos_dist.prepare.part_converter.FRAGMENT_BYTES", max(4, long // 2))
        if kind == "parquet":
            pq.write_table(
                pa.table(
                    {
                        "text": pa.array([text for text, _ in some], pa.string()),
                        "score": pa.array([score for _, score in some], pa.float64()),
                    }
                ),
                file,
                row_group_size=rows,
            )
            parts = in_parts(some, rows)
        else:
            patch.setattr(spans, "TEXT_CHUNK_BYTES", 40 * rows)
            parts, begin, content = {}, 0, []
            for text, score in some:
                content.append(json.dumps({"text": text, "score": score}) + "\n")
                parts.setdefault(begin // (40 * rows), []).append((text, score))
                begin += len(content[-1])
            file.write_text("".join(content))
            parts = list(parts.values())
        names = ("min_score", "min_tokens", "limit_tokens", "dedup")
        expected = expect(parts, byte_tokenizer, seq_len, heldout, **{name: getattr(filters, name) for name in names})

        def run():
            return convert(
                file, byte_tokenizer, seq_len, property_folder / "out", heldout=heldout, filters=filters, quiet=True
            )

        if expected.windows["train"]:
            assert_holds(property_folder / "out", run(), expected)
        else:
            with pytest.raises(UserError, match=r"tokens? of text do(es)? not fill one window"):
                run()
            assert not (property_folder / "out").exists()


# --- workers and order


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    finished, text_folder, byte_tokenizer, tmp_path, part_per_span, workers
):
    convert_folder(text_folder, byte_tokenizer, tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == contents(finished)


@pytest.mark.launch
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"filters": Filters(dedup=True)},
        {"filters": Filters(limit_tokens=2000, min_tokens=30)},
        {"compression": "zstd:5", "filters": Filters(dedup=True, limit_tokens=1000)},
    ],
)
def test_workers_batch_size_and_order_do_not_change_the_result(
    text_folder, byte_tokenizer, tmp_path, part_per_span, workers, options, tiny_pieces
):
    """One process and large batches, against pieces of a few bytes and parts that finish in another order."""
    convert_folder(text_folder, byte_tokenizer, tmp_path / "one", **options)
    tiny_pieces(64)

    class Uneven(ByteTokenizer):
        def encode_documents(self, data, ends, continues=False):
            sleep(0.02 * (workers and len(data) % 3))
            return super().encode_documents(data, ends, continues)

    convert_folder(text_folder, Uneven(byte_tokenizer.path), tmp_path / "two", workers=workers, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.launch
def test_compressed_shards_hold_the_same_windows(finished, text_folder, byte_tokenizer, tmp_path, part_per_span):
    from streaming import StreamingDataset

    manifest = convert_folder(text_folder, byte_tokenizer, tmp_path / "out", compression="zstd")
    assert all(name.endswith((".zstd", ".json", ".model")) for name in contents(tmp_path / "out"))
    assert manifest.compression == "zstd"
    data = StreamingDataset(local=str(tmp_path / "out/train"), batch_size=1)
    assert [data[i]["tokens"].tolist() for i in range(data.num_samples)] == read_windows(finished, "train")


def test_consecutive_spans_form_parts_of_about_equal_size(write_parquet, byte_tokenizer, tmp_path, monkeypatch):
    """30 row groups of about 3000 bytes, parts of 10,000; a part continues in the next file."""
    texts = [np.random.default_rng(number).bytes(150).hex() for number in range(300)]
    for number, name in enumerate("abc"):
        write_parquet(f"{name}.parquet", text=texts[100 * number : 100 * number + 100])
    monkeypatch.setattr(part_module, "MIN_PART_BYTES", 10_000)
    monkeypatch.setattr(mds, "SIZE_LIMIT", 5000)
    manifest = convert(tmp_path, byte_tokenizer, 99, tmp_path / "out", heldout=0, quiet=True)
    folders = sorted((tmp_path / "out/train").glob("part-0*"))
    assert len(folders) == 10
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert max(sizes) < 1.5 * min(sizes)
    parts = in_parts([(text, None) for text in texts], 30)
    assert_holds(tmp_path / "out", manifest, expect(parts, byte_tokenizer, 99))


# --- documents left out


def test_all_duplicates_but_the_first_are_removed(write_parquet, byte_tokenizer, tmp_path, part_per_span):
    """Within a part, across parts, across files of different formats. Without duplicates nothing is removed."""
    write_parquet("a.parquet", rows=3, text=["one", "two", "one", "three", "two", "four"])
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": "fiv\\u0065"}\n{"text": "five"}\n')
    (tmp_path / "c.txt").write_text("one\nsix\nfive\n")
    inputs = [tmp_path / name for name in ("a.parquet", "b.jsonl", "c.txt")]
    options = {"heldout": 0, "filters": Filters(dedup=True), "columns": Columns(sample_by="line"), "quiet": True}
    manifest = convert(inputs, byte_tokenizer, 1, tmp_path / "out", **options)
    parts = [["one", "two", "one"], ["three", "two", "four"], ["four", "five", "five"], ["one", "six", "five"]]
    expected = expect([[(t, None) for t in part] for part in parts], byte_tokenizer, 1, dedup=True)
    assert_holds(tmp_path / "out", manifest, expected)
    assert (manifest.documents.duplicate, manifest.documents.written) == (6, 6)
    write_parquet("once.parquet", text=["one", "two", "three", "four", "five", "six"])
    again = convert(tmp_path / "once.parquet", byte_tokenizer, 1, tmp_path / "again", **options)
    assert (again.documents.duplicate, again.documents.written) == (0, 6)


@pytest.mark.parametrize("workers", first_is_quick([0, 1, 2]))
@pytest.mark.parametrize("limit", [1, 47, 2000, 2001, 10**9])
def test_a_limit_ends_with_the_document_that_reaches_it(
    text_folder, byte_tokenizer, tmp_path, part_per_span, workers, limit
):
    options = {"filters": Filters(limit_tokens=limit), "heldout": 0.0, "seq_len": 8, "workers": workers}
    manifest = convert_folder(text_folder, byte_tokenizer, tmp_path / "out", **options)
    assert_holds(tmp_path / "out", manifest, expect(FOLDER_PARTS, byte_tokenizer, 8, limit_tokens=limit))
    total = sum(one.tokens + one.documents for one in manifest.splits.values())
    assert total >= limit or limit == 10**9
    folders = {folder.name for folder in (tmp_path / "out/train").iterdir()}
    assert folders - {"index.json", "part-tails"} == {
        f"part-{number:05}" for number in range(len(folders - {"index.json", "part-tails"}))
    }


def test_a_limit_beyond_the_corpus_changes_no_shard(finished, text_folder, byte_tokenizer, tmp_path, part_per_span):
    convert_folder(text_folder, byte_tokenizer, tmp_path / "out", filters=Filters(limit_tokens=10**9))
    assert {**contents(tmp_path / "out"), "manifest.json": b""} == {**contents(finished), "manifest.json": b""}


def test_repaired_text_is_counted_and_hashed_as_it_is_written(tmp_path, byte_tokenizer, tiny_pieces):
    """Repaired text decides whether a document is held out or a duplicate, both for long and for short documents."""
    texts = [
        b"bad \xff byte",
        "bad \ufffd byte".encode(),
        b"good",
        b"\xe6\x97",
        *(b"%d \xff" % i * 9 for i in range(40)),
    ]
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary())}), tmp_path / "a.parquet")
    repaired = [(text.decode("utf-8", "replace"), None) for text in texts]
    for size in (1 << 20, 4):
        tiny_pieces(size)
        options = {"heldout": 0.5, "filters": Filters(dedup=True), "quiet": True}
        manifest = convert(tmp_path / "a.parquet", byte_tokenizer, 4, tmp_path / str(size), **options)
        assert_holds(tmp_path / str(size), manifest, expect([repaired], byte_tokenizer, 4, heldout=0.5, dedup=True))
        assert manifest.documents.repaired == 42 and manifest.documents.duplicate == 1


def test_documents_are_held_out_by_their_text_alone(finished, byte_tokenizer, write_parquet, tmp_path):
    """The same documents are held out in another order, another format and with another window size."""
    manifest = convert(write_parquet(text=TEXTS[::-1]), byte_tokenizer, 16, tmp_path / "out", heldout=0.1, quiet=True)
    before = read_shard_manifest(finished)
    for split in SPLITS:
        assert (4 * manifest.splits[split].documents, 4 * manifest.splits[split].tokens) == (
            before.splits[split].documents,
            before.splits[split].tokens,
        )


# --- ids


def test_a_vocabulary_of_more_than_65536_tokens_uses_uint32(write_parquet, data_folder, tmp_path):
    """Ids up to 69,955, which would overflow to 4,419 in uint16."""
    tokenizer = ByteTokenizer(data_folder / "large.model", first=69_700, vocab_size=70_000)
    manifest = convert(write_parquet(text=TEXTS), tokenizer, 16, tmp_path / "out", heldout=0.1, quiet=True)
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_000)
    assert_holds(tmp_path / "out", manifest, expect([DOCUMENTS], tokenizer, 16, heldout=0.1))


def test_ids_outside_the_vocabulary_are_never_written(write_parquet, data_folder, tmp_path):
    for first, vocab_size in [(3, 100), (65_500, 65_536), (-200, 260)]:
        tokenizer = ByteTokenizer(data_folder / "wrong.model", first, vocab_size)
        with pytest.raises(ValueError, match=f"do not fit a vocabulary of {vocab_size}"):
            convert(write_parquet(text=["a\u00ff"] * 100), tokenizer, 4, tmp_path / str(first), quiet=True)
        assert not (tmp_path / str(first) / "manifest.json").exists()
    assert to_dtype(np.array([0, 65_535]), 65_536, "uint16").tolist() == [0, 65_535]
    for token in (65_536, 70_000, -1):
        with pytest.raises(ValueError, match=str(token)):
            to_dtype(np.array([5, token]), 65_536, "uint16")


def test_text_that_is_encoded_as_eos_is_an_error(write_parquet, data_folder, tmp_path):
    tokenizer = ByteTokenizer(data_folder / "spells.model", first=2 - ord("e"))
    with pytest.raises(UserError, match=r"a.parquet: text was encoded as the EOS token 2; use a tokenizer"):
        convert(write_parquet(text=["she"] * 100), tokenizer, 4, tmp_path / "out", heldout=0, quiet=True)


# --- unreadable input


@pytest.fixture
def damaged(tmp_path):
    """Four row groups of which the second is damaged, and four JSON lines of which two are broken."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    table = pa.table({"text": TEXTS[:40]})
    pq.write_table(table, folder / "a.parquet", row_group_size=10, write_page_checksum=True, use_dictionary=False)
    content = bytearray((folder / "a.parquet").read_bytes())
    page = pq.read_metadata(folder / "a.parquet").row_group(1).column(0)
    content[page.data_page_offset + page.total_compressed_size // 2] ^= 0xFF
    (folder / "a.parquet").write_bytes(content)
    (folder / "b.jsonl").write_text('{"text": "good"}\n{"text": 17}\n{"text": "good"}\n{"text\n')
    return folder


def test_unreadable_input_stops_the_conversion_or_is_skipped_and_listed(
    damaged, byte_tokenizer, tmp_path, part_per_span
):
    with pytest.raises(UserError, match=r"a.parquet: row group 1 cannot be read .*--skip-bad") as error:
        convert(damaged, byte_tokenizer, 16, tmp_path / "out", heldout=0, quiet=True)
    assert "\n" not in str(error.value)
    left_out = [("a.parquet", "row group 1"), ("b.jsonl", "line 2"), ("b.jsonl", "line 4")]
    good = [("good", None)] * 2
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        options = {"heldout": 0, "skip_bad": True, "workers": workers, "quiet": True}
        manifest = convert(damaged, byte_tokenizer, 16, out, **options)
        parts = [DOCUMENTS[:10], DOCUMENTS[20:30], DOCUMENTS[30:40], good]
        assert_holds(out, manifest, expect(parts, byte_tokenizer, 16))
        assert [(one.name, one.where) for one in manifest.skipped] == left_out
        assert "skipped: a.parquet, row group 1:" in manifest.summary()
    assert contents(tmp_path / "out0") == contents(tmp_path / "out2")
    convert(damaged, byte_tokenizer, 16, tmp_path / "out", heldout=0, quiet=True, skip_bad=True)  # resumes
    assert contents(tmp_path / "out") == contents(tmp_path / "out0")


def test_duplicates_are_right_when_input_is_skipped(damaged, byte_tokenizer, tmp_path, part_per_span):
    """A part is read twice, for digests and for tokens; both times the same input is skipped."""
    (damaged / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:40]))
    options = {"heldout": 0, "skip_bad": True, "quiet": True, "filters": Filters(dedup=True)}
    manifest = convert(damaged, byte_tokenizer, 16, tmp_path / "out", **options)
    parts = [DOCUMENTS[:10], DOCUMENTS[20:30], DOCUMENTS[30:40], [("good", None)] * 2, DOCUMENTS[:40]]
    assert_holds(tmp_path / "out", manifest, expect(parts, byte_tokenizer, 16, dedup=True))


def test_all_files_that_cannot_be_opened_are_reported_at_once(write_parquet, byte_tokenizer, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    complete = write_parquet(text=TEXTS).read_bytes()
    (folder / "a.parquet").write_bytes(complete)
    (folder / "cut.parquet").write_bytes(complete[:-200])
    (folder / "footer.parquet").write_bytes(complete[:-60] + bytes(52) + complete[-8:])
    (folder / "not.parquet").write_bytes(b"some text")
    pq.write_table(pa.table({"body": ["x"]}), folder / "other.parquet")
    with pytest.raises(UserError) as error:
        convert(folder, byte_tokenizer, 16, tmp_path / "out", workers=2, quiet=True)
    starts = [problem.removeprefix(f"{folder}/").split(":")[0] for problem in error.value.problems]
    assert starts == ["cut.parquet", "footer.parquet", "not.parquet", "other.parquet"]
    assert not (tmp_path / "out").exists()
    manifest = convert(folder, byte_tokenizer, 16, tmp_path / "out", heldout=0, quiet=True, skip_bad=True)
    assert_holds(tmp_path / "out", manifest, expect([DOCUMENTS], byte_tokenizer, 16))
    assert [(one.name, one.where) for one in manifest.skipped] == [(name, "file") for name in starts]
    assert manifest.skipped[3] == Skipped("other.parquet", "file", "no column 'text'; the columns are body")
    assert "" == manifest.inputs[1].hash != manifest.inputs[0].hash


def test_invalid_options_are_refused(write_parquet, byte_tokenizer, tmp_path):
    file = write_parquet(text=TEXTS)
    for options, message in [
        ({"seq_len": 0, "workers": -1}, r"(?s)2 problems.*seq_len=0 must be at least 1.*workers=-1 must not"),
        ({"heldout": 1.0}, "heldout=1.0 is a share"),
        ({"heldout": -0.1}, "heldout=-0.1 is a share"),
        ({"heldout": float("nan")}, "heldout=nan is a share of the documents"),
        ({"heldout": float("inf")}, "heldout=inf is a share"),
        ({"compression": "gzip"}, "compression=gzip is not supported; set it to zstd"),
        ({"compression": "zstd:23"}, "compression=zstd:23 is not supported"),
        ({"filters": Filters(limit_tokens=0, min_tokens=0)}, r"(?s)min_tokens=0 must.*limit_tokens=0 must"),
        ({"inputs": tmp_path / "absent"}, "absent: no such file or folder"),
        ({"columns": Columns("body")}, "no column 'body'; the columns are text"),
        ({"filters": Filters(min_score=1.0)}, "no column 'score'; the columns are text"),
        ({"seq_len": 10**6}, r"\d+ tokens of text do not fill one window of seq_len=1000000; give more text or a"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(
                **{
                    "inputs": file,
                    "tokenizer": byte_tokenizer,
                    "seq_len": 16,
                    "out": tmp_path / "out",
                    "quiet": True,
                    **options,
                }
            )
        assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"], options
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="out: 0 tokens of text do not fill one window"):
        convert(tmp_path / "empty.jsonl", byte_tokenizer, 16, tmp_path / "out", quiet=True)


# --- folders


def test_converting_again_changes_nothing_and_reports_it(finished, text_folder, byte_tokenizer, part_per_span, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    manifest = read_shard_manifest(finished)
    assert convert_folder(text_folder, byte_tokenizer, finished) == manifest
    assert capsys.readouterr() == ("", "")
    assert convert_folder(text_folder, byte_tokenizer, finished, quiet=False, workers=2) == manifest
    assert capsys.readouterr().err == f"{finished}: already converted with these settings; nothing to do\n"
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


OTHER_SETTINGS = [
    ({"seq_len": 64}, "seq_len=64, but these shards were made with 32"),
    ({"heldout": 0.2}, "heldout=0.2, but these shards were made with 0.1"),
    ({"compression": "zstd"}, "compression=zstd, but these shards were made with None"),
    ({"columns": Columns("body", sample_by="line")}, "text_column=body, but these shards were made with text"),
    ({"columns": Columns()}, "sample_by=document, but these shards were made with line"),
    ({"filters": Filters(dedup=True)}, "filters=.*dedup True, but these shards were made with .*dedup False"),
    ({"filters": Filters(limit_tokens=99)}, "filters=.*limit_tokens 99, .*limit_tokens None"),
]


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_conversion_with_other_settings_is_refused_with_the_differences(
    finished, text_folder, byte_tokenizer, data_folder, tmp_path, unfinished
):
    """Whether the conversion in the folder is finished or not."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    if unfinished:
        settings_of = read_shard_manifest(out).to_json()
        (out / "manifest.json").unlink()
        (out / "unfinished").mkdir()
        (out / "unfinished" / "settings.json").write_text(json.dumps(settings_of))
    before = contents(out)

    def refused(message, inputs=text_folder, tokenizer=byte_tokenizer, **options):
        with pytest.raises(UserError, match=f"(?s)out: .*{message}.*name another folder, or delete this one"):
            convert_folder(inputs, tokenizer, out, **options)
        assert contents(out) == before

    for options, message in OTHER_SETTINGS:
        if options.get("columns") == Columns("body", sample_by="line"):
            continue  # the inputs have no such column
        refused(message, **options)
    refused("inputs=1 files: a.parquet .*made with 5 files: a.parquet", text_folder / "a.parquet")
    other = data_folder / "other.model"
    other.write_text("another")
    refused("tokenizer_sha256=", tokenizer=ByteTokenizer(other))
    refused("vocab_size=300, but .* 260", tokenizer=ByteTokenizer(byte_tokenizer.path, vocab_size=300))
    changed = tmp_path / "changed"
    shutil.copytree(text_folder, changed)
    (changed / "sub/e.txt").write_bytes((changed / "sub/e.txt").read_bytes().replace(b"dog", b"cat", 1))
    refused("inputs=5 files:", changed)
    shutil.move(changed / "sub/e.txt", changed / "sub/f.txt")
    refused("inputs=5 files:", changed)


def test_a_folder_with_other_content_is_refused_and_not_changed(text_folder, byte_tokenizer, tmp_path):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (tmp_path / "file").write_text("a file")
    for name in ("chapter1.txt", "manifest.json.tmp", "train", "4", "5"):
        (thesis / name).write_text("years of work")
        before = contents(tmp_path)
        with pytest.raises(UserError, match=r"thesis: contains .*, which is not the output of a conv"):
            convert_folder(text_folder, byte_tokenizer, thesis)
        with pytest.raises(UserError, match="file: is a file; name a folder"):
            convert_folder(text_folder, byte_tokenizer, tmp_path / "file")
        assert contents(tmp_path) == before
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(UserError, match="format_version=1 is not 2: another version"):
        convert_folder(text_folder, byte_tokenizer, tmp_path / "old")


def test_an_empty_output_folder_is_treated_as_a_missing_one(
    finished, text_folder, byte_tokenizer, tmp_path, part_per_span
):
    (tmp_path / "deep/er").mkdir(parents=True)
    convert_folder(text_folder, byte_tokenizer, tmp_path / "deep/er")
    convert_folder(text_folder, byte_tokenizer, tmp_path / "not/yet")
    assert contents(tmp_path / "deep/er") == contents(tmp_path / "not/yet") == contents(finished)


class Interrupted(ByteTokenizer):
    """Raises KeyboardInterrupt after `calls` calls."""

    def __init__(self, path, calls=10**9):
        super().__init__(path)
        self.calls = calls

    def encode_documents(self, data, ends, continues=False):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().encode_documents(data, ends, continues)


@pytest.fixture
def interrupted(text_folder, byte_tokenizer, tmp_path, part_per_span):
    """A conversion that was interrupted in its tenth part of 15."""
    with pytest.raises(KeyboardInterrupt):
        convert_folder(text_folder, Interrupted(byte_tokenizer.path, 9), tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    return tmp_path / "out"


def test_an_interrupted_conversion_resumes(interrupted, finished, text_folder, byte_tokenizer, capsys):
    with pytest.raises(UserError, match="not a finished conversion"):
        read_shard_manifest(interrupted)
    tokenizer = Interrupted(byte_tokenizer.path)
    convert_folder(text_folder, tokenizer, interrupted, quiet=False)
    assert 10**9 - tokenizer.calls == len(FOLDER_PARTS) - 9
    assert contents(interrupted) == contents(finished)
    assert "converting: resuming, " in capsys.readouterr().err


def test_incomplete_and_foreign_files_in_an_unfinished_folder_do_no_harm(
    interrupted, finished, text_folder, byte_tokenizer
):
    """Half-written parts and JSON files are replaced; files of other programs are kept."""
    (interrupted / "train/part-00011.tmp").mkdir()
    (interrupted / "train/part-00011.tmp/shard.00000.mds").write_bytes(b"half")
    (interrupted / "train/part-00012").mkdir()
    (interrupted / "train/part-00012/shard.00007.mds").write_bytes(b"half")
    (interrupted / "train/part-99999.tmp").mkdir()
    (interrupted / "train/part-tails").mkdir()
    (interrupted / "train/part-tails/shard.00000.mds").write_bytes(b"half")
    for name in ("manifest.json.tmp", "train/index.json.tmp", "train/index.json", "unfinished/part-00011.json.tmp"):
        (interrupted / name).write_text("half")
    (interrupted / "unfinished/part-00012.json").write_text('{"limit": nul')
    (interrupted / "unfinished/part-00013.json").write_text("{}")
    foreign = {
        "notes.json": b'{"shards": []}',
        "train/foreign.json": b'{"version": 2, "shards": [{}]}',
        "train/part-a.json": b"[]",
    }
    for name, content in foreign.items():
        (interrupted / name).write_bytes(content)
    manifest = convert_folder(text_folder, byte_tokenizer, interrupted)
    assert contents(interrupted) == {**contents(finished), **foreign}
    assert_holds(interrupted, manifest, expect(FOLDER_PARTS, byte_tokenizer, 32, heldout=0.1))


@pytest.mark.parametrize("damage", ["shortened", "missing", "lengthened", "folder missing"])
def test_a_finished_part_with_a_damaged_file_is_converted_again(
    interrupted, finished, text_folder, byte_tokenizer, damage
):
    file = interrupted / "train/part-00003/shard.00000.mds"
    if damage == "missing":
        file.unlink()
    elif damage == "folder missing":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "shortened" else file.read_bytes() + b"x")
    tokenizer = Interrupted(byte_tokenizer.path)
    convert_folder(text_folder, tokenizer, interrupted)
    assert 10**9 - tokenizer.calls == len(FOLDER_PARTS) - 8
    assert contents(interrupted) == contents(finished)


def test_an_index_that_changed_after_the_conversion_is_refused(finished, text_folder, byte_tokenizer, tmp_path):
    for change in ("rewritten", "removed"):
        out = tmp_path / change
        shutil.copytree(finished, out)
        index = out / "heldout/index.json"
        index.unlink() if change == "removed" else index.write_text(index.read_text() + " ")
        with pytest.raises(UserError, match=r"index\.json changed after the conversion; delete the folder"):
            convert_folder(text_folder, byte_tokenizer, out)


def test_two_conversions_do_not_write_to_one_folder(interrupted, finished, text_folder, byte_tokenizer):
    """The first is in the middle of a part when the second starts. A lock file without a lock has no effect."""
    entered, leave = threading.Event(), threading.Event()

    class Slow(ByteTokenizer):
        def encode_documents(self, data, ends, continues=False):
            entered.set()
            assert leave.wait(240)
            return super().encode_documents(data, ends, continues)

    first = threading.Thread(target=convert_folder, args=(text_folder, Slow(byte_tokenizer.path), interrupted))
    first.start()
    assert entered.wait(240)
    with pytest.raises(UserError, match="out: another conversion is writing here; wait for it, or stop it"):
        convert_folder(text_folder, byte_tokenizer, interrupted)
    leave.set()
    first.join(240)
    assert contents(interrupted) == contents(finished)


def test_a_conversion_that_completes_while_another_starts_is_not_changed(
    interrupted, finished, text_folder, byte_tokenizer, monkeypatch
):
    """The other one reads the state of the folder before the first completes, and gets the lock afterwards."""
    lock_output = convert_module.lock_output

    def complete_and_lock(out):
        monkeypatch.setattr(convert_module, "lock_output", lock_output)
        convert_folder(text_folder, byte_tokenizer, interrupted)
        return lock_output(out)

    monkeypatch.setattr(convert_module, "lock_output", complete_and_lock)
    tokenizer = Interrupted(byte_tokenizer.path)
    assert convert_folder(text_folder, tokenizer, interrupted) == read_shard_manifest(interrupted)
    assert tokenizer.calls == 10**9
    assert contents(interrupted) == contents(finished)


def test_problems_of_a_manifest_are_reported(finished, tmp_path):
    with pytest.raises(UserError, match=r"no shards here; .* make them with `mythos shards`"):
        read_shard_manifest(tmp_path)
    complete = json.loads((finished / "manifest.json").read_text())
    without_counts = {**complete, "splits": {"train": complete["splits"]["train"]}}
    for content in ("{", "[]", "{}", json.dumps(without_counts), json.dumps({**complete, "unknown": 1})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest.json: cannot be read .*; convert again"):
            read_shard_manifest(tmp_path)


def test_long_lines_and_long_documents_are_the_same_in_every_format(tmp_path, byte_tokenizer, tiny_pieces):
    """A text of 60 kB with multi-byte characters, in pieces of 100 bytes."""
    text = "".join(f"{'x' * (number % 9)}🙂é " for number in range(5000))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False))
    (tmp_path / "a.txt").write_text(text)
    tiny_pieces(100)
    expected = expect([[(text, None)]], byte_tokenizer, 64)
    assert lines.LONG_BYTES == 100
    for name in ("a.parquet", "a.jsonl", "b.jsonl", "a.txt"):
        manifest = convert(tmp_path / name, byte_tokenizer, 64, tmp_path / f"{name}.out", heldout=0, quiet=True)
        assert_holds(tmp_path / f"{name}.out", manifest, expected)
