"""Shards and index entries equal those of streaming's MDSWriter, and streaming reads them."""

import json

import numpy as np
import pyarrow as pa
import pytest
from helpers.selection import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_dist.prepare import mds
from mythos_dist.prepare.mds import ShardWriter


def reference(folder, tokens, seq_len, compression, size_limit):
    """Write the windows of `tokens` with MDSWriter; returns its index entries."""
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:{tokens.dtype}:{seq_len + 1}"}
    writer = MDSWriter(
        columns=columns, out=str(folder), compression=compression, hashes=["sha1", "xxh64"], size_limit=size_limit
    )
    for i in range(0, len(tokens) - seq_len, seq_len + 1):
        writer.write({"tokens": tokens[i : i + seq_len + 1]})
    writer.finish()
    return json.loads((folder / "index.json").read_text())["shards"]


def ours(folder, tokens, seq_len, compression, pieces=1):
    writer = ShardWriter(folder, seq_len, str(tokens.dtype), compression)
    for piece in np.array_split(tokens, pieces):
        writer.add(piece)
    writer.finish()
    assert writer.tail.tolist() == tokens[writer.windows * (seq_len + 1) :].tolist()
    assert writer.tail.dtype == tokens.dtype
    return writer.shards


def files(folder):
    return {file.name: file.read_bytes() for file in folder.glob("shard*")}


@settings(max_examples=examples(25))
@given(
    dtype=st.sampled_from(["uint16", "uint32"]),
    seq_len=st.integers(1, 40),
    windows=st.integers(1, 40),
    tail=st.integers(0, 40),
    size_limit=st.integers(500, 3000),
    pieces=st.integers(1, 9),
)
def test_files_and_index_equal_mds_writers(tmp_path_factory, dtype, seq_len, windows, tail, size_limit, pieces):
    """Byte for byte, also with several shards and with exactly full ones; tokens are added in pieces of any size."""
    folder = tmp_path_factory.mktemp("mds")
    num_tokens = windows * (seq_len + 1) + tail % (seq_len + 1)
    tokens = np.random.default_rng(windows).integers(0, np.iinfo(dtype).max, num_tokens, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mds, "SIZE_LIMIT", size_limit)
        entries = ours(folder / "ours", tokens, seq_len, None, pieces)
    assert entries == reference(folder / "theirs", tokens, seq_len, None, size_limit)
    assert files(folder / "ours") == files(folder / "theirs")


@pytest.mark.launch
def test_the_size_limit_is_mds_writers_default(tmp_path):
    """34,000 windows of 2 kB are slightly more than a shard of 64 MiB."""
    from streaming import MDSWriter

    tokens = np.random.default_rng(0).integers(0, 50_000, (34_000, 1000)).astype(np.uint16)
    entries = ours(tmp_path / "ours", tokens.reshape(-1), 999, None, 7)
    writer = MDSWriter(
        columns={"tokens": "ndarray:uint16:1000"}, out=str(tmp_path / "theirs"), hashes=["sha1", "xxh64"]
    )
    for window in tokens:
        writer.write({"tokens": window})
    writer.finish()
    assert entries == json.loads((tmp_path / "theirs/index.json").read_text())["shards"]
    assert [shard["samples"] for shard in entries] == [33_487, 513]


def test_a_window_larger_than_the_size_limit_has_its_own_shard(tmp_path, monkeypatch):
    """MDSWriter would first write a shard without windows."""
    monkeypatch.setattr(mds, "SIZE_LIMIT", 100)
    entries = ours(tmp_path, np.arange(100, dtype=np.uint16), 30, None)
    assert [shard["samples"] for shard in entries] == [1, 1, 1]


@pytest.mark.parametrize("compression", ["zstd", "zstd:1", "zstd:19"])
def test_compressed_shards_decompress_to_mds_writers(tmp_path, monkeypatch, compression):
    """Compressed bytes differ, because the libraries differ. Decompressed bytes, names and hashes are equal."""
    monkeypatch.setattr(mds, "SIZE_LIMIT", 5000)
    tokens = np.arange(20_000, dtype=np.uint16) // 7
    entries = ours(tmp_path / "ours", tokens, 64, compression)
    expected = reference(tmp_path / "theirs", tokens, 64, compression, 5000)
    import zstd  # theirs

    assert len(entries) == len(expected) > 3
    for here, there in zip(entries, expected, strict=True):
        packed, other = here.pop("zip_data"), there.pop("zip_data")
        assert here == there
        assert packed["basename"] == other["basename"]
        content = (tmp_path / "ours" / packed["basename"]).read_bytes()
        raw = zstd.decompress(content)
        assert raw == zstd.decompress((tmp_path / "theirs" / other["basename"]).read_bytes())
        assert len(raw) == here["raw_data"]["bytes"] and len(content) == packed["bytes"]
        assert packed["hashes"] == {name: hash_of(name, content) for name in ("sha1", "xxh64")}
        assert here["raw_data"]["hashes"] == {name: hash_of(name, raw) for name in ("sha1", "xxh64")}
    assert set(files(tmp_path / "ours")) == set(files(tmp_path / "theirs"))


def hash_of(name, content):
    from streaming.base.hashing import get_hash

    return get_hash(name, content)


def test_higher_levels_compress_more(tmp_path):
    tokens = (np.arange(200_000, dtype=np.uint32) ** 2 // 1000 % 500).astype(np.uint16)
    sizes = [ours(tmp_path / str(level), tokens, 99, f"zstd:{level}")[0]["zip_data"]["bytes"] for level in (1, 9, 19)]
    assert sizes[0] > sizes[1] > sizes[2]
    (default,) = ours(tmp_path / "default", tokens, 99, "zstd")
    content = (tmp_path / "default" / default["zip_data"]["basename"]).read_bytes()
    assert pa.Codec("zstd", compression_level=3).decompress(content, default["raw_data"]["bytes"])


def test_streaming_reads_every_window_back(tmp_path, monkeypatch):
    """Two folders of shards in one index, as a conversion of two parts writes them; one of them is compressed."""
    from streaming import StreamingDataset

    monkeypatch.setattr(mds, "SIZE_LIMIT", 3000)
    tokens = np.arange(9 * 1000, dtype=np.uint32)
    shards = []
    for number, (some, compression) in enumerate([(tokens[:5400], None), (tokens[5400:], "zstd")]):
        writer = ShardWriter(tmp_path / f"part-{number}", 8, "uint32", compression, f"part-{number}/")
        writer.add(some)
        writer.finish()
        shards += writer.shards
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    data = StreamingDataset(local=str(tmp_path), batch_size=1)
    assert len(shards) > 4
    assert np.concatenate([data[i]["tokens"] for i in range(data.num_samples)]).tolist() == tokens.tolist()


def test_nothing_is_written_before_a_window_is_full(tmp_path):
    writer = ShardWriter(tmp_path / "none", 8, "uint16")
    for size in (0, 3, 5):
        writer.add(np.zeros(size, np.uint16))
    writer.finish()
    assert (writer.shards, writer.windows, len(writer.tail)) == ([], 0, 8)
    assert not (tmp_path / "none").exists()
    with pytest.raises(AssertionError):
        writer.add(np.zeros(3, np.int32))
