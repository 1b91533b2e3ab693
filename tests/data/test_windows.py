"""Windows are those that streaming reads, and nothing of a damaged shard is returned."""

import bz2
import errno
import gzip
import json
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from helpers.shard_folder import SEQ_LEN, copy, rewrite_index, shard_files, window, write_folder

from mythos_dist.data import shard, windows
from mythos_dist.data.corpora import read_index
from mythos_dist.data.windows import WindowReader
from mythos_dist.errors import UserError

SIZES = [5, 8, 3]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("raw") / "shards", SIZES)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("compressed") / "shards", SIZES, compression="zstd:3")


@pytest.fixture
def make(tmp_path):
    """A reader of a folder's training split that decompresses below tmp_path/cache."""

    def make(folder: Path, **settings) -> WindowReader:
        settings = {"cache": tmp_path / "cache", **settings}
        return WindowReader(read_index(folder, "train", "f" * 64), SEQ_LEN + 1, **settings)

    return make


def expected(samples) -> list[list[int]]:
    return [window(0, sample).tolist() for sample in samples]


@pytest.mark.parametrize("compression", [None, "zstd:3", "zstd", "gz"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_are_what_streaming_reads(make, tmp_path, dtype, compression):
    """In any order and repeatedly; and as they were written."""
    folder = write_folder(tmp_path / "shards", SIZES, dtype=dtype, compression=compression)
    samples = [15, 0, 4, 5, 12, 13, 4]
    got = make(folder).read(samples)
    assert got.dtype == dtype and got.tolist() == expected(samples)
    from streaming import StreamingDataset  # takes seconds

    data = StreamingDataset(
        local=str(copy(folder, tmp_path / "copy") / "train"), batch_size=1
    )  # it decompresses in place
    assert got.tolist() == [data[sample]["tokens"].tolist() for sample in samples]
    names = [path.name for path in folder.rglob("*.mds*")]
    assert len(names) == len(SIZES) + 1, "the folder itself is unchanged"


def flip(path: Path, at: float = 0.5) -> None:
    with open(path, "r+b") as file:
        file.seek(int(os.path.getsize(path) * at))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    "flipped": (flip, "its xxh64 is [0-9a-f]{16}, but index.json says [0-9a-f]{16}"),
    "shortened": (lambda path: os.truncate(path, 100), "has 100 bytes, but index.json says"),
    "lengthened": (lambda path: path.open("ab").write(b"x"), "bytes, but index.json says"),
    "missing": (Path.unlink, r"(cannot be opened|cannot be read) \(No such file or directory\)"),
    "a folder": (replace_by_folder, "bytes, but index.json says|Is a directory"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_the_error_for_a_damaged_shard_names_file_problem_and_remedy(
    make, raw, compressed, tmp_path, kind, compression
):
    folder = copy(compressed if compression else raw, tmp_path / "copy")
    damage, message = DAMAGE[kind]
    file = shard_files(folder)[1]
    damage(file)
    reader = make(folder)
    assert reader.read([0, 15]).tolist() == expected([0, 15]), "the other shards can be read"
    with pytest.raises(UserError, match=message) as error:
        reader.read([0, 6])
    assert str(error.value).startswith(f"{folder}: train/{file.relative_to(folder / 'train')}: ")
    assert f"`mythos verify {folder}`" in str(error.value) and "convert again" in str(error.value)


def test_sha1_is_checked_without_xxh64_and_a_shard_without_hashes_is_refused(make, raw, tmp_path):
    folder = copy(raw, tmp_path / "copy")
    flip(shard_files(folder)[1])
    rewrite_index(folder, "train", lambda entries: [entry["raw_data"]["hashes"].pop("xxh64") for entry in entries])
    assert make(folder).read([0]).tolist() == expected([0])
    with pytest.raises(UserError, match="its sha1 is"):
        make(folder).read([6])
    rewrite_index(folder, "train", lambda entries: [entry["raw_data"]["hashes"].clear() for entry in entries])
    with pytest.raises(UserError, match=r"neither its xxh64 nor its sha1; set data.verify=false to read it anyway"):
        make(folder).read([0])


def test_without_verification_only_sizes_are_checked(make, raw, compressed, tmp_path):
    """A flipped token is returned; what cannot be decoded or decompressed is still an error that names the file."""
    folder = copy(raw, tmp_path / "copy")
    first, second, third = shard_files(folder)
    flip(first, at=0.99)
    assert make(folder, verify=False).read(range(5)).tolist() != expected(range(5))
    second.write_bytes(b"\xff" * second.stat().st_size)
    with pytest.raises(UserError, match=r"part-00001/shard.00000.mds: sample 1 of this file cannot be read"):
        make(folder, verify=False).read([6])
    os.truncate(third, 10)
    with pytest.raises(UserError, match="has 10 bytes"):
        make(folder, verify=False).read([15])
    folder = copy(compressed, tmp_path / "compressed")
    first = shard_files(folder)[0]
    first.write_bytes(b"\xff" * first.stat().st_size)
    with pytest.raises(UserError, match=r"shard.00000.mds.zstd: cannot be decompressed"):
        make(folder, verify=False).read([0])


def test_a_process_hashes_a_shard_once(make, raw, tmp_path, monkeypatch):
    """Also when its file was closed in between; a file that is then truncated is detected by its size."""
    monkeypatch.setattr(windows, "OPEN_FILES", 1)
    hashed = []
    chunks = shard.chunks_of

    def counting(file):
        for chunk in chunks(file):
            hashed.append(len(chunk))
            yield chunk

    monkeypatch.setattr(shard, "chunks_of", counting)
    folder = copy(raw, tmp_path / "copy")
    reader = make(folder)
    reader.read([0, 6, 0, 6, 15])
    assert sum(hashed) == sum(file.stat().st_size for file in shard_files(folder))
    os.truncate(shard_files(folder)[0], 50)
    with pytest.raises(UserError, match="has 50 bytes"):
        reader.read([0])


def test_a_shard_that_is_truncated_while_open_is_an_error(make, raw, tmp_path):
    folder = copy(raw, tmp_path / "copy")
    reader = make(folder)
    reader.read([0])
    os.truncate(shard_files(folder)[0], 50)
    with pytest.raises(UserError, match="sample 4 of this file cannot be read"):
        reader.read([4])


def test_few_files_are_open_and_all_are_closed_in_the_end(make, raw, monkeypatch):
    monkeypatch.setattr(windows, "OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = make(raw)
    for _ in range(3):
        reader.read(range(16))
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def read_in_a_process(reader: WindowReader, samples: list[int], results) -> None:
    try:
        results.put(reader.read(samples).tolist())
    except UserError as error:
        results.put(str(error))


def in_processes(reader: WindowReader, orders: list[list[int]]) -> list:
    """The results of forked processes that read at the same time."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=read_in_a_process, args=(reader, order, results)) for order in orders]
    for process in processes:
        process.start()
    values = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return values


def test_forked_processes_and_pickled_copies_read_the_same(make, compressed):
    """With files already open: a forked process shares them, a pickled copy opens its own."""
    reader = make(compressed)
    reader.read([0, 6])
    assert pickle.loads(pickle.dumps(reader)).read(range(16)).tolist() == expected(range(16))
    got = in_processes(reader, [list(range(16))] * 3)
    assert got == [expected(range(16))] * 3


def test_processes_may_decompress_the_same_shards_at_once(make, compressed, tmp_path):
    """Without a lock and without partial files: each writes its own file and renames it."""
    orders = [list(range(16)), list(range(15, -1, -1)), [6, 0, 15], [6, 5, 7]]
    got = in_processes(make(compressed), orders)
    assert sorted(got) == sorted(expected(order) for order in orders)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    names = [path.relative_to(tmp_path / "cache").as_posix() for path in files]
    assert sorted(names) == [f"{'f' * 16}/train/part-0000{part}/shard.00000.mds" for part in range(3)]


def test_cached_shards_are_reused_unless_they_are_damaged(make, compressed, tmp_path):
    make(compressed).read(range(16))
    cached = sorted((tmp_path / "cache").rglob("*.mds"))
    before = [path.stat().st_ino for path in cached]
    flip(cached[1])
    os.truncate(cached[2], 7)
    assert make(compressed).read(range(16)).tolist() == expected(range(16))
    assert [path.stat().st_ino == inode for path, inode in zip(cached, before, strict=True)] == [True, False, False]


def test_the_default_cache_is_in_the_temporary_folder(make, compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    make(compressed, cache=None).read([0])
    (file,) = (tmp_path / "tmp").rglob("*.mds")
    assert file.relative_to(tmp_path / "tmp").parts[:2] == (f"mythos-shards-{os.getuid()}", "f" * 16)


def test_a_cache_that_other_users_can_write_to_is_refused(make, compressed, tmp_path, monkeypatch):
    """Its files would be read as decompressed shards. The error says what to set."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"mythos-shards-{os.getuid()}").mkdir()
    (tmp_path / f"mythos-shards-{os.getuid()}").chmod(0o777)
    with pytest.raises(
        UserError, match=r"has mode 0777: other users can write to it; .* set data.cache to a folder of"
    ):
        make(compressed, cache=None).read([0])


def test_the_error_for_an_unwritable_cache_says_what_to_set(make, compressed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be decompressed to .*/file/.*; set data.cache to a folder with space"):
        make(compressed, cache=tmp_path / "file").read([0])

    def full(path: Path, mode: str):
        if mode == "wb":
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return path.open(mode)

    monkeypatch.setattr(windows, "open", full, raising=False)
    with pytest.raises(UserError, match=r"No space left on device\); set data.cache"):
        make(compressed).read([0])
    assert not list((tmp_path / "cache").rglob("*.*")), "partial files are removed"


def test_pickled_data_is_never_loaded(make, raw, tmp_path):
    """An index with a pickled column, and a shard whose pickle runs code: refused before it is read."""
    folder = copy(raw, tmp_path / "copy")

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    from streaming import MDSWriter

    writer = MDSWriter(out=str(tmp_path / "evil"), columns={"tokens": "pkl"}, hashes=["xxh64"])
    writer.write({"tokens": Payload()})
    writer.finish()
    entry = json.loads((tmp_path / "evil" / "index.json").read_text())["shards"][0]
    (tmp_path / "evil" / "shard.00000.mds").rename(folder / "train" / "shard.00000.mds")
    rewrite_index(folder, "train", lambda entries: entries.insert(0, entry))
    with pytest.raises(UserError, match=r"describes a shard that cannot be read .*unsafe type: pkl"):
        make(folder).read([0])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(column_encodings=["ndarray:uint16"]), "sample 0 of this file cannot be read"),
        (lambda entry: entry.update(column_encodings=["str"]), "sample 0 of this file cannot be read"),
        (lambda entry: entry.update(column_names=["text"]), "sample 0 of this file cannot be read"),
        (lambda entry: entry.update(format="csv"), "describes a shard that cannot be read"),
        (lambda entry: entry.pop("column_names"), "describes a shard that cannot be read"),
    ],
)
def test_an_index_that_does_not_match_the_shard_is_an_error(make, raw, tmp_path, change, message):
    folder = copy(raw, tmp_path / "copy")
    rewrite_index(folder, "train", lambda entries: change(entries[0]))
    with pytest.raises(UserError, match=message):
        make(folder).read([0])


def test_windows_with_another_seq_len_are_refused(raw, tmp_path):
    reader = WindowReader(read_index(raw, "train", "f"), SEQ_LEN, cache=tmp_path)
    with pytest.raises(UserError, match=r"uint16 of shape \(17,\), not 16 tokens"):
        reader.read([0])


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_tokens_that_are_not_unsigned_integers_are_refused(make, tmp_path, dtype):
    folder = write_folder(tmp_path / "shards", [2], dtype=dtype)
    with pytest.raises(UserError, match=f"{dtype} of shape"):
        make(folder).read([0])


def test_the_returned_array_is_contiguous(make, raw):
    got = make(raw).read([3, 1])
    assert got.flags.c_contiguous and got.shape == (2, SEQ_LEN + 1) and isinstance(got, np.ndarray)


BOMBS = {
    "zstd:3": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "br": lambda content: pa.Codec("brotli").compress(content, asbytes=True),
    "snappy": lambda content: pa.Codec("snappy").compress(content, asbytes=True),
}


@pytest.mark.parametrize("compression", BOMBS)
@pytest.mark.parametrize("verify", [True, False])
def test_a_decompression_bomb_is_refused_at_the_size_in_the_index(make, tmp_path, monkeypatch, compression, verify):
    """A few kB that decompress to 20 MB, with a correct hash: at most the raw size is written."""
    folder = write_folder(tmp_path / "shards", SIZES, compression=compression)
    assert make(folder).read(range(16)).tolist() == expected(range(16))
    file, largest = shard_files(folder)[0], 0
    bomb = BOMBS[compression](bytes(20_000_000))
    assert len(bomb) < 5_000_000
    file.write_bytes(bomb)
    digest = xxhash.xxh64(bomb).hexdigest()
    rewrite_index(
        folder, "train", lambda entries: entries[0]["zip_data"].update(bytes=len(bomb), hashes={"xxh64": digest})
    )
    size = json.loads((folder / "train/index.json").read_text())["shards"][0]["raw_data"]["bytes"]
    builtin_open = open

    class Counting:
        def __init__(self, *arguments):
            self.file = builtin_open(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            nonlocal largest
            largest += len(data)
            return self.file.write(data)

    def counting_open(path, mode):
        return Counting(path, mode) if mode == "wb" else builtin_open(path, mode)

    monkeypatch.setattr(windows, "open", counting_open, raising=False)
    with pytest.raises(
        UserError, match=r"it decompresses to more than the \d+ bytes that index.json says|cannot be decompressed"
    ):
        make(folder, cache=tmp_path / "other", verify=verify).read([0])
    assert largest <= size and not [path for path in (tmp_path / "other").rglob("*") if path.is_file()]


def test_a_raw_size_that_its_samples_cannot_fill_is_refused(make, compressed, tmp_path):
    folder = copy(compressed, tmp_path / "copy")
    rewrite_index(folder, "train", lambda entries: entries[0]["raw_data"].update(bytes=1 << 33))
    with pytest.raises(UserError, match=r"index.json says 8589934592 bytes, more than its samples can fill"):
        make(folder).read([0])
    rewrite_index(folder, "train", lambda entries: entries[0].update(compression="lz77"))
    rewrite_index(folder, "train", lambda entries: entries[0]["raw_data"].update(bytes=200))
    with pytest.raises(UserError, match=r"compression=lz77 in index.json is unknown"):
        make(folder).read([0])
    rewrite_index(folder, "train", lambda entries: entries[1]["raw_data"].update(bytes=9999))
    with pytest.raises(UserError, match=r"it decompresses to \d+ bytes, but index.json says 9999"):
        make(folder, verify=False).read([6])
