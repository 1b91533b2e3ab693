"""Token files of a store give the shards of the same files on a disk; copies resume, are checked, and are removed."""

import os
from pathlib import Path

import pytest
from helpers.conversion import contents
from helpers.http_server import serving
from helpers.selection import first_is_quick
from helpers.token_files import EOS, write_mds, write_megatron, write_nanoset, write_saved_dataset

from mythos_dist.data.manifest import TokenRules
from mythos_dist.errors import UserError
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.spans import Columns
from mythos_dist.prepare.tokens import copies

ROWS = [[3 + (i * j) % 250 for j in range(1, 20 + i % 7)] + [EOS] for i in range(60)]
# What is written, and the end of the URL that names it.
SOURCES = {
    "megatron-prefix": (lambda path: write_megatron(path / "a", ROWS, "uint16"), "/a"),
    "megatron-bin": (lambda path: write_megatron(path / "a", ROWS, "uint16"), "/a.bin"),
    "megatron-folder": (lambda path: [write_megatron(path / name, ROWS, "uint16") for name in "ab"], ""),
    "nanoset": (lambda path: write_nanoset(path / "a.ds", ROWS), "/a.ds"),
    "datasets": (lambda path: write_saved_dataset(path / "saved", ROWS, shards=2), "/saved"),
    "mds": (lambda path: write_mds(path / "mds", ROWS, size_limit=2000, hashes=["sha1"]), "/mds/"),
}


@pytest.fixture
def import_from(byte_tokenizer, tmp_path):
    """Import into a folder of this name, with `tmp_path/scratch` for copies."""

    def run(source: object, name: str) -> Path:
        options = {"columns": Columns(tokens=TokenRules()), "quiet": True, "scratch": tmp_path / "scratch"}
        convert(str(source), byte_tokenizer, 16, tmp_path / name, heldout=0.1, **options)
        return tmp_path / name

    return run


@pytest.fixture
def bucket(store, no_faults) -> str:
    """The name of a new bucket."""
    return f"tokens-{os.urandom(4).hex()}"


@pytest.mark.parametrize("name", first_is_quick(SOURCES))
def test_a_url_gives_the_shards_of_the_local_files(name, import_from, store, bucket, tmp_path):
    write, end = SOURCES[name]
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    url = store.upload(tmp_path / "source", bucket)
    expected = contents(import_from(f"{tmp_path / 'source'}{end}", "local"))
    assert contents(import_from(url + end, "remote")) == expected
    assert contents(import_from(f"file://{tmp_path / 'source'}{end}", "file")) == expected
    assert list((tmp_path / "scratch" / "tokens").iterdir()) == [], "copies are removed"
    assert {number for name, number in store.downloads.items() if name} == {1}  # those without a name are lists


def test_a_copy_resumes_with_the_missing_files(import_from, store, bucket, tmp_path):
    """The second file is denied in the first attempt; the first one is not copied again."""
    (tmp_path / "source").mkdir()
    write_megatron(tmp_path / "source" / "a", ROWS, "uint16")
    url = store.upload(tmp_path / "source", bucket)
    # The first request of a file is HEAD.
    store.proxy.fault = lambda path, number: 403 if path.endswith("a.idx") and number > 1 else None
    with pytest.raises(UserError, match=r"a.idx.* access is denied; check the credentials"):
        import_from(f"{url}/a", "out")
    assert not (tmp_path / "out").exists()
    store.proxy.fault = lambda path, number: None
    import_from(f"{url}/a", "out")
    assert store.downloads["a.bin"] == store.downloads["a.idx"] == 1


def test_a_truncated_body_is_read_again(import_from, store, bucket, tmp_path):
    (tmp_path / "source").mkdir()
    write_megatron(tmp_path / "source" / "a", ROWS, "uint16")
    url = store.upload(tmp_path / "source", bucket)
    expected = contents(import_from(tmp_path / "source" / "a", "local"))
    store.proxy.fault = lambda path, number: ("truncate", 0.5) if path.endswith("a.bin") and number == 2 else None
    assert contents(import_from(f"{url}/a", "remote")) == expected


def test_what_is_missing_or_does_not_fit_is_named(import_from, store, bucket, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    write_megatron(tmp_path / "source" / "a", ROWS, "uint16")
    url = store.upload(tmp_path / "source", bucket)
    with pytest.raises(UserError, match="no such file, folder or prefix in the store"):
        import_from(f"{url}/b", "out")
    store.client().delete_object(Bucket=bucket, Key="data/a.idx")
    with pytest.raises(UserError, match=r"its index .*a\.idx is missing"):
        import_from(f"{url}/a.bin", "out")
    usage = copies.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: usage._replace(free=10))
    (tmp_path / "scratch" / "tokens").mkdir(parents=True, exist_ok=True)
    for copy in (tmp_path / "scratch" / "tokens").rglob("a.bin"):
        copy.unlink()
    with pytest.raises(UserError, match=r"1 file of .* has room for 10B; name a folder on a larger disk"):
        import_from(f"{url}/a.bin", "out")


def test_a_name_that_leaves_the_scratch_folder_is_refused():
    """Names of objects may be anything."""
    for name in ("x/../../y.bin", "../y.bin", ".."):
        with pytest.raises(UserError, match="would be written outside of the scratch folder"):
            copies._sizes({f"bucket/data/{name}": {"size": 1, "type": "file"}}, "bucket/data")


def test_a_prefix_on_a_web_server(import_from, tmp_path):
    (tmp_path / "source").mkdir()
    write_megatron(tmp_path / "source" / "a", ROWS, "uint16")
    with serving(tmp_path / "source") as (url, _):
        assert contents(import_from(f"{url}/a", "remote")) == contents(import_from(tmp_path / "source" / "a", "local"))
