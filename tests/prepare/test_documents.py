"""Every format gives the same documents, each once, wherever files are split; broken parts are reported."""

import codecs
import gzip
import json
import math
import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.selection import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_dist.errors import UserError
from mythos_dist.prepare import batches, documents, inputs, lines, spans
from mythos_dist.prepare.batches import LongDocument, valid_utf8
from mythos_dist.prepare.documents import read_span
from mythos_dist.prepare.listing import find_sources
from mythos_dist.prepare.spans import Columns, divide_file

TEXTS = [
    *("first", "", "naïve 日本語 🙂", "two\\nlines\r\nand a tab\t", 'a "quoted" \\ text', "x" * 5000, " ", "</s>\0"),
    *(f"document {number}" for number in range(20)),
]


def compress(suffix, content):
    """Compress in two frames or members, as tools for parallel compression do."""
    half = len(content) // 2
    if suffix == ".gz":
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if suffix == ".zst":
        return b"".join(pa.Codec("zstd").compress(some, asbytes=True) for some in (content[:half], content[half:]))
    return content


def read(path, columns=None, skip=False, span_chunks=1):
    """[(document as bytes, score, whether repaired)] of all spans, and [(where, reason)] of what was skipped.

    Spans are `span_chunks` chunks long. Raises UserError for unreadable input unless `skip`.
    """
    columns, skipped = columns or Columns(), []
    documents_read = []

    def on_bad(where, reason):
        if not skip:
            raise UserError(f"{where}: {reason}")
        skipped.append((where, reason))

    for source in find_sources(path):
        chunks = divide_file(source, columns)
        for first in range(0, len(chunks.sizes), span_chunks):
            last = min(first + span_chunks, len(chunks.sizes))
            for batch in read_span(chunks.span(first, last), columns, on_bad):
                if isinstance(batch, LongDocument):
                    pieces = list(valid_utf8(batch.pieces()))
                    content = b"".join(piece.tobytes() for piece, _ in pieces)
                    documents_read.append((content, batch.score, any(repaired for _, repaired in pieces)))
                    continue
                assert batch.data.dtype == np.uint8 and batch.ends.dtype == np.int64
                scores = [math.nan] * len(batch.ends) if batch.scores is None else batch.scores.tolist()
                start = 0
                for end, score, repaired in zip(batch.ends.tolist(), scores, batch.repaired.tolist(), strict=True):
                    documents_read.append((batch.data[start:end].tobytes(), score, repaired))
                    start = end
                assert start == len(batch.data)
    return documents_read, skipped


def texts_of(path, columns=None, **options):
    return [content.decode() for content, _, _ in read(path, columns, **options)[0]]


# --- formats


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("rows", [3, 1000])
def test_parquet_with_every_string_type(tmp_path, kind, rows):
    """Also if text is the last of several columns. Nulls are empty documents."""
    texts = pa.array([*(text.encode() for text in TEXTS), None], pa.binary()).cast(kind)
    table = pa.table({"id": range(len(texts)), "nested": [{"text": 1}] * len(texts), "text": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows)
    assert texts_of(tmp_path / "a.parquet") == [*TEXTS, ""]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_and_plain_text_compressed_or_not(tmp_path, suffix):
    """JSON with and without escapes, other keys, blank lines; plain text by line and by file."""
    records = [
        json.dumps({"id": 1, "text": t, "meta": {"text": 2}}, ensure_ascii=i % 2 > 0) for i, t in enumerate(TEXTS)
    ]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(suffix, "\n \n\r\n".join(records).encode()))
    assert texts_of(tmp_path / f"a.jsonl{suffix}") == TEXTS
    plain = [text for text in TEXTS if "\n" not in text]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(suffix, "\r\n".join(plain).encode()))
    assert texts_of(tmp_path / f"a.txt{suffix}", Columns(sample_by="line")) == plain
    (tmp_path / f"b.md{suffix}").write_bytes(compress(suffix, "\n".join(TEXTS).encode()))
    assert texts_of(tmp_path / f"b.md{suffix}") == ["\n".join(TEXTS)]


def test_another_key_and_empty_files(tmp_path, write_parquet):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": 3}\n{"body": null}')
    assert texts_of(tmp_path / "a.jsonl", Columns("body")) == ["x", ""]
    assert texts_of(write_parquet(body=["x"], text=[3]), Columns("body")) == ["x"]
    (tmp_path / "e.jsonl").touch()
    (tmp_path / "e.txt").touch()
    assert texts_of(tmp_path / "e.jsonl") == texts_of(tmp_path / "e.txt", Columns(sample_by="line")) == []
    assert texts_of(tmp_path / "e.txt") == [""]
    assert texts_of(write_parquet("e.parquet", text=pa.array([], pa.string()))) == []


def test_a_large_row_group_is_read_in_batches_and_a_large_document_in_pieces(tmp_path, tiny_pieces):
    tiny_pieces(1000)
    texts = [random.Random(number).randbytes(200).hex() for number in range(500)]
    texts[100] = texts[200] = "y" * 100_000
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1000)
    chunks = divide_file(*find_sources(tmp_path), Columns())
    assert len(chunks.sizes) == 1
    read_batches = list(read_span(chunks.span(0, 1), Columns(), pytest.fail))
    long_documents = [batch for batch in read_batches if isinstance(batch, LongDocument)]
    assert len(long_documents) == 2
    assert max(len(batch.data) for batch in read_batches if not isinstance(batch, LongDocument)) <= 2000
    assert max(len(piece) for document in long_documents for piece in document.pieces()) <= 1000
    assert texts_of(tmp_path / "a.parquet") == texts


# --- lines split anywhere


@pytest.fixture(scope="module")
def line_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lines")


LINES = st.lists(st.text("ab\r\u00e9日 ", max_size=12), max_size=12)


@settings(max_examples=examples(150))
@given(
    texts=LINES,
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\n\n"]), min_size=12, max_size=12),
    last_end=st.booleans(),
    grain=st.integers(1, 40),
    span_chunks=st.integers(1, 4),
    piece=st.integers(1, 20),
)
def test_lines_split_anywhere_are_neither_lost_nor_repeated(
    line_folder, texts, ends, last_end, grain, span_chunks, piece
):
    """Spans of one or more chunks of `grain` bytes, read `piece` bytes at a time, against str.split."""
    content = "".join(text + end for text, end in zip(texts, ends, strict=False))
    if not last_end:
        content = content.rstrip("\n")
    file = line_folder / "a.txt"
    file.write_bytes(content.encode())
    *complete, last = content.split("\n")
    expected = [line.removesuffix("\r") for line in complete] + ([last] if last else [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "TEXT_CHUNK_BYTES", grain)
        patch.setattr(inputs, "READ_BYTES", piece)
        assert texts_of(file, Columns(sample_by="line"), span_chunks=span_chunks) == expected


@settings(max_examples=examples(100))
@given(
    texts=st.lists(st.text(max_size=80) | st.text('"\\ a', max_size=120), max_size=8),
    grain=st.integers(1, 300),
    long=st.integers(24, 200),  # long strings have more than a quarter of it; no key may be that long
    ascii_only=st.booleans(),
)
def test_json_lines_with_long_strings_read_as_json_reads_them(line_folder, texts, grain, long, ascii_only):
    """Long lines have their own parser; here it reads every line of more than `long` bytes."""
    file = line_folder / "a.jsonl"
    records = [{"id": "i" * (i % 3), "text": text, "after": [text[:3]]} for i, text in enumerate(texts)]
    content = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "TEXT_CHUNK_BYTES", grain)
        for module in (batches, documents, lines):
            patch.setattr(module, "LONG_BYTES", long)
        documents_read, _ = read(file)
    assert [text.decode() for text, _, _ in documents_read] == texts
    assert not any(repaired for _, _, repaired in documents_read)


# --- text that is not UTF-8

BROKEN = [b"caf\xc3\xa9", b"\xff", b"cut \xe6\x97", b"\xed\xa0\x80 surrogate", b"", b"\xc3", b"\xa9", b"whole"]


def test_bad_bytes_become_u_fffd_document_by_document(tmp_path):
    """Like bytes.decode; the two halves of a character in two documents are not joined."""
    expected = [text.decode("utf-8", "replace") for text in BROKEN]
    pq.write_table(pa.table({"text": pa.array(BROKEN, pa.binary())}), tmp_path / "a.parquet")
    unchecked = pa.array(BROKEN, pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": unchecked}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"\n".join(BROKEN))
    for name in "a.parquet", "b.parquet", "c.txt":
        documents_read, _ = read(tmp_path / name, Columns(sample_by="line"))
        assert [text.decode() for text, _, _ in documents_read] == expected
        assert [repaired for _, _, repaired in documents_read] == ["\ufffd" in text for text in expected]


def test_lone_surrogates_in_json_become_u_fffd(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        rb'{"text": "pair \ud83d\ude42"}'
        b"\n"
        rb'{"text": "alone \ud800 x"}'
        b"\n"
        rb'{"text": "\ude42\ud83d"}'
        b'\n{"text": "byte \xff"}\n'
    )
    documents_read, _ = read(tmp_path / "a.jsonl")
    assert [text.decode() for text, _, _ in documents_read] == [
        "pair 🙂",
        "alone \ufffd x",
        "\ufffd\ufffd",
        "byte \ufffd",
    ]
    assert [repaired for _, _, repaired in documents_read] == [False, True, True, True]


@given(content=st.binary(max_size=40) | st.text(max_size=20).map(str.encode), cuts=st.sets(st.integers(1, 39)))
def test_characters_split_between_pieces_are_joined(content, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    pieces = list(valid_utf8(content[a:b] for a, b in pairwise(edges) if b > a))
    assert b"".join(piece.tobytes() for piece, _ in pieces).decode() == content.decode("utf-8", "replace")
    for piece, _ in pieces:
        piece.tobytes().decode()  # each piece is valid by itself
    is_valid = codecs.decode(content, "utf-8", "ignore").encode() == content
    assert any(repaired for _, repaired in pieces) == (not is_valid)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt", "a.jsonl", "a.txt.gz"])
def test_a_long_document_read_in_pieces_equals_one_read_at_once(tmp_path, tiny_pieces, name):
    """With invalid bytes and characters of four bytes at the boundaries of pieces."""
    content = b"".join(b"x" * (number % 7) + "🙂é".encode() + b"\xf0\x9f" * (number % 2) for number in range(300))
    expected = content.decode("utf-8", "replace")
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([content], pa.binary())}), tmp_path / name)
    elif name == "a.jsonl":
        text = content.decode("utf-8", "ignore")
        (tmp_path / name).write_text(json.dumps({"text": text}))
        expected = text
    else:
        (tmp_path / name).write_bytes(compress(name[5:], content))
    read_at_once = texts_of(tmp_path / name)
    tiny_pieces(97)
    assert texts_of(tmp_path / name) == read_at_once == [expected]


# --- scores


def test_scores_of_every_type_are_read_and_missing_ones_are_nan(tmp_path, write_parquet):
    columns = Columns(score="score")

    def scores(path):
        return [None if math.isnan(score) else score for _, score, _ in read(path, columns)[0]]

    assert scores(write_parquet(text=["a"] * 4, score=[1.5, None, math.nan, -2.0])) == [1.5, None, None, -2]
    assert scores(write_parquet(text=["a"] * 2, score=[3, None])) == [3, None]
    assert scores(write_parquet(text=["a"] * 2, score=pa.array([0.5, 4], pa.float32()))) == [0.5, 4]
    values = ["4", "4.5", "null", "NaN", '" 5.5"', "1" + "0" * 400, '"high"', "[1]", "true", '""']
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "a", "score": {value}}}\n' for value in values) + '{"text": ""}'
    )
    documents_read, skipped = read(tmp_path / "a.jsonl", columns, skip=True)
    assert [None if math.isnan(score) else score for _, score, _ in documents_read] == [
        4,
        4.5,
        None,
        None,
        5.5,
        1,
        None,
        None,
    ]
    assert [where for where, _ in skipped] == ["line 6", "line 7", "line 8"]


# --- unreadable input


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "url": ["y"]}, "no column 'text'; the columns are body, url"),
        ({"text": [1, 2]}, "column 'text' holds int64, not strings"),
        ({"text": [["a"]]}, "column 'text' holds list<.*>, not strings"),
        ({"text": ["a"], "score": [[1.0]]}, "column 'score' holds list<.*>, not numbers"),
        ({"text": [{"en": "a"}]}, "column 'text' holds struct<en: string>, not strings"),
        ({"text": ["a"]}, "no column 'score'; the columns are text"),
    ],
)
def test_a_parquet_file_with_other_columns_is_refused(write_parquet, columns, message):
    (source,) = find_sources(write_parquet(**columns))
    with pytest.raises(UserError, match=f"a.parquet: {message}"):
        divide_file(source, Columns(score="score" if "score" in message else None))


def test_plain_text_has_no_scores(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a.txt: plain text has no score;"):
        divide_file(*find_sources(tmp_path), Columns(score="score"))


def test_incomplete_parquet_files_are_refused(tmp_path, corpus):
    complete = corpus.read_bytes()
    zeroed_footer = complete[:-100] + bytes(92) + complete[-8:]
    for content in (b"hello", b"", complete[:100_000], complete[:-1], b"PAR1" + bytes(100) + b"PAR1", zeroed_footer):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"a.parquet: cannot be read \((ArrowInvalid|OSError)"):
            divide_file(*find_sources(tmp_path), Columns())


def damage(file, group):
    """Overwrite the middle of a row group's text with zeros; the footer is not changed."""
    chunk = pq.read_metadata(file).row_group(group).column(0)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(file.read_bytes())
    middle = begin + chunk.total_compressed_size // 2
    content[middle : middle + 40] = bytes(40)
    file.write_bytes(content)


@pytest.mark.parametrize("compression", ["zstd", "gzip", "snappy"])
def test_a_damaged_page_is_reported_and_the_other_row_groups_are_read(tmp_path, compression):
    texts = [random.Random(number).randbytes(30).hex() for number in range(400)]
    file = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "row_group_size": 100, "compression": compression}
    pq.write_table(pa.table({"text": texts}), file, write_page_checksum=True, **options)
    damage(file, 2)
    with pytest.raises(UserError, match=r"row group 2: .*CRC"):
        read(file)
    documents_read, skipped = read(file, skip=True, span_chunks=4)
    assert [text.decode() for text, _, _ in documents_read] == texts[:200] + texts[300:]
    assert [where for where, _ in skipped] == ["row group 2"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "zeroed", "not compressed"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_compressed_file_that_cannot_be_decompressed_completely(tmp_path, suffix, damage, name, tiny_pieces):
    """Of JSON lines, all lines before the damage are kept; a file that is one document is skipped entirely."""
    texts = [random.Random(number).randbytes(30).hex() for number in range(400)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if suffix == ".gz":
        compressed = bytearray(gzip.compress(content))
    else:  # with a checksum, as the command zstd writes it
        stream = pa.BufferOutputStream()
        with pa.CompressedOutputStream(stream, "zstd") as out:
            out.write(content)
        compressed = bytearray(stream.getvalue().to_pybytes())
    if damage == "truncated":
        del compressed[-20:]
    elif damage == "zeroed":
        compressed[len(compressed) // 2 :] = bytes(len(compressed) - len(compressed) // 2)
    else:
        compressed = bytearray(content)
    file = tmp_path / f"{name}{suffix}"
    file.write_bytes(compressed)
    for size in (1 << 20, 1000):
        tiny_pieces(size)
        with pytest.raises(UserError, match=r"(what follows )?line \d+|file" if name == "a.jsonl" else "file: "):
            read(file)
        documents_read, skipped = read(file, skip=True)
        if (damage, suffix, name) == ("zeroed", ".gz", "a.jsonl"):  # gzip detects wrong text only by the checksum
            documents_read = documents_read[:150]
        else:
            assert len(skipped) == 1
        assert [text.decode() for text, _, _ in documents_read] == (
            [] if name == "a.txt" else texts[: len(documents_read)]
        )
        if (damage, suffix, name) == ("truncated", ".gz", "a.jsonl"):
            assert len(documents_read) == 399 and skipped[0][0] == "what follows line 399"


def test_each_broken_json_line_is_reported_with_its_number(tmp_path):
    good = b'{"text": "good"}\n'
    broken = {
        b'{"text": "never ends\n': r"not JSON \(Unterminated string",
        b'{"txt": "x", "id": 1}\n': r"no key 'text'; there is: txt, id",
        b'{"text": 17}\n': r"key 'text' holds int, not text",
        b'{"text": {"\\u0000": 0}}\n': r"key 'text' holds dict, not text",
        b'["text"]\n': r"no key 'text'; there is: list",
        b"\xff\xfe\n": r"not JSON",
        b"[" * 20_000 + b"\n": r"not JSON \(maximum recursion",
    }
    (tmp_path / "a.jsonl").write_bytes(b"".join(good + line for line in broken) + good)
    documents_read, skipped = read(tmp_path / "a.jsonl", skip=True)
    assert [text for text, _, _ in documents_read] == [b"good"] * (len(broken) + 1)
    for number, ((line, reason), (where, _)) in enumerate(zip(broken.items(), skipped, strict=True)):
        assert where == f"line {2 * number + 2}"
        (tmp_path / "b.jsonl").write_bytes(line)
        with pytest.raises(UserError, match=f"line 1: {reason}"):
            read(tmp_path / "b.jsonl")


LONG_AND_BROKEN = [
    b'{"text": "a wrong \\x escape %s"}' % (b"x " * 50),
    b'{"text": "a wrong escape at the end %s\\ud8"}' % (b"x " * 50),
    b'{"text": "%s", }' % (b"y" * 100),
    b'{"text": "%s}' % (b"z" * 100),
    b'{"body": "%s"}' % (b"z" * 100),
]


@pytest.mark.parametrize("long", [40, 1 << 20])
@pytest.mark.parametrize("line", LONG_AND_BROKEN)
def test_a_broken_long_line_is_reported_before_any_of_it_is_used(tmp_path, tiny_pieces, long, line):
    tiny_pieces(long)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n" + b'{"text": "good"}\n')
    documents_read, skipped = read(tmp_path / "a.jsonl", skip=True)
    assert [text for text, _, _ in documents_read] == [b"good", b"good"]
    assert [where for where, _ in skipped] == ["line 2"]
