"""Files are found, named and identified, and are read over a network that fails from time to time."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.conversion import assert_holds, contents, expect
from helpers.http_server import serving

from mythos_dist.data.manifest import file_sha256
from mythos_dist.errors import UserError
from mythos_dist.prepare import convert as convert_module
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.inputs import Source, content_hash
from mythos_dist.prepare.listing import find_sources
from mythos_dist.prepare.names import file_kind

TEXTS = [f"document {number} of the remote corpus, {'word ' * (number % 7)}" for number in range(60)]


def test_formats_follow_from_file_names():
    for name, kind in {
        "a.parquet": ("parquet", None),
        "a.PARQUET": ("parquet", None),
        "a.b.jsonl.gz": ("jsonl", "gzip"),
        "c4.json.zst": ("jsonl", "zstd"),
        "a.ndjson": ("jsonl", None),
        "a.txt.zst": ("text", "zstd"),
        "README.md": ("text", None),
        "a.JSONL.ZSTD": ("jsonl", "zstd"),
        "a.txt.bz2": ("text", "bz2"),
        "a.json.xz": ("jsonl", "xz"),
        "https://host/a.jsonl.gz?token=a.parquet": ("jsonl", "gzip"),
    }.items():
        assert file_kind(name) == kind, name
    assert not any(map(file_kind, ["a", "a.gz", "a.parquet.gz", "a.csv", ".parquet", "a.txt.lz4", "parquet"]))


def test_folders_patterns_and_lists_select_their_files(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.parquet", "c.jsonl.gz", "b/notes.pdf", "b/.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "blob")  # as in Hugging Face's cache

    def names(inputs):
        return [source.name for source in find_sources(inputs)]

    assert names(tmp_path) == ["a.parquet", "b/10.txt", "b/2.txt", "c.jsonl.gz", "link.txt"]
    assert names(str(tmp_path / "b/*.txt")) == ["10.txt", "2.txt"]
    assert names(str(tmp_path / "**/*.txt")) == ["b/10.txt", "b/2.txt", "link.txt"]
    assert names([tmp_path / "c.jsonl.gz", tmp_path / "b"]) == ["c.jsonl.gz", "b/10.txt", "b/2.txt"]
    assert names(tmp_path / "a.parquet") == ["a.parquet"]
    assert [source.size for source in find_sources(tmp_path / "b")] == [8, 7]


def test_a_file_given_twice_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    for again in ("a.txt", "./a.txt", ".", "*.txt", f"../{tmp_path.name}/a.txt", tmp_path):
        assert len(find_sources([tmp_path / "a.txt", again])) == 1, again


def test_all_problems_of_the_inputs_are_reported_at_once(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        find_sources([tmp_path / "absent.parquet", tmp_path / "table.csv", tmp_path / "empty", str(tmp_path / "*.pq")])
    assert [problem.removeprefix(str(tmp_path)) for problem in error.value.problems] == [
        "/absent.parquet: no such file or folder, and as a pattern it matches nothing",
        "/empty: no file there is named name.parquet, name.jsonl or name.txt, the latter two also with .gz, .zst, "
        ".bz2 or .xz",
        "/*.pq: no such file or folder, and as a pattern it matches nothing",
        "/table.csv: its name does not show its format; rename it to name.parquet, name.jsonl or name.txt, the "
        "latter two also with .gz, .zst, .bz2 or .xz",
    ]
    with pytest.raises(UserError, match="no input files; name some"):
        find_sources([])


def test_a_file_with_read_errors_is_named(tmp_path, byte_tokenizer):
    """/proc/self/mem is a regular file whose first byte cannot be read (EIO)."""
    (tmp_path / "bad.jsonl").symlink_to("/proc/self/mem")
    (tmp_path / "bad.parquet").symlink_to(f"/proc/self/task/{os.getpid()}/mem")  # another file
    with pytest.raises(UserError, match=r"(?s)2 problems.*bad.jsonl: cannot be read \(OSError.*bad.parquet: cannot"):
        convert(tmp_path, byte_tokenizer, 8, tmp_path / "out", quiet=True)


# --- over HTTP


@pytest.fixture(scope="module")
def remote_folder(tmp_path_factory):
    """TEXTS in parquet (four row groups), JSON lines and compressed JSON lines."""
    folder = tmp_path_factory.mktemp("remote")
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet", row_group_size=15)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (folder / "b.jsonl").write_bytes(lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    return folder


NAMES = ("a.parquet", "b.jsonl", "c.jsonl.gz")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_corpus_gives_the_same_bytes_as_a_local_one(
    remote_folder, byte_tokenizer, tmp_path, part_per_span, workers
):
    local = convert(remote_folder, byte_tokenizer, 16, tmp_path / "local", quiet=True)
    with serving(remote_folder) as (url, _):
        inputs = [f"{url}/{name}?download=true" for name in NAMES]
        remote = convert(inputs, byte_tokenizer, 16, tmp_path / "remote", workers=workers, quiet=True)
    from_local, from_remote = contents(tmp_path / "local"), contents(tmp_path / "remote")
    assert from_local.pop("manifest.json") != from_remote.pop("manifest.json")
    assert from_local == from_remote
    assert [one.hash for one in remote.inputs] == [f"etag:{one.name}-{one.size}" for one in local.inputs]
    assert [(one.name, one.size) for one in remote.inputs] == [(one.name, one.size) for one in local.inputs]
    spans = [TEXTS[i : i + 15] for i in range(0, 60, 15)] + [TEXTS, TEXTS]
    parts = [[(text, None) for text in span] for span in spans]
    assert_holds(tmp_path / "remote", remote, expect(parts, byte_tokenizer, 16, heldout=0.02))


@pytest.mark.parametrize("workers", [0, 2])
def test_dropped_connections_are_tried_again(
    remote_folder, byte_tokenizer, tmp_path, part_per_span, monkeypatch, workers
):
    """Both in the first responses, while files are inspected, and in later ones, while text is read."""
    monkeypatch.setattr(convert_module, "RETRY_SECONDS", 0.01)
    convert(remote_folder, byte_tokenizer, 16, tmp_path / "local", quiet=True)
    with serving(remote_folder, drop=(1, 2, 5, 8, 10)) as (url, server):
        inputs = [f"{url}/{name}" for name in NAMES]
        convert(inputs, byte_tokenizer, 16, tmp_path / "remote", workers=workers, quiet=True)
        assert server.answers > 10
    from_local, from_remote = contents(tmp_path / "local"), contents(tmp_path / "remote")
    assert {**from_local, "manifest.json": b""} == {**from_remote, "manifest.json": b""}


def test_a_server_that_always_drops_connections_gives_an_error_that_names_the_file(
    remote_folder, byte_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(convert_module, "RETRY_SECONDS", 0.01)
    with (
        serving(remote_folder, drop=range(1000)) as (url, server),
        pytest.raises(UserError, match=r"c.jsonl.gz: cannot be read \(ClientPayloadError"),
    ):
        convert(f"{url}/c.jsonl.gz", byte_tokenizer, 16, tmp_path / "out", quiet=True)
    assert server.answers < 20


def test_without_range_requests_small_files_are_read_and_large_ones_refused(
    remote_folder, byte_tokenizer, tmp_path, monkeypatch
):
    """Files of up to 8 MB are read in one response."""
    monkeypatch.setattr(convert_module, "RETRY_SECONDS", 0.01)
    with serving(remote_folder, ranges=False, etags=False) as (url, _):
        inputs = [f"{url}/{name}" for name in NAMES]
        manifest = convert(inputs, byte_tokenizer, 16, tmp_path / "out", quiet=True)
        assert (manifest.documents.written, manifest.inputs[0].hash) == (180, "")
    pq.write_table(pa.table({"text": ["x" * 9_000_000]}), tmp_path / "large.parquet", None, compression="none")
    with (
        serving(tmp_path, ranges=False) as (url, _),
        pytest.raises(UserError, match=r"large.parquet: cannot be read .*The HTTP server doesn't .* support range"),
    ):
        convert(f"{url}/large.parquet", byte_tokenizer, 16, tmp_path / "large", quiet=True)


def test_missing_remote_files_are_named(remote_folder, tmp_path):
    with serving(remote_folder) as (url, _), pytest.raises(UserError) as error:
        find_sources([f"{url}/absent.parquet", f"{url}/a.parquet", f"{url}/gone.jsonl"])
    assert [problem.split(": cannot")[0] for problem in error.value.problems] == [
        f"{url}/absent.parquet",
        f"{url}/gone.jsonl",
    ]
    assert "FileNotFoundError" in str(error.value)
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/a.parquet: cannot be found or reached"):
        find_sources("http://127.0.0.1:9/a.parquet")


def test_a_protocol_whose_package_is_missing_is_reported_with_the_package():
    pytest.importorskip("fsspec")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"gs:// needs another package: .*gcsfs"):
            find_sources("gs://bucket/a.parquet")
    with pytest.raises(UserError, match=r"nothing://.*: cannot be opened: Protocol not known"):
        find_sources("nothing://bucket/a.parquet")


def test_hugging_face_paths_reach_its_hub(monkeypatch):
    """Without a network: the path is parsed correctly, and the failure is not retried for a minute."""
    hub = pytest.importorskip("huggingface_hub")
    requested = []

    def info(self, path, *arguments, **options):
        requested.append(path)
        raise ConnectionError("no network")

    monkeypatch.setattr(hub.HfFileSystem, "info", info)
    monkeypatch.setattr(hub.HfFileSystem, "find", info)
    for path in ("sample/10BT/000.parquet", "sample/10BT/*.parquet"):
        with pytest.raises(UserError, match=r"cannot be found or reached \(ConnectionError: no network\)"):
            find_sources(f"hf://datasets/HuggingFaceFW/fineweb-edu/{path}")
    assert requested == [f"datasets/HuggingFaceFW/fineweb-edu/sample/10BT{name}" for name in ("/000.parquet", "")]


def test_a_remote_file_has_the_hash_that_its_server_reports(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    local, remote = (Source(path, "a", "text", None, 1) for path in (str(tmp_path / "a.txt"), "memory://a.txt"))
    assert content_hash(local) == f"sha256:{file_sha256(tmp_path / 'a.txt')}"
    import fsspec

    memory = type(fsspec.filesystem("memory"))
    for info, expected in [
        ({"lfs": {"sha256": "12ab"}}, "sha256:12ab"),
        ({"ETag": '"34cd"'}, "etag:34cd"),
        ({}, ""),
    ]:
        monkeypatch.setattr(memory, "info", lambda self, path, info=info, **options: info)
        assert content_hash(remote) == expected


def test_files_of_fsspecs_memory_file_system_are_converted(byte_tokenizer, tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/corpus/a.txt", b"some text that is long enough")
    manifest = convert("memory://corpus", byte_tokenizer, 8, tmp_path / "out", heldout=0, quiet=True)
    assert (manifest.splits["train"].tokens, manifest.inputs[0].name) == (29, "a.txt")
