"""Columns of every type, encodings, and compressed files that are truncated, empty or expand too much."""

import bz2
import dataclasses
import decimal
import gzip
import io
import json
import lzma
import math
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.conversion import contents

from mythos_dist.data.decompress import TooLarge, decompress
from mythos_dist.data.manifest import Filters
from mythos_dist.errors import UserError
from mythos_dist.prepare import batches, documents, inputs, lines, spans
from mythos_dist.prepare.batches import LongDocument
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.documents import read_span
from mythos_dist.prepare.encoding import check_encoding
from mythos_dist.prepare.lines import lines_before
from mythos_dist.prepare.listing import find_sources, list_inputs
from mythos_dist.prepare.spans import Columns, divide_file


def zstd(content):
    """With a checksum, as the command zstd writes it."""
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as out:
        out.write(content)
    return stream.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}


def read(path, columns=None, skip=True, **options):
    """([(text, score)], [(where, reason)]): the documents, and what was skipped."""
    columns, records_read, skipped = columns or Columns(), [], []

    def on_bad(where, reason):
        if not skip:
            raise UserError(f"{where}: {reason}")
        skipped.append((where, reason))

    for source in list_inputs(path, **options).sources:
        source = dataclasses.replace(source, only_intact=skip)
        chunks = divide_file(source, columns)
        for i in range(len(chunks.sizes)):
            for batch in read_span(chunks.span(i, i + 1), columns, on_bad):
                if isinstance(batch, LongDocument):
                    records_read.append((b"".join(map(bytes, batch.pieces())).decode(), batch.score))
                    continue
                scores = [math.nan] * len(batch.ends) if batch.scores is None else batch.scores.tolist()
                texts = np.split(batch.data, batch.ends[:-1]) if len(batch.ends) else []
                records_read += [(text.tobytes().decode(), score) for text, score in zip(texts, scores, strict=True)]
    return records_read, skipped


def texts_of(path, columns=None, **options):
    records_read, skipped = read(path, columns, **options)
    assert not skipped, skipped
    return [text for text, _ in records_read]


# --- columns

TEXTS = ["naïve", "", None, "a longer text of more than twelve bytes"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS).cast(pa.string_view()),
        pa.array(TEXTS).cast(pa.binary()).cast(pa.binary_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_every_type_of_text_column_is_read(write_parquet, column):
    assert texts_of(write_parquet(text=column)) == [text or "" for text in TEXTS]


def test_a_column_of_nulls_holds_empty_documents(write_parquet, byte_tokenizer, tmp_path):
    """pandas writes such a column for a file in which no row has a text."""
    write_parquet("a.parquet", text=pa.array([None] * 3, pa.null()))
    write_parquet("b.parquet", text=["some text"])
    inputs = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    manifest = convert(inputs, byte_tokenizer, 4, tmp_path / "out", heldout=0, quiet=True)
    assert (manifest.documents.empty, manifest.documents.written) == (3, 1)


@pytest.mark.parametrize(
    "scores, expected",
    [
        (pa.array([decimal.Decimal("2.50"), None]), [2.5, None]),
        (pa.array([" 2.5", ""]), [2.5, None]),
        (pa.array(["2.5", "nan"]).cast(pa.string_view()), [2.5, None]),
        (pa.array([True, False]), [1, 0]),
        (pa.array([2.5, None], pa.float16()), [2.5, None]),
        (pa.array([2**64 - 1, 0], pa.uint64()), [2.0**64, 0]),
        (pa.array([None, None], pa.null()), [None, None]),
        (pa.array([2.5, None]).dictionary_encode(), [2.5, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_every_type_of_score_column_is_read(write_parquet, scores, expected):
    records_read, skipped = read(write_parquet(text=["a", "b"], score=scores), Columns(score="score"))
    assert [None if math.isnan(score) else score for _, score in records_read] == expected and not skipped


def test_a_score_that_is_not_a_number_is_reported_and_only_its_row_skipped(write_parquet, byte_tokenizer, tmp_path):
    """It is not counted as a low score."""
    write_parquet(rows=2, text=["a" * 20, "b" * 20, "c" * 20, "d" * 20], score=["4", "5", "high", "3.5"])
    (tmp_path / "b.jsonl").write_text('{"text": "eeeeeeee", "score": "5"}\n{"text": "f", "score": "low"}\n')
    options = {"heldout": 0, "quiet": True, "filters": Filters(min_score=4)}
    with pytest.raises(
        UserError, match=r"row group 1, row 0 cannot be read \(column 'score': 'high' is not a number\)"
    ):
        convert(tmp_path / "a.parquet", byte_tokenizer, 4, tmp_path / "out", **options)
    manifest = convert(tmp_path, byte_tokenizer, 4, tmp_path / "both", **options, skip_bad=True)
    assert (manifest.documents.written, manifest.documents.low_score) == (3, 1)
    assert [(one.name, one.where) for one in manifest.skipped] == [
        ("a.parquet", "row group 1, row 0"),
        ("b.jsonl", "line 2"),
    ]


def test_two_columns_with_the_same_name_are_refused(tmp_path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: 2 columns are called 'text'; write the file again"):
        read(tmp_path / "a.parquet")


# --- encodings

LINES = ["first naïve line", "second 日本 line"]


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, suffix):
    """At the start of a file; in JSON lines also at the start of a line, as in concatenated files."""
    pack = PACK.get(suffix, bytes)
    records = [b"\xef\xbb\xbf" + json.dumps({"text": line}).encode() for line in LINES]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b"\n".join(records)))
    assert texts_of(tmp_path / f"a.jsonl{suffix}") == LINES
    (tmp_path / f"a.txt{suffix}").write_bytes(pack("\ufeff".encode() + "\r\n".join(LINES).encode()))
    assert texts_of(tmp_path / f"a.txt{suffix}") == ["\r\n".join(LINES)]
    assert texts_of(tmp_path / f"a.txt{suffix}", Columns(sample_by="line")) == LINES
    (tmp_path / f"b.txt{suffix}").write_bytes(pack("\ufeff".encode()))
    assert texts_of(tmp_path / f"b.txt{suffix}") == [""]


def test_a_byte_order_mark_of_a_long_document_is_removed(tmp_path, tiny_pieces):
    tiny_pieces(50)
    (tmp_path / "a.txt").write_text("x" * 500, "utf-8-sig")
    assert texts_of(tmp_path / "a.txt") == ["x" * 500]


ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
JAPANESE = "日本語の文章です。" * 3


@pytest.mark.parametrize(
    ("encoding", "name", "line"),
    [
        *((encoding, "a.txt", line) for encoding in ENCODINGS for line in ("ASCII only", JAPANESE)),
        *((encoding, "a.jsonl", JAPANESE) for encoding in ENCODINGS),
        ("utf-16-le", "a.txt.gz", JAPANESE),
        ("utf-32-be", "a.jsonl.zst", JAPANESE),
    ],
)
def test_utf_16_and_utf_32_are_refused_with_the_remedy(tmp_path, encoding, name, line, byte_tokenizer):
    text = "".join((json.dumps({"text": line}, ensure_ascii=False) if "json" in name else line) + "\n" for _ in "12345")
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(PACK.get("." + name.split(".", 2)[-1], bytes)(content))
    expected = rf"{name}: is {encoding.upper()[:6]}.*, not UTF-8; iconv -f {encoding.upper()[:6]}.* -t UTF-8"
    for sample_by in ("document", "line"):
        with pytest.raises(UserError, match=expected):
            convert(
                tmp_path / name, byte_tokenizer, 4, tmp_path / "out", columns=Columns(sample_by=sample_by), quiet=True
            )
    assert not (tmp_path / "out").exists()


def test_utf_16_in_the_middle_or_on_a_server_is_detected_when_it_is_read(tmp_path, monkeypatch):
    """The first bytes of remote files are not checked in advance; concatenated files may begin with UTF-8."""
    import fsspec

    fsspec.filesystem("memory").pipe("/utf16/a.jsonl", '{"text": "abc"}\n'.encode("utf-16"))
    ((where, reason),) = read("memory://utf16/a.jsonl")[1]
    assert where == "file" and "is UTF-16, not UTF-8" in reason
    monkeypatch.setattr(spans, "TEXT_CHUNK_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"x" * 99_999 + b"\n" + ("line of text\n" * 200).encode("utf-16-le"))
    records_read, skipped = read(tmp_path / "a.txt", Columns(sample_by="line"))
    assert skipped and all("is UTF-16LE" in reason for _, reason in skipped) and records_read[0][0] == "x" * 99_999


WITHOUT_ASCII = {
    "Japanese": JAPANESE,
    "Chinese": "这是一个没有空格的句子、标点符号也是全角的。“引号”——破折号……",
    "Han only": "这是一个没有空格也没有标点符号的句子",
    "hiragana": "ひらがなだけのぶんしょうです",
    "Korean": "띄어쓰기없는한국어문장입니다",
    "Russian": "словобезпробелов",
    "Greek": "Καλημέρακόσμε",
    "Arabic": "مرحبابالعالم",
    "emoji": "今天天气很好😀我们去公园玩",
}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("language", WITHOUT_ASCII)
def test_utf_16_without_a_mark_or_any_ascii_character_is_refused(tmp_path, byte_tokenizer, encoding, language):
    """Few bytes of it are NUL, or none: that of U+4E00 is."""
    assert not any(character.isascii() for character in WITHOUT_ASCII[language])
    (tmp_path / "a.txt").write_bytes(WITHOUT_ASCII[language].encode(encoding))
    with pytest.raises(UserError, match="a.txt: is UTF-16" + encoding[-2:].upper()):
        convert(tmp_path / "a.txt", byte_tokenizer, 4, tmp_path / "out", quiet=True)


@pytest.mark.parametrize("language", WITHOUT_ASCII)
@pytest.mark.parametrize("between", ["", "\n", " and "])
def test_text_of_other_encodings_is_not_taken_for_utf_16(language, between):
    """Its bytes, two per character or one, are characters of UTF-16 as well."""
    text = (WITHOUT_ASCII[language] + between) * 4
    for encoding in "utf-8 cp932 euc_jp iso2022_jp gbk big5 euc_kr cp1251 koi8_r iso8859_7 cp1253 cp1256".split():
        try:
            content = text.encode(encoding)
        except UnicodeEncodeError:
            continue  # it has none of these characters
        check_encoding(content)


@pytest.mark.parametrize("encoding", ["cp1252", "iso8859_15", "cp850"])
def test_western_text_of_one_byte_per_character_is_not_taken_for_utf_16(encoding):
    text = "Le café est à côté de l'église; où êtes-vous? Über die Straße gehen schöne Mädchen. ¿Dónde está el niño?"
    for end in (" ", "\n", "\t", ";"):
        check_encoding(text.replace(" ", end).encode(encoding))


@pytest.mark.parametrize("words", [["é", "à", "ü"], ["Bär", "Öl", "über", "größe"], ["été", "où", "forêt", "ça"]])
def test_lists_of_western_words_are_not_taken_for_utf_16(words):
    """A line end after an odd number of bytes is the high byte of an Indic letter."""
    for encoding in ("cp1252", "iso8859_15"):
        for end in ("\n", "\r\n"):
            check_encoding("".join(word + end for word in words * 40).encode(encoding))


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("language", WITHOUT_ASCII)
def test_utf_8_that_is_read_from_within_a_character_is_not_taken_for_utf_16(language, offset):
    content = "".join(f"{word}\n" for word in WITHOUT_ASCII[language] * 9).encode()
    check_encoding(content[offset:], offset)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a",
        "日本語".encode(),
        b"nul\0 here and\0 there, as records may have it" * 9,
        b"caf\xe9 in Latin-1",
        b"\xff\xfe\n",
    ],
)
def test_other_text_is_not_mistaken_for_utf_16(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert len(read(tmp_path / "a.txt", skip=False)[0]) == 1


# --- compressed files


def records(number):
    return [random.Random(i).randbytes(20).hex() for i in range(number)]


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.launch
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_all_lines_before_a_truncation_are_kept(tmp_path, suffix, share):
    """As many as gzip and zstd give; zstd decompresses blocks of 128 kB."""
    texts = records(20_000)
    packed = PACK[suffix](json_lines(texts))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[: int(share * len(packed))])
    records_read, ((where, reason),) = read(tmp_path / f"a.jsonl{suffix}")
    assert [text for text, _ in records_read] == texts[: len(records_read)]
    assert where == f"what follows line {len(records_read)}" and "runcated" in reason
    missing = share * len(texts) - len(records_read)
    assert missing < (20 if suffix == ".gz" else 2500)
    with pytest.raises(UserError, match=f"what follows line {len(records_read)}"):
        read(tmp_path / f"a.jsonl{suffix}", skip=False)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("intact_members", [0, 1])
def test_of_a_damaged_compressed_file_only_lines_with_a_right_checksum_are_kept(
    tmp_path, byte_tokenizer, suffix, intact_members
):
    """Unlike a cut, damage changes text before it is noticed; each of 30 changed bytes in turn."""
    texts, file = records(600), tmp_path / f"a.jsonl{suffix}"
    first = PACK[suffix](json_lines(texts[:300])) * intact_members
    second, intact = PACK[suffix](json_lines(texts[300:])), texts[:300] * intact_members
    positions = random.Random(suffix).sample(range(len(second) // 10, len(second) - 40), 30)
    for position in positions:
        damaged = bytearray(first + second)
        damaged[len(first) + position] ^= 4
        file.write_bytes(damaged)
        found, ((where, reason),) = read(file)
        assert [text for text, _ in found] == intact and where == ("what follows line 300" if intact else "file")
        assert "damaged: " in reason and "nothing of it is used" in reason
        with pytest.raises(UserError, match="damaged: "):
            read(file, skip=False)
    (tmp_path / "b.txt").write_text("some text")
    manifest = convert(tmp_path, byte_tokenizer, 4, tmp_path / "out", heldout=0, skip_bad=True, quiet=True)
    assert manifest.documents.written == len(intact) + 1
    assert [one.name for one in manifest.skipped] == [file.name] and "damaged" in manifest.skipped[0].reason


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_of_zero_bytes_is_an_error(tmp_path, byte_tokenizer, suffix):
    """A compressed empty file has a header, and is an empty corpus."""
    (tmp_path / f"a.jsonl{suffix}").touch()
    (tmp_path / "b.txt").write_text("some text")
    with pytest.raises(UserError, match=rf"a.jsonl{suffix}: is empty \(0 bytes, and a compressed file has at least"):
        convert(tmp_path, byte_tokenizer, 2, tmp_path / "out", quiet=True)
    manifest = convert(tmp_path, byte_tokenizer, 2, tmp_path / "out", heldout=0, skip_bad=True, quiet=True)
    assert [one.name for one in manifest.skipped] == [f"a.jsonl{suffix}"]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](b""))
    assert texts_of(tmp_path / f"a.jsonl{suffix}") == []


@pytest.mark.parametrize("suffix", PACK)
def test_concatenated_compressed_files_are_read_to_the_end_and_garbage_is_reported(tmp_path, suffix):
    texts, file = records(3000), tmp_path / f"a.jsonl{suffix}"
    packed = b"".join(PACK[suffix](json_lines(some)) for some in (texts[:1000], [], texts[1000:]))
    file.write_bytes(packed)
    assert texts_of(file) == texts
    if suffix != ".zst":
        file.write_bytes(packed + bytes(1000))  # padding, which the command-line tools accept as well
        assert texts_of(file) == texts
    file.write_bytes(packed + b"garbage, and a lot of it" * 100)
    records_read, ((where, _),) = read(file)
    assert [text for text, _ in records_read] == texts and where == "what follows line 3000"


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("piece_bytes", [7, 1000, 1 << 20])
def test_decompression_stops_at_the_limit(suffix, piece_bytes):
    content = random.Random(0).randbytes(5000) * 2
    packed = PACK[suffix](content)

    def unpacked(limit):
        return decompress(lambda: io.BytesIO(packed), CODECS[suffix], limit, piece_bytes)

    assert b"".join(unpacked(10_000)) == content
    output = bytearray()
    with pytest.raises(TooLarge):
        for piece in unpacked(9_999):
            assert len(piece) <= piece_bytes
            output += piece
    assert output == content[:9_999]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_input_may_not_unpack_to_more_than_its_limit(tmp_path, byte_tokenizer, suffix, name, monkeypatch):
    """Five times its size; the size that is always allowed is made small."""
    monkeypatch.setattr(inputs, "MIN_UNPACKED", 10_000)
    content = json_lines(["x" * 100] * 10_000)
    (tmp_path / f"{name}{suffix}").write_bytes(PACK[suffix](content))
    options = {"heldout": 0, "quiet": True, "columns": Columns(sample_by="line")}
    expected = rf"{name}{suffix}: (what follows )?\w+ ?\d* cannot be read .*unpacks to more than .*--max-unpack-ratio"
    with pytest.raises(UserError, match=expected):
        convert(tmp_path / f"{name}{suffix}", byte_tokenizer, 4, tmp_path / "out", max_unpack_ratio=5, **options)
    allowed = convert(
        tmp_path / f"{name}{suffix}", byte_tokenizer, 4, tmp_path / "all", max_unpack_ratio=1e6, **options
    )
    assert allowed.documents.written == 10_000
    with pytest.raises(UserError, match="max_unpack_ratio=nan must be at least 1"):
        list_inputs(tmp_path, max_ratio=math.nan)


@pytest.mark.launch
def test_dictionary_encoded_texts_are_read_in_small_batches_up_to_the_limit(tmp_path, monkeypatch):
    """60 kB of parquet with a text of 1 MB in each of 300 rows: batches stay small, and the file exceeds the limit."""
    texts = ["x" * (1 << 20), "y"]
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0, 1] * 300, pa.int32()), texts)})
    for file, schema in (("a.parquet", True), ("b.parquet", False)):
        pq.write_table(table, tmp_path / file, store_schema=schema, compression="zstd")
        (source,) = find_sources(tmp_path / file)
        assert source.size < 100_000
        chunks, sizes = divide_file(source, Columns()), []

        def on_bad(where, reason):
            raise UserError(f"{where}: {reason}")

        with pytest.raises(UserError, match=r"row group 0: unpacks to more than 67,108,864 bytes"):
            for batch in read_span(chunks.span(0, 1), Columns(), on_bad):
                sizes.append(len(batch.data))
        assert max(sizes) <= documents.BATCH_BYTES and 60 < sum(sizes) >> 20 <= 64
        for module in (batches, documents):
            monkeypatch.setattr(module, "BATCH_BYTES", 1 << 21)
        assert texts_of(tmp_path / file, max_ratio=math.inf) == texts * 300
        monkeypatch.undo()


def test_a_line_longer_than_the_limit_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 3000)
    monkeypatch.setattr(inputs, "READ_BYTES", 1000)
    content = json_lines(["a", "x" * 9000, "b"])
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        records_read, skipped = read(tmp_path / name)
        assert [text for text, _ in records_read] == ["a", "b"]
        assert skipped == [("line 2", "longer than 3,000 bytes")] or skipped[0][0] == "line 2"


# --- lines


def test_broken_lines_are_reported_with_file_and_line_in_every_span(tmp_path, byte_tokenizer, monkeypatch):
    """With any line ends; also in compressed files."""
    monkeypatch.setattr(spans, "TEXT_CHUNK_BYTES", 50)
    content = [b'{"text": "good %d"}' % i if i % 7 else b'{"text": %d}' % i for i in range(1, 60)]
    expected = [f"line {i}" for i in range(1, 60) if i % 7 == 0]
    for name in ("a.jsonl", "a.jsonl.gz"):
        packed = gzip.compress if name.endswith("gz") else bytes
        (tmp_path / name).write_bytes(packed(b"\n".join(content)))
        assert [where for where, _ in read(tmp_path / name)[1]] == expected
        (tmp_path / name).write_bytes(packed(b"\r\n".join(content)))
        assert [where for where, _ in read(tmp_path / name)[1]] == expected
        with pytest.raises(UserError, match=rf"{name}:7: cannot be read \(key 'text' holds int, not text\); fetch"):
            convert(tmp_path / name, byte_tokenizer, 4, tmp_path / f"{name}.out", quiet=True)
    (source,) = find_sources(tmp_path / "a.jsonl")
    for position in (300, 20, 0, 700):
        assert lines_before(source, position) == (tmp_path / "a.jsonl").read_bytes()[:position].count(b"\n")


def test_a_json_array_is_reported_with_the_command_to_convert_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}]))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "a"}], indent=1))
    for name in ("a.json", "b.json"):
        assert "JSON lines have one record per line; convert an array with: jq -c" in read(tmp_path / name)[1][0][1]


# --- starting over


def test_a_conversion_that_failed_before_its_first_part_starts_over(tmp_path, byte_tokenizer):
    """After its input is fixed, also with other settings."""
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    good = json_lines(["some text"] * 20)
    options = {"heldout": 0, "quiet": True, "filters": Filters(dedup=False)}
    for broken in (good + b'{"text": 1}\n', good + b'{"text": 1}\n' + good):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"a.jsonl:21: cannot be read"):
            convert(file, byte_tokenizer, 8, out, **options)
        assert (out / "unfinished" / "settings.json").exists()
    (out / "train").mkdir(exist_ok=True)
    file.write_bytes(good)
    manifest = convert(file, byte_tokenizer, 4, out, **options)
    assert manifest.documents.written == 20
    convert(file, byte_tokenizer, 4, tmp_path / "fresh", **options)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_damaged_settings_file_is_a_user_error(tmp_path, byte_tokenizer):
    file, out = tmp_path / "a.txt", tmp_path / "out"
    file.write_text("some text")
    for content in (b"{", b"[]", b"[" * 100_000, b"\xff"):
        (out / "unfinished").mkdir(parents=True)
        (out / "unfinished" / "settings.json").write_bytes(content)
        (out / "train" / "part-00000").mkdir(parents=True)
        with pytest.raises(UserError, match=r"out: (unfinished/settings.json is damaged|.*name another folder)"):
            convert(file, byte_tokenizer, 4, out, heldout=0, quiet=True)
        shutil.rmtree(out / "train")
        convert(file, byte_tokenizer, 4, out, heldout=0, quiet=True)
        shutil.rmtree(out)
