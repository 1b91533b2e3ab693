"""Conversions to a store write the bytes of a local one, whatever fails in between, and are verified there."""

import json
import shutil
from collections import Counter

import pytest
from helpers.conversion import contents
from helpers.selection import first_is_quick
from helpers.token_files import write_megatron

from mythos_dist.data.manifest import Filters, TokenRules
from mythos_dist.errors import UserError
from mythos_dist.prepare import convert as convert_module
from mythos_dist.prepare import store_output
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.spans import Columns
from mythos_dist.prepare.verify import verify

pytestmark = pytest.mark.usefixtures("no_faults")

TEXTS = [f"Text {number} has the words {'and more ' * (number % 9)}of number {number}." for number in range(120)]
SEQ_LEN = 32


@pytest.fixture
def url(store, request) -> str:
    """A folder of a new bucket."""
    return store.create_bucket(f"bucket-{abs(hash(request.node.name)) % 10**9}")


@pytest.fixture
def job(write_parquet, byte_tokenizer, part_per_span, tmp_path):
    """Convert 120 texts in 12 parts; `to`: a URL, or None for the folder `local`."""
    source = write_parquet(text=TEXTS)

    def run(to: str | None, **options):
        options = {"heldout": 0.1, "quiet": True, "scratch": tmp_path / "scratch", **options}
        given = options.pop("source", source)
        return convert(given, byte_tokenizer, options.pop("seq_len", SEQ_LEN), to or tmp_path / "local", **options)

    return run


def scratch_files(tmp_path) -> list[str]:
    return [path for path in contents(tmp_path / "scratch") if not path.endswith("/lock")]


def written(store) -> list[str]:
    """Names below the bucket's folder, in the order in which they were written."""
    return [path.partition("/data/")[2] for method, path in store.proxy.written if method == "PUT"]


OPTIONS = {
    "held-out documents": {},
    "compressed": {"compression": "zstd"},
    "no held-out split": {"heldout": 0.0},
    "too few documents, so windows are held out": {"heldout": 0.005},
    "a limit": {"filters": Filters(limit_tokens=1500)},
    "duplicates": {"filters": Filters(dedup=True), "workers": 2},
    "two workers": {"workers": 2},
}


@pytest.mark.parametrize("name", first_is_quick(OPTIONS))
def test_a_store_gets_the_bytes_of_a_local_conversion(store, url, job, tmp_path, name):
    """Nothing else is left there, nothing on the disk; the manifest comes last."""
    manifest = job(url, **OPTIONS[name])
    assert manifest == job(None, **OPTIONS[name])
    assert store.content(url) == contents(tmp_path / "local")
    assert scratch_files(tmp_path) == []
    assert written(store)[-1] == "manifest.json" and written(store).count("manifest.json") == 1
    assert verify(url).ok
    store.reset()
    assert job(url, **OPTIONS[name]) == manifest
    assert written(store) == [], "it was finished"


@pytest.mark.launch
def test_an_import_of_tokens_writes_to_a_store(store, url, job, tmp_path):
    source = write_megatron(tmp_path / "a", [[byte + 3 for byte in text.encode()] for text in TEXTS])
    options = {"source": source, "columns": Columns(tokens=TokenRules())}
    assert job(url, **options) == job(None, **options)
    assert store.content(url) == contents(tmp_path / "local")


@pytest.mark.launch
def test_requests_are_those_that_the_docs_count(store, url, job):
    """docs/data_stores.md, "Costs": 12 parts, each with a shard; train/ has one more, of joined partial windows."""

    def requests() -> Counter:
        with store.proxy.lock:
            log = Counter("LIST" if "list-type" in path else method for method, path in store.proxy.log)
            store.proxy.log.clear()
        return log

    manifest = job(url, heldout=0.0)
    shards = sum("shard." in name for name in written(store))
    assert manifest.splits["train"].windows and shards == 13
    assert requests() == {"PUT": shards + 12 + 5, "LIST": 3, "POST": 1}, "POST: the records are removed"
    assert verify(url).ok
    assert requests() == {"GET": shards + 4, "LIST": 2}


def test_a_mounted_folder_is_a_store(job, tmp_path):
    (tmp_path / "mount").mkdir()
    url = f"file://{tmp_path / 'mount'}/shards"
    assert job(url) == job(None)
    assert contents(tmp_path / "mount" / "shards") == contents(tmp_path / "local") and verify(url).ok


@pytest.mark.parametrize("scratch_is_lost", [False, True])
@pytest.mark.launch
def test_after_a_failure_only_what_is_missing_is_converted_and_uploaded(
    store, url, job, tmp_path, monkeypatch, scratch_is_lost
):
    """The store fails from the 5th part on, until its second start; no shard is uploaded twice."""
    for name, value in {"PATIENCE": 0.3, "THREADS": 1, "WAITING": 1}.items():
        monkeypatch.setattr(store_output, name, value)
    store.proxy.fault = lambda path, number: 503 if "part-00004" in path else None
    with pytest.raises(UserError, match=r"part-00004.* cannot be written after .*run the same command again"):
        job(url)
    before = Counter(written(store))
    assert "unfinished/part-00003.json" in before and "manifest.json" not in before
    assert "train/part-00004/shard.00000.mds" not in before
    with pytest.raises(UserError, match="not a finished conversion"):
        verify(url)
    store.proxy.fault = lambda path, number: None
    converted = []
    convert_part = convert_module.convert_part
    monkeypatch.setattr(
        convert_module, "convert_part", lambda *all: (converted.append(all[2].name), convert_part(*all))[1]
    )
    if scratch_is_lost:
        shutil.rmtree(tmp_path / "scratch")
    manifest = job(url)
    recorded = {name.removeprefix("unfinished/").removesuffix(".json") for name in before if "/part-" in name}
    assert not recorded & {*converted} and "part-00011" in converted
    assert {name: times for name, times in Counter(written(store)).items() if times > 1 and "shard." in name} == {}
    assert manifest == job(None) and store.content(url) == contents(tmp_path / "local")


@pytest.mark.launch
def test_shards_that_are_lost_in_between_are_converted_again(store, url, job, tmp_path):
    store.proxy.fault = lambda path, number: 403 if path.endswith("train/index.json") else None
    with pytest.raises(UserError, match="access is denied"):
        job(url)
    store.proxy.fault = lambda path, number: None
    bucket = url.split("/")[2]
    store.client().delete_object(Bucket=bucket, Key="data/train/part-00002/shard.00000.mds")
    store.client().put_object(Bucket=bucket, Key="data/train/part-00003/shard.00000.mds", Body=b"short")
    store.client().put_object(Bucket=bucket, Key="data/train/part-99999/shard.00000.mds", Body=b"of no part")
    store.client().put_object(Bucket=bucket, Key="data/notes.txt", Body=b"of the user")
    assert job(url) == job(None)
    found = store.content(url)
    assert found.pop("notes.txt") == b"of the user" and found == contents(tmp_path / "local")


@pytest.mark.launch
def test_the_disk_holds_a_few_parts_only(store, url, job, tmp_path, monkeypatch):
    """One thread uploads and one part waits, so there are never more than these two and the next."""
    monkeypatch.setattr(store_output, "THREADS", 1)
    monkeypatch.setattr(store_output, "WAITING", 1)
    counts = []

    def count_parts(path, number):
        counts.append(len({*(tmp_path / "scratch").glob("conversions/*/train/part-*")}))

    store.proxy.fault = count_parts
    job(url, heldout=0.0)
    assert max(counts) <= 3 and len(counts) > 12


@pytest.mark.launch
def test_other_settings_and_other_files_are_refused(store, url, job, monkeypatch, tmp_path):
    for name, value in {"PATIENCE": 0.3, "THREADS": 1}.items():
        monkeypatch.setattr(store_output, name, value)
    store.proxy.fault = lambda path, number: 503 if "part-00004" in path else None
    with pytest.raises(UserError, match="part-00004"):
        job(url)
    store.proxy.fault = lambda path, number: None
    with pytest.raises(UserError, match=rf"{url}: heldout=0.2, but these shards were made with 0.1"):
        job(url, heldout=0.2)
    job(url)
    with pytest.raises(UserError, match=rf"{url}: heldout=0.2, but these shards were made with 0.1"):
        job(url, heldout=0.2)
    store.client().put_object(Bucket=url.split("/")[2], Key="other/file", Body=b"")
    with pytest.raises(UserError, match="contains file, which is not the output of a conversion"):
        job(url.replace("/data", "/other"))
    with pytest.raises(UserError, match="there is no such bucket"):
        job("s3://absent-bucket/x")
    with pytest.raises(UserError, match="is read, but not written"):
        job("https://host/x")
    assert not (tmp_path / "https:").exists()


@pytest.mark.launch
def test_a_conversion_without_a_window_leaves_nothing(store, url, job, tmp_path):
    with pytest.raises(UserError, match="fill one window"):
        job(url, seq_len=100_000)
    assert store.content(url) == {} and scratch_files(tmp_path) == []


@pytest.mark.launch
def test_a_first_start_with_a_wrong_setting_does_not_bind_the_second(store, url, job, tmp_path):
    """As in a local folder: it has no finished part."""
    store.proxy.fault = lambda path, number: 403 if "/part-" in path else None
    with pytest.raises(UserError, match="access is denied"):
        job(url, heldout=0.2)
    store.proxy.fault = lambda path, number: None
    assert job(url) == job(None)
    assert store.content(url) == contents(tmp_path / "local")


# --- verification


@pytest.fixture
def stored(store, url, job) -> str:
    job(url, compression="zstd")
    return url


@pytest.mark.launch
def test_each_damaged_object_is_named(store, stored):
    bucket, client, objects = stored.split("/")[2], store.client(), store.content(stored)
    names = [name for name in objects if name.startswith("train/part-0000")]

    def replace(name: str, content: bytes) -> None:
        client.put_object(Bucket=bucket, Key=f"data/{name}", Body=content)

    changed = bytearray(objects[names[0]])
    changed[-1] ^= 1
    replace(names[0], bytes(changed))
    replace(names[1], objects[names[1]][:-1])
    replace(names[2], objects[names[2]] + b"x")
    client.delete_object(Bucket=bucket, Key=f"data/{names[3]}")
    replace("train/extra", b"")
    report = verify(stored, workers=2)
    problems = {one["shard"]: " ".join(one["problems"]) for one in report.bad}
    assert {*problems} == {*names[:4]} and not report.problems
    assert "has another" in problems[names[0]] and f"has {len(objects[names[1]]) - 1} bytes" in problems[names[1]]
    assert "more than" in problems[names[2]] and problems[names[3]] == "is missing"
    assert any("train/ has 1 file not listed in index.json: extra" in remark for remark in report.remarks)


@pytest.mark.launch
def test_other_descriptions_are_problems_of_the_folder(store, stored):
    bucket, client = stored.split("/")[2], store.client()
    client.put_object(Bucket=bucket, Key="data/bytes.model", Body=b"another")
    client.put_object(Bucket=bucket, Key="data/tokenizer.model", Body=b"another")
    client.delete_object(Bucket=bucket, Key="data/heldout/index.json")
    problems = " ".join(verify(stored).problems)
    assert "is not the tokenizer that the shards were made with" in problems
    assert "heldout/index.json lists 0 windows" in problems and "is not the one that manifest.json" in problems


@pytest.mark.launch
def test_a_store_that_denies_access_is_no_damage(store, stored, monkeypatch):
    store.proxy.fault = lambda path, number: 403 if path.endswith(".zstd") else None
    with pytest.raises(UserError, match="access is denied"):
        verify(stored, workers=2)
    with pytest.raises(UserError, match="not a finished conversion"):
        verify(stored + "/absent")


@pytest.mark.launch
def test_progress_counts_what_is_uploaded(store, url, job, monkeypatch, capsys):
    from mythos_dist import progress

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(store_output, "WAITING", 1)
    monkeypatch.setattr(store_output, "THREADS", 1)
    job(url, quiet=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("converting")]
    assert any("GB converted" in line and "GB uploaded (" in line for line in lines), lines


# --- inputs in a store


@pytest.mark.parametrize(
    "selection", first_is_quick(["", "/sample/10BT", "/data/*/*.parquet", "/sample/10BT/000_00000.parquet"])
)
def test_inputs_in_s3_give_the_shards_of_local_ones(store, job, write_parquet, tmp_path, selection):
    """FineWeb-Edu's layout: subsets by crawl and samples, with a README."""
    root = tmp_path / "fineweb-edu"
    for number, name in enumerate(
        ["data/CC-MAIN-2013-20/train-00000-of-00002", "data/CC-MAIN-2024-10/000_00000", "sample/10BT/000_00000"]
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(text=TEXTS[40 * number : 40 * number + 40]).rename(root / f"{name}.parquet")
    (root / "README.md").write_text("# FineWeb-Edu")
    bucket = f"inputs-{abs(hash(selection)) % 10**9}"
    url = store.upload(root, bucket)
    store.proxy.fault = lambda path, number: 503 if number == 2 else None
    remote = job(f"file://{tmp_path}/remote", source=url + selection)
    local = job(f"file://{tmp_path}/local", source=f"{root}{selection}")
    assert (remote.documents, remote.splits, remote.fingerprint) == (local.documents, local.splits, local.fingerprint)
    assert all(one.hash.startswith("etag:") for one in remote.inputs)
    assert [one.name for one in remote.inputs] == [one.name for one in local.inputs]


@pytest.mark.launch
def test_missing_inputs_in_s3_are_named(store, job, url, tmp_path):
    with pytest.raises(UserError, match=f"{url}/absent: no file there"):
        job(None, source=f"{url}/absent")
    with pytest.raises(UserError, match="there is no such bucket"):
        job(None, source="s3://absent-bucket/a.parquet")
    assert json.dumps(store.content(url)) == "{}"
