"""Checkpoints in a store are read as from a folder, at any layout, in ranges; each failure of the store is named."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.http_server import serving
from helpers.layouts import KINDS, Layout, part, values, write_checkpoint
from helpers.selection import first_is_quick

from mythos_dist.checkpoint import range_plan
from mythos_dist.checkpoint.manifest import VersionError
from mythos_dist.checkpoint.reader import Checkpoint, Wanted
from mythos_dist.checkpoint.restore import find_checkpoint, open_checkpoint
from mythos_dist.checkpoint.signature import VARIABLE
from mythos_dist.errors import UserError
from mythos_dist.store import fetch, folder
from mythos_dist.urls import RemotePath

SHAPES = {
    "embed": (301, 128),
    "up": (128, 512),
    "down": (16, 4096),
    "norm": (128,),
    "experts": (3, 128, 64),
    "one": (),
}
DIMS = {"embed": 0, "up": 0, "down": 1, "norm": None, "experts": 1, "one": None}
TENSORS = values(SHAPES)
SAVED = Layout(2, 2)


def set_patience(monkeypatch, seconds: float) -> None:
    """The time after which requests are not tried again."""
    for function in (folder.read_range, folder.read_ranges, folder.list_folder, folder.size_of, fetch.read_object):
        monkeypatch.setattr(function, "__defaults__", (seconds,))


@pytest.fixture(autouse=True)
def short_retries(no_faults, monkeypatch):
    set_patience(monkeypatch, 1.0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Steps 2 and 4; of step 4, other values than TENSORS."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    write_checkpoint(root, 2, SAVED, TENSORS, DIMS)
    write_checkpoint(root, 4, SAVED, values(SHAPES, seed=1), DIMS)
    return root


@pytest.fixture(scope="module")
def run_url(store, checkpoints) -> RemotePath:
    return RemotePath(store.upload(checkpoints.parent, "run"))


@pytest.fixture
def own_run(store, checkpoints, tmp_path):
    """The URL of a copy of the run, which the test may change."""
    bucket = f"own-{abs(hash(tmp_path))}"

    def upload(change=lambda folder: None) -> RemotePath:
        copy = tmp_path / "run"
        shutil.copytree(checkpoints.parent, copy)
        change(copy)
        return RemotePath(store.upload(copy, bucket))

    return upload


def wanted_at(layout: Layout, rank: int) -> list[tuple[Wanted, np.ndarray]]:
    """What a rank reads, and what it should get."""
    found = []
    for name, dim in DIMS.items():
        if piece := layout.piece(rank, SHAPES[name], dim):
            for kind in KINDS:
                out = np.zeros(piece.last - piece.first, np.float32)
                found.append((Wanted(kind, name, piece, out), part(TENSORS[f"{kind}/{name}"], piece)))
    return found


def read(checkpoint: Checkpoint, layout: Layout, rank: int) -> int:
    """Read a rank's state and check it; returns its bytes."""
    wanted = wanted_at(layout, rank)
    progress: list[int] = []
    checkpoint.read_all([one for one, _ in wanted], progress.append)
    for one, expected in wanted:
        np.testing.assert_array_equal(one.out, expected, err_msg=f"{one.kind} {one.name}")
    needed = sum(4 * int(np.count_nonzero(expected)) for _, expected in wanted)
    assert sum(progress) == (needed if checkpoint.is_remote else sum(one.out.nbytes for one, _ in wanted))
    return needed


def sent(store) -> int:
    """Bytes of tensor files."""
    return sum(size for (_, path), size in store.proxy.sent.items() if path.endswith(".safetensors"))


LAYOUTS = [Layout(2, 2), Layout(1, 1), Layout(2, 3), Layout(1, 4), Layout(4, 1), Layout(3, 2)]


@pytest.mark.parametrize("layout", first_is_quick(LAYOUTS), ids=str)
def test_each_rank_of_any_layout_reads_its_bytes_and_few_others(store, run_url, checkpoints, layout):
    """Bit for bit what was saved, as from the folder; at most 1.1 times the bytes that the rank needs, headers
    included, also where `down` is sharded by columns more finely than it was saved."""
    at = run_url / "checkpoints" / "step-00000002"
    for rank in range(layout.ranks):
        store.reset()
        needed = read(Checkpoint(at), layout, rank)
        assert sent(store) <= 1.1 * needed, f"{sent(store)} bytes for {needed}"
        assert read(Checkpoint(checkpoints / "step-00000002"), layout, rank) == needed


def test_neighboring_pieces_are_one_request(store, run_url):
    """At the layout that saved, a rank reads one file, and of that the parts that it holds: with the header, two
    requests, beside those of what the other replica has saved for it."""
    checkpoint = Checkpoint(run_url / "checkpoints" / "step-00000002")
    store.reset()
    read(checkpoint, Layout(2, 2), 3)
    assert {path.rpartition("/")[2]: number for path, number in store.proxy.requests.items()} == {
        "rank-00003.safetensors": 2
    }


def test_a_checkpoint_is_found_opened_and_sent_to_other_processes(run_url, checkpoints):
    for path in (run_url, run_url / "checkpoints", run_url / "checkpoints" / "step-00000004"):
        found = open_checkpoint(path)
        assert (found.manifest.step, str(found.folder)) == (4, f"{run_url}/checkpoints/step-00000004")
        assert found.manifest == Checkpoint(checkpoints / "step-00000004").manifest and found.find_damage() == []
    assert pickle.loads(pickle.dumps(found.folder)) == found.folder
    assert (found.folder.name, found.folder.parent) == ("step-00000004", run_url / "checkpoints")


def test_the_newest_complete_checkpoint_is_found(group, own_run):
    """One without a manifest is being uploaded; other names, also of files, are ignored."""

    def change(run: Path) -> None:
        for name in ("step-00000006", "step-00000008.tmp-1", "step-9"):
            shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / name)
        (run / "checkpoints" / "step-00000006" / "checkpoint.json").unlink()
        (run / "checkpoints" / "step-00000010").write_text("a file")

    url = own_run(change)
    found, damaged = find_checkpoint(url / "checkpoints")
    assert found and found.manifest.step == 4 and damaged == []
    assert open_checkpoint(url).manifest.step == 4
    with pytest.raises(UserError, match=r"step-00000006/checkpoint\.json: is missing: .* still being uploaded"):
        open_checkpoint(url / "checkpoints" / "step-00000006")
    assert find_checkpoint(url / "nothing") == (None, [])
    with pytest.raises(UserError, match="neither a run nor a checkpoint"):
        open_checkpoint(url / "nothing")


DAMAGE = {
    "a lost file": (lambda file: file.unlink(), "rank-00001.safetensors is missing"),
    "a file that was cut": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "bytes instead of"),
    "a changed manifest": (
        lambda file: (file.parent / "checkpoint.json").write_text(
            (file.parent / "checkpoint.json").read_text().replace('"step": 4', '"step": 5')
        ),
        "checkpoint.json: is damaged (its hash does not match)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.launch
def test_an_older_checkpoint_is_taken_if_the_newest_is_damaged(group, own_run, kind):
    harm, message = DAMAGE[kind]
    url = own_run(lambda run: harm(run / "checkpoints" / "step-00000004" / "rank-00001.safetensors"))
    found, damaged = find_checkpoint(url / "checkpoints")
    assert found and found.manifest.step == 2
    assert len(damaged) == 1 and message in damaged[0] and f"{url}/checkpoints/step-00000004" in damaged[0]


def test_another_format_version_is_not_skipped(group, own_run):
    def change(run: Path) -> None:
        (run / "checkpoints" / "step-00000004" / "checkpoint.json").write_text('{"format_version": 99}\n')

    with pytest.raises(VersionError, match="format_version=99"):
        find_checkpoint(own_run(change) / "checkpoints")


@pytest.mark.parametrize("fault", [403, 503, "reset"], ids=str)
def test_a_store_that_fails_is_no_reason_to_go_back(group, store, run_url, fault):
    """The newest checkpoint may be intact."""
    store.proxy.fault = lambda path, number: fault if path.endswith("4/checkpoint.json") else None
    with pytest.raises(UserError, match=r"step-00000004/checkpoint\.json: cannot be read after"):
        find_checkpoint(run_url / "checkpoints")


def test_an_old_listing_does_no_harm(group, store, run_url):
    """It lacks a file, has an old size of another, and a checkpoint that was removed."""

    def old(path: str, body: bytes) -> bytes:
        if "prefix=data%2Fcheckpoints%2Fstep-00000004" in path:
            first, _, rest = body.decode().partition("<Contents>")
            return (first + rest.partition("</Contents>")[2]).replace("<Size>", "<Size>1").encode()
        new = b"<CommonPrefixes><Prefix>data/checkpoints/step-00000009/</Prefix></CommonPrefixes></ListBucketResult>"
        return body.replace(b"</ListBucketResult>", new)

    store.proxy.rewrite = lambda path, body: old(path, body) if "list-type=2" in path else body
    found, damaged = find_checkpoint(run_url / "checkpoints")
    assert found and found.manifest.step == 4 and damaged == []


@pytest.mark.launch
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(store, own_run, checkpoints):
    """Its run went back and has saved the step again: what was read may be of both."""
    url = own_run()
    checkpoint = open_checkpoint(url / "checkpoints" / "step-00000004")
    checkpoint.raise_if_replaced()
    other = (checkpoints / "step-00000002" / "checkpoint.json").read_bytes()
    bucket = url.url.removeprefix("s3://").partition("/")[0]
    key = "data/checkpoints/step-00000004/checkpoint.json"
    for content in (other, None):
        if content is None:
            store.client().delete_object(Bucket=bucket, Key=key)
        else:
            store.client().put_object(Bucket=bucket, Key=key, Body=content)
        with pytest.raises(UserError, match="step-00000004: was replaced or removed while it was read"):
            checkpoint.raise_if_replaced()


FAULTS = {
    "a reset": "reset",
    "503": 503,
    "a truncated body": ("truncate", 0.7),
    "a changed byte": ("corrupt", 0.9),
    "404, once": 404,
    "403, once": 403,
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.launch
def test_a_fault_that_passes_is_retried(store, run_url, kind, monkeypatch):
    """Of each file, the second request fails, which is the first one of tensors."""
    set_patience(monkeypatch, 300.0)  # a busy machine may take a second for one request
    checkpoint = Checkpoint(run_url / "checkpoints" / "step-00000002")
    store.proxy.fault = lambda path, number: FAULTS[kind] if path.endswith(".safetensors") and number == 2 else None
    store.proxy.requests.clear()
    read(checkpoint, SAVED, 1) if kind == "a changed byte" else read(checkpoint, Layout(1, 3), 1)


LASTING = {
    404: "cannot be read after 2 attempts .*there is no such file",
    403: "access is denied; check the credentials",
    (403, "RequestTimeTooSkewed"): "the clock of this node differs from the store's; synchronize it",
    503: "check the network, the store and AWS_ENDPOINT_URL",
    "reset": "check the network, the store and AWS_ENDPOINT_URL",
    ("truncate", 0.0): "check the network, the store and AWS_ENDPOINT_URL",
    ("corrupt", 0.9): r"is damaged: its hash is not the one in checkpoint\.json",
}


@pytest.mark.parametrize("fault", LASTING, ids=str)
def test_a_fault_that_lasts_is_one_message_that_names_the_file(store, run_url, fault):
    checkpoint = Checkpoint(run_url / "checkpoints" / "step-00000002")
    store.proxy.requests.clear()
    store.proxy.fault = lambda path, number: fault if path.endswith("1.safetensors") and number >= 2 else None
    with pytest.raises(UserError, match=LASTING[fault]) as error:
        read(checkpoint, SAVED, 1)
    assert str(error.value).startswith(f"{run_url}/checkpoints/step-00000002/rank-00001.safetensors: ")
    assert store.env["AWS_SECRET_ACCESS_KEY"] not in str(error.value)


def test_a_header_that_contradicts_the_manifest_is_named(store, run_url):
    """Whose bytes would be another tensor's."""
    checkpoint = Checkpoint(run_url / "checkpoints" / "step-00000002")

    def swap(path: str, body: bytes) -> bytes:
        return body.replace(b'"parameter/up"', b'"parameter/xx"') if path.partition("?")[0].endswith("s") else body

    store.proxy.rewrite = swap
    with pytest.raises(UserError, match=r"rank-0000\d\.safetensors: cannot be read \(it does not hold all of"):
        read(checkpoint, Layout(1, 1), 0)


def test_signed_files_are_read_completely_before_they_are_used(
    group, store, checkpoints, own_run, tmp_path, monkeypatch
):
    from mythos_dist.checkpoint.canonical import write_canonical

    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)

    def sign(run: Path) -> None:
        monkeypatch.setenv(VARIABLE, str(key))
        shutil.rmtree(run / "checkpoints")
        write_canonical(Checkpoint(checkpoints / "step-00000002"), run, workers=1)

    url = own_run(sign)
    store.reset()
    found, _ = find_checkpoint(url / "checkpoints")
    assert found and sent(store) >= found.manifest.bytes
    read(found, Layout(1, 2), 1)
    key.write_bytes(b"x" * 32)
    with pytest.raises(UserError, match="its signature is wrong"):
        find_checkpoint(url / "checkpoints")


def test_the_number_of_requests_is_bounded(store, run_url, monkeypatch):
    """At a larger `tensor`, half of each of many short rows: they are joined rather than requested one by one."""
    monkeypatch.setattr(range_plan, "MANY_REQUESTS", 40)
    checkpoint = Checkpoint(run_url / "checkpoints" / "step-00000002")
    store.reset()
    needed = read(checkpoint, Layout(4, 1), 1)
    assert sum(store.proxy.requests.values()) <= 50
    assert sent(store) < 2 * needed


def test_passwords_in_urls_are_not_shown():
    path = RemotePath("https://me:hunter2@host/run?token=abc") / "checkpoints"
    assert path.url == "https://me:hunter2@host/run/checkpoints?token=abc"
    assert "hunter2" not in str(path) and "abc" not in str(path) and "host/run/checkpoints" in str(path)
    assert json.dumps(str(path.parent.name)) == '"run"'


def test_a_mounted_folder_and_a_web_server_are_stores_too(checkpoints):
    """The latter cannot list folders, and without ranges it is refused."""
    mounted = RemotePath(f"file://{checkpoints.parent}")
    assert open_checkpoint(mounted).manifest.step == 4
    read(Checkpoint(mounted / "checkpoints" / "step-00000002"), Layout(1, 3), 1)
    with serving(checkpoints) as (url, _):
        checkpoint = open_checkpoint(RemotePath(f"{url}/step-00000002?token=secret"))
        assert checkpoint.find_damage() == [] and "secret" not in str(checkpoint.folder)
        read(checkpoint, Layout(1, 3), 1)
        assert checkpoint.manifest == Checkpoint(checkpoints / "step-00000002").manifest
    with (
        serving(checkpoints, ranges=False) as (url, _),
        pytest.raises(UserError, match="its server does not support ranges of bytes"),
    ):
        read(open_checkpoint(RemotePath(f"{url}/step-00000002")), Layout(1, 3), 1)
