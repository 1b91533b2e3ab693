"""Shards hold the corpus's own text, whole conversions only, and say what they were made from."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import StreamingDataset

from mythos_dist.data.corpus import read_documents
from mythos_dist.data.shards import convert, read_manifest, to_dtype
from mythos_dist.data.tokenizer import train_tokenizer
from mythos_dist.errors import UserError


def read_split(folder, split):
    """All tokens of a split in the order on disk, through streaming alone."""
    data = StreamingDataset(local=str(folder / split), batch_size=1)
    return np.concatenate([data[i]["tokens"] for i in range(data.num_samples)])


def documents_in(folder, split, tokenizer):
    """The texts that a split holds whole; the last one may be cut by the dropped tail."""
    tokens = read_split(folder, split)
    return [tokenizer.decode(part[part != tokenizer.eos_id]) for part in split_after(tokens, tokenizer.eos_id)]


def split_after(tokens, eos):
    return np.split(tokens, np.flatnonzero(tokens == eos) + 1)


def test_shards_decode_to_the_documents_of_the_corpus(shards, corpus, tokenizer):
    """Each document once, in its order, in one split; only the end of each split's last document is dropped."""
    originals = list(read_documents(corpus))
    found = {split: documents_in(shards, split, tokenizer) for split in ("train", "heldout")}
    for texts in found.values():
        *whole, cut = texts
        assert whole == [text for text in originals if text in whole]
        assert any(text.startswith(cut) for text in originals)
    assert not set(found["train"][:-1]) & set(found["heldout"][:-1])
    assert len(found["train"][:-1]) + len(found["heldout"][:-1]) in range(len(originals) - 2, len(originals) + 1)


def test_the_manifest_counts_what_the_tokenizer_made(shards, corpus, tokenizer):
    manifest = read_manifest(shards)
    texts = list(read_documents(corpus))
    assert sum(counts.documents for counts in manifest.splits.values()) == len(texts)
    assert sum(counts.tokens for counts in manifest.splits.values()) == sum(len(tokenizer.encode(t)) for t in texts)
    for split, counts in manifest.splits.items():
        assert counts.tokens_written == read_split(shards, split).size == counts.windows * 65
        assert counts.tokens + counts.documents == counts.tokens_written + counts.tokens_dropped
    assert manifest.inputs[0].sha256 == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert manifest.tokenizer_sha256 == hashlib.sha256((shards / "tokenizer.model").read_bytes()).hexdigest()
    assert (manifest.seq_len, manifest.vocab_size, manifest.eos_id) == (64, 1000, tokenizer.eos_id)


def test_the_index_holds_the_hashes_of_two_byte_tokens(shards):
    index = json.loads((shards / "train" / "index.json").read_bytes())
    for shard in index["shards"]:
        content = (shards / "train" / shard["raw_data"]["basename"]).read_bytes()
        assert shard["raw_data"]["hashes"]["sha1"] == hashlib.sha1(content).hexdigest()
        assert set(shard["raw_data"]["hashes"]) == {"sha1", "xxh64"}
        assert (shard["column_names"], shard["column_encodings"]) == (["tokens"], ["ndarray:uint16"])


def test_the_same_documents_are_held_out_in_any_order(shards, corpus, tokenizer, tmp_path):
    texts = list(read_documents(corpus))[::-1]
    for part in range(2):
        pq.write_table(pa.table({"text": texts[part::2]}), tmp_path / f"{part}.parquet")
    convert(tmp_path / "*.parquet", tokenizer, 64, tmp_path / "out", heldout=0.1)
    for split in ("train", "heldout"):
        here, there = (read_manifest(folder).splits[split] for folder in (shards, tmp_path / "out"))
        assert (here.documents, here.tokens) == (there.documents, there.tokens)
    assert read_manifest(shards).splits["heldout"].documents >= 2
    assert (tmp_path / "out/train/shard.00000.mds").read_bytes() != (shards / "train/shard.00000.mds").read_bytes()


def test_converting_again_does_nothing_and_says_so(shards, corpus, tokenizer, capsys):
    before = {file: file.stat().st_mtime_ns for file in shards.rglob("*")}
    again = convert([corpus], tokenizer, 64, shards, heldout=0.1)
    assert "already converted" in capsys.readouterr().err
    assert again == json.loads((shards / "manifest.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in shards.rglob("*")} == before


def test_a_conversion_repeated_elsewhere_is_the_same_to_the_byte(shards, corpus, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    convert(corpus, tokenizer, 64, tmp_path / "out", heldout=0.1)
    names = sorted(file.relative_to(shards) for file in shards.rglob("*") if file.is_file())
    assert names == sorted(
        file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*") if file.is_file()
    )
    assert all((shards / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)


def test_other_settings_are_refused_with_what_differs(shards, corpus, tokenizer, tmp_path):
    other_input = tmp_path / "other.parquet"
    pq.write_table(pa.table({"text": ["some other text"]}), other_input)
    other_tokenizer = train_tokenizer(read_documents(corpus), tmp_path / "other.model", 900)
    cases = [
        ((corpus, tokenizer, 32), "seq_len=32, but these shards were made with 64; choose another folder"),
        ((corpus, other_tokenizer, 64), "(?s)vocab_size=900, but .* 1000.*tokenizer_sha256="),
        ((other_input, tokenizer, 64), r"inputs=other.parquet \(.*corpus.parquet"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            convert(*arguments, shards, heldout=0.1)


def test_a_folder_that_is_no_conversion_is_left_alone(corpus, tokenizer, tmp_path):
    for place in (tmp_path / "thesis", tmp_path / "out.partial"):
        place.mkdir()
        (place / "chapter1.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="thesis: exists and is not an earlier conversion"):
        convert(corpus, tokenizer, 64, tmp_path / "thesis")
    with pytest.raises(UserError, match="file: exists and is not an earlier conversion"):
        convert(corpus, tokenizer, 64, tmp_path / "file")
    with pytest.raises(UserError, match=r"out.partial: in the way"):
        convert(corpus, tokenizer, 64, tmp_path / "out")
    assert (tmp_path / "thesis/chapter1.txt").read_text() == "years of work"
    assert (tmp_path / "out.partial/chapter1.txt").read_text() == "years of work"


def test_an_interrupted_conversion_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    encode, seen = tokenizer.encode, []

    def interrupted(text):
        seen.append(text)
        if len(seen) == 40:
            raise KeyboardInterrupt
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(corpus, tokenizer, 64, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_started_over(corpus, tokenizer, tmp_path):
    left = tmp_path / "out.partial"
    (left / "train").mkdir(parents=True)
    (left / "UNFINISHED").touch()
    (left / "train/shard.00099.mds").write_bytes(b"half")
    with pytest.raises(UserError, match="not a finished conversion"):
        read_manifest(left)
    convert(corpus, tokenizer, 64, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()} == {
        *("manifest.json", "tokenizer.model", "index.json", "shard.00000.mds")
    }


def test_ids_above_65535_are_stored_in_four_bytes(corpus, tokenizer, tmp_path):
    """A stand-in tokenizer of 70,000 pieces; astype(uint16) would turn 69,999 into 4,463."""

    class Large:
        vocab_size, eos_id, path, sha256 = 70_000, 2, tokenizer.path, "0" * 64

        def encode(self, text):
            return 69_999 - np.arange(100, dtype=np.int32)

    convert(corpus, Large(), 64, tmp_path / "out", heldout=0)
    first, *_ = split_after(read_split(tmp_path / "out", "train"), 2)
    assert first.dtype == np.uint32
    assert first.tolist() == [*range(69_999, 69_899, -1), 2]


@pytest.mark.parametrize("token", [65_536, 70_000, -1])
def test_an_id_outside_the_vocabulary_is_never_wrapped(token):
    with pytest.raises(ValueError, match=str(token)):
        to_dtype(np.array([[5, token]]), 65_536, "uint16")
    assert to_dtype(np.array([[0, 65_535]]), 65_536, "uint16").tolist() == [[0, 65_535]]


def test_impossible_requests_are_refused(corpus, tokenizer, tmp_path):
    cases = [
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"seq_len": 10**6}, "tokens of text do not fill one window of seq_len=1000000"),
        ({"seq_len": 64, "heldout": 1.0}, "heldout=1.0 is a share"),
        ({"seq_len": 64, "inputs": tmp_path / "absent"}, "absent: no such file or folder"),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            convert(**{"inputs": corpus, "tokenizer": tokenizer, "out": tmp_path / "out", **settings})
        assert list(tmp_path.iterdir()) == []


def test_a_folder_without_whole_shards_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no shards here; .* make them with tools/make_shards\.py"):
        read_manifest(tmp_path)
    folder = shutil.copytree(shards, tmp_path / "copy")
    whole = json.loads((folder / "manifest.json").read_text())
    newer = {**whole, "format_version": 99}
    without_counts = {**whole, "splits": {"train": whole["splits"]["train"]}}
    for content in ("{", "[]", "{}", json.dumps(without_counts), json.dumps({**whole, "unknown": 1})):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest.json: cannot be read .*; convert again"):
            read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match="format_version=99 is not 1"):
        read_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished conversion"):
        read_manifest(folder)
