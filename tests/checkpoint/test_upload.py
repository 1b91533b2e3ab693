"""Checkpoints are uploaded completely or not at all, whatever ends an upload, and by the newest start only."""

import os
import random
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from helpers.remote_run import local, save, start
from helpers.waiting import wait_until

from mythos_dist.checkpoint import upload, upload_process
from mythos_dist.checkpoint.manifest import read_checkpoint_manifest
from mythos_dist.checkpoint.remote import read_writer
from mythos_dist.checkpoint.upload import CheckpointUploader, SupersededError
from mythos_dist.checkpoint.upload_process import UploadProcess
from mythos_dist.store import s3
from mythos_dist.store import upload as store_upload
from mythos_dist.store.fetch import Unavailable

pytestmark = pytest.mark.usefixtures("no_faults")

MANIFEST = "checkpoint.json"


@pytest.fixture(scope="module")
def bucket(store) -> str:
    return store.create_bucket("checkpoints")


@pytest.fixture(params=["s3"])
def url(store, bucket) -> str:
    return f"{bucket}/{os.urandom(4).hex()}"


class Run:
    """A run folder, and its uploads in this process."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        self.events: list[dict] = []

    def start(self, **settings) -> CheckpointUploader:
        """The uploader of a new start."""
        return CheckpointUploader(start(self.folder, self.url, **settings), self.events.append, patience=0.3)

    def steps(self, event: str) -> list[int]:
        return [one["step"] for one in self.events if one["event"] == event]


@pytest.fixture
def run(tmp_path, url) -> Run:
    return Run(tmp_path / "run", url)


def checkpoints(store, url: str) -> dict[str, bytes]:
    """The checkpoints' files in the store, by their names in the run's folder."""
    return {name: content for name, content in store.content(url).items() if name.startswith("checkpoints/")}


def complete(store, url: str) -> list[str]:
    """Names of the checkpoints in the store that have a manifest, from the newest."""
    return sorted((name.split("/")[1] for name in checkpoints(store, url) if name.endswith(MANIFEST)), reverse=True)


def published(store) -> list[str]:
    """Names of the files of checkpoints in the order in which they appeared; POSTs with an id complete an upload."""
    posts = [path for method, path in store.proxy.log if method == "POST" and "uploadId=" in path]
    return ["/".join(path.partition("?")[0].split("/")[-2:]) for path in posts if "/checkpoints/step-" in path]


def test_the_store_has_the_bytes_of_the_run_folder_and_each_manifest_is_written_last(run, store, url, monkeypatch):
    monkeypatch.setattr(store_upload, "PART_BYTES", 5 << 20)  # the least that S3 accepts
    uploader = run.start()
    save(run.folder, 2)
    save(run.folder, 4, size=3 << 20)  # 12 MB, three parts
    uploader.upload_all()
    assert checkpoints(store, url) == local(run.folder)
    files = [f"rank-{i:05d}.safetensors" for i in range(3)]
    for order, step in (published(store)[:4], "step-00000004"), (published(store)[4:], "step-00000002"):
        assert sorted(order[:3]) == [f"{step}/{file}" for file in files] and order[3] == f"{step}/{MANIFEST}"
    assert store.content(url)["metrics.jsonl"] == (run.folder / "metrics.jsonl").read_bytes()
    assert run.steps("uploaded") == [4, 2] and complete(store, url) == ["step-00000004", "step-00000002"]
    assert read_writer(url)["run"] == "a-run"


def test_an_upload_in_a_folder_is_the_same(run, tmp_path):
    run.url = f"file://{tmp_path}/a store"
    uploader = run.start(keep=1)
    save(run.folder, 2)
    uploader.upload_all()
    save(run.folder, 4)
    uploader.upload_all()
    target = tmp_path / "a store"
    assert local(target) == local(run.folder, 4)
    assert not [name for name in os.listdir(target / "checkpoints") if "unfinished" in name]


@pytest.mark.launch
def test_requests_per_checkpoint_are_four_per_file_and_ten_more(run, store, url):
    """Per file: begin, part, fence, end, verification. `docs/stores.md` says what they cost."""
    uploader = run.start()
    save(run.folder, 2)
    uploader.upload_all()
    store.reset()
    save(run.folder, 4, files=10)
    uploader.upload_all()
    counts: dict[str, int] = {}
    for method, path in store.proxy.log:
        assert "/data/" in path or "prefix=" in path
        counts[method] = counts.get(method, 0) + 1
    # 10 files, the manifest and metrics.jsonl; a listing of the step, a HEAD per file.
    assert counts == {"POST": 24, "PUT": 12, "GET": 13, "HEAD": 10}


@pytest.mark.launch
def test_nothing_is_sent_twice_and_a_checkpoint_saved_again_is_replaced(run, store, url):
    uploader = run.start()
    save(run.folder, 2)
    uploader.upload_all()
    store.reset()
    uploader.upload_all()
    assert not store.proxy.log, "it knows that nothing is new"
    run.start().upload_all()  # a new start asks the store
    assert not [path for method, path in store.proxy.log if method == "PUT" and "/step-" in path]
    assert run.steps("uploaded") == [2] and run.steps("present") == [2]
    uploader = run.start()
    for file in (run.folder / "checkpoints" / "step-00000002").iterdir():
        file.unlink()
    (run.folder / "checkpoints" / "step-00000002").rmdir()
    save(run.folder, 2, seed=1)
    store.reset()
    uploader.upload_all()
    assert checkpoints(store, url) == local(run.folder)
    changes = [path for method, path in store.proxy.log if method in ("POST", "PUT") and "metrics" not in path]
    deletion = changes.index("/checkpoints?delete")
    assert deletion < min(i for i, path in enumerate(changes) if "step-00000002/" in path), "its manifest goes first"


@pytest.mark.parametrize("after", range(1, 24, 2))
@pytest.mark.launch
def test_an_upload_that_ends_after_any_request_is_none_and_the_next_start_completes_it(run, store, url, after):
    """All requests after the n-th fail, those of the clean-up too, as after a SIGKILL."""
    uploader, made = run.start(), []

    def fail(path: str, number: int):
        made.append(path)
        return "reset" if len(made) > after else None

    save(run.folder, 2)
    store.proxy.fault = fail
    with pytest.raises(Unavailable):
        uploader.upload_all()
    store.reset()
    assert f"checkpoints/step-00000002/{MANIFEST}" not in store.content(url)
    there = set(checkpoints(store, url))
    run.start().upload_all()
    assert checkpoints(store, url) == local(run.folder)
    assert len(published(store)) == 4 - len(there), "what had arrived was not sent again"
    assert not store.client().list_multipart_uploads(Bucket="checkpoints").get("Uploads"), "all are aborted"


def wait_for_requests(store, process: UploadProcess, number: int) -> None:
    """Until the process has sent so many, or has nothing more to do."""
    before = len(store.proxy.log)
    wait_until(
        lambda: len(store.proxy.log) - before >= number or any(event["event"] == "idle" for event in process.poll())
    )


@pytest.mark.launch
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.long)])
def test_kills_of_the_process_leave_no_partial_checkpoint(run, store, url, kills):
    """SIGKILL after random numbers of requests, at 20 ms per request; a checkpoint is added with each start."""
    store.proxy.latency = 0.02
    rng = random.Random(0)
    for kill in range(kills):
        save(run.folder, kill + 1, files=2)
        process = UploadProcess(start(run.folder, url))
        wait_for_requests(store, process, rng.randrange(1, 60))
        process.close()  # SIGKILL
        there = checkpoints(store, url)
        expected = local(run.folder)
        for name in complete(store, url):
            files = {file for file in expected if f"/{name}/" in file}
            assert files and {file: there[file] for file in files} == {file: expected[file] for file in files}
    process = UploadProcess(start(run.folder, url))
    wait_until(lambda: any(event["event"] == "idle" for event in process.poll()))
    process.close()
    assert checkpoints(store, url) == local(run.folder)
    assert not store.client().list_multipart_uploads(Bucket="checkpoints").get("Uploads")


@pytest.mark.launch
def test_a_start_that_is_suspended_just_before_it_publishes_changes_nothing_later(run, store, url):
    """After its last check, the old start sleeps while a new one saves the same step again and uploads it."""
    old, check = run.start(), CheckpointUploader._check_fences
    save(run.folder, 2)
    slept = []

    def sleep_after_check(self):
        check(self)
        files = [name for name in checkpoints(store, url) if name.endswith(".safetensors")]
        if self is old and not slept and len(files) == 3:  # the manifest is next
            slept.append(True)
            new = run.start()
            folder = run.folder / "checkpoints" / "step-00000002"
            folder.rename(run.folder / "old")
            save(run.folder, 2, seed=1)
            new.upload_all()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointUploader, "_check_fences", sleep_after_check)
        with pytest.raises(SupersededError, match="start 2 of this run has taken over its folder"):
            old.upload_all()
    assert slept and checkpoints(store, url) == local(run.folder)


@pytest.mark.launch
def test_the_run_continued_in_another_folder_and_another_run_are_not_overwritten(run, store, url, tmp_path):
    first = run.start()
    save(run.folder, 2)
    first.upload_all()
    moved = Run(tmp_path / "moved", url)
    moved.start()  # start 1 there
    second = moved.start()
    save(moved.folder, 4)
    second.upload_all()
    save(run.folder, 4, seed=1)
    with pytest.raises(SupersededError, match=r"start 2 of this run, in .*/moved on .*, has taken over"):
        first.upload_all()
    other = Run(tmp_path / "other", url)
    with pytest.raises(SupersededError, match=r"another run writes there, in .*/moved on .*; give each run a folder"):
        other.start(run="another").upload_all()
    there = checkpoints(store, url)
    assert {name: there[name] for name in local(moved.folder)} == local(moved.folder)


@pytest.mark.launch
def test_the_newest_checkpoints_and_pinned_ones_are_kept_in_the_store(run, store, url):
    uploader = run.start(keep=2, pin=(6,), pin_every=4)
    for step in range(1, 10):
        save(run.folder, step)
        uploader.upload_all()
    kept = ["step-00000004", "step-00000006", "step-00000007", "step-00000008", "step-00000009"]
    assert sorted(complete(store, url)) == kept
    assert sorted({name.split("/")[1] for name in checkpoints(store, url)}) == kept, "nothing is left of the others"
    deletions = [path for method, path in store.proxy.log if method == "DELETE" or "delete" in path]
    assert len(deletions) == 2 * 4 and run.steps("removed") == [1, 2, 3, 5]


@pytest.mark.launch
def test_what_is_left_of_a_checkpoint_that_is_gone_here_is_removed_and_other_files_stay(run, store, url):
    uploader = run.start()
    save(run.folder, 2)
    client = store.client()
    prefix = url.removeprefix("s3://checkpoints/")
    for name in ("checkpoints/step-00000001/rank-00000.safetensors", "checkpoints/step-00000001/mine.txt", "notes/x"):
        client.put_object(Bucket="checkpoints", Key=f"{prefix}/{name}", Body=b"x")
    uploader.upload_all()
    content = store.content(url)
    assert content["checkpoints/step-00000001/mine.txt"] == content["notes/x"] == b"x"
    assert "checkpoints/step-00000001/rank-00000.safetensors" not in content


@pytest.mark.launch
def test_nodes_share_the_files_and_the_first_one_publishes_or_completes(run, store, url, monkeypatch):
    monkeypatch.setattr(upload, "POLL_SECONDS", 0.01)
    settings = start(run.folder, url, nodes=2)
    nodes = [
        CheckpointUploader(type(settings)(**{**vars(settings), "node": node}), run.events.append, patience=0.3)
        for node in (0, 1)
    ]
    save(run.folder, 2, files=5)
    first = threading.Thread(target=nodes[0].upload_all)
    first.start()
    wait_until(lambda: len([name for name in published(store) if "rank" in name]) == 3)
    assert MANIFEST not in str(published(store)) and first.is_alive(), "it waits for the other node"
    nodes[1].upload_all()
    first.join(240)
    assert checkpoints(store, url) == local(run.folder)
    assert len(published(store)) == 6, "each file was sent once"
    save(run.folder, 4, files=5)  # node 1 is lost
    monkeypatch.setattr(upload, "HELP_AFTER", 0.0)
    nodes[0].upload_all()
    assert checkpoints(store, url) == local(run.folder)


@pytest.mark.launch
def test_a_damaged_local_file_is_named_and_its_checkpoint_is_not_published(run, store, url):
    uploader = run.start()
    save(run.folder, 2)
    save(run.folder, 4)
    file = run.folder / "checkpoints" / "step-00000004" / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    uploader.upload_all()
    assert complete(store, url) == ["step-00000002"] and run.steps("damaged") == [4]
    assert "rank-00001.safetensors is not what its manifest says" in run.events[0]["reason"]


def test_a_store_that_loses_metadata_is_named_and_gets_each_file_once(run, store, url, monkeypatch):
    """As rclone's S3 server does with those of large files, by which uploads are checked."""
    head = s3.head
    monkeypatch.setattr(s3, "head", lambda url: head(url)._replace(metadata={}))
    save(run.folder, 2)
    run.start().upload_all()
    (reason,) = [event["reason"] for event in run.events if event["event"] == "damaged"]
    assert "rank-00000.safetensors was stored without the digest that was sent as its metadata (xxh3-128)" in reason
    begun = [path for method, path in store.proxy.log if method == "POST" and "rank-" in path and "Id=" not in path]
    assert len(begun) == len(set(begun)) == 3
    assert complete(store, url) == []


@pytest.mark.parametrize("fault", ["reset", 500, 503, ("truncate", 0.5), ("corrupt", 0.5)])
@pytest.mark.launch
def test_what_may_pass_is_retried(run, store, url, fault):
    """The first request of each file fails, or its part is damaged on the way."""
    save(run.folder, 2)
    uploader = run.start()
    store.proxy.fault = lambda path, number: fault if number <= 2 and "step-" in path else None
    uploader._uploader._patience = 30.0
    uploader.upload_all()
    assert checkpoints(store, url) == local(run.folder)


@pytest.mark.launch
@pytest.mark.parametrize(
    "fault, message",
    [
        ((403, "AccessDenied"), "access is denied; check the credentials"),
        ((403, "ExpiredToken"), "access is denied; check the credentials"),
        ((403, "RequestTimeTooSkewed"), "the clock of this node differs from the store's; synchronize it"),
        ((507, "XMinioStorageFull"), "the store is full"),
        ((404, "NoSuchBucket"), "there is no such bucket"),
    ],
)
def test_the_process_names_what_fails_and_uploads_all_when_it_works_again(run, store, url, fault, message, monkeypatch):
    settings = start(run.folder, url)
    process = UploadProcess(settings)
    events: list[dict] = []

    def seen(kind: str) -> list[dict]:
        events.extend(process.poll())
        return [event for event in events if event["event"] == kind]

    wait_until(lambda: seen("idle"))
    store.proxy.fault = lambda path, number: fault
    save(run.folder, 2)
    process.notify()
    wait_until(lambda: seen("failed"))
    assert message in seen("failed")[0]["reason"] and url in seen("failed")[0]["reason"]
    save(run.folder, 4)
    store.reset()
    process.notify()
    wait_until(lambda: len(seen("uploaded")) == 2)
    process.close()
    assert checkpoints(store, url) == local(run.folder)
    log = (run.folder / "logs" / "upload-00000.log").read_text()
    assert message in log and store.env["AWS_SECRET_ACCESS_KEY"] not in log


@pytest.mark.launch
def test_the_process_ends_with_its_rank_and_ignores_signals_to_the_job(run, store, url):
    process = UploadProcess(start(run.folder, url))
    child = process._process
    assert child and child.stdin
    wait_until(lambda: any(event["event"] == "idle" for event in process.poll()))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        child.send_signal(number)
    save(run.folder, 2)
    process.notify()
    wait_until(lambda: any(event["event"] == "uploaded" for event in process.poll()))
    child.stdin.close()  # as the kernel does when the rank is killed
    assert child.wait(240) == 0
    process.close()


@pytest.mark.launch
def test_a_process_that_was_killed_is_started_again(run, store, url, monkeypatch):
    monkeypatch.setattr(upload_process, "RESTART_SECONDS", 0.0)
    process = UploadProcess(start(run.folder, url))
    child = process._process
    assert isinstance(child, subprocess.Popen)
    child.kill()
    child.wait()
    save(run.folder, 2)
    process.notify()
    wait_until(lambda: any(event["event"] == "uploaded" for event in process.poll()))
    process.close()
    assert checkpoints(store, url) == local(run.folder)


def test_the_manifest_in_the_store_is_read_like_a_local_one(run, store, url, tmp_path):
    uploader = run.start()
    save(run.folder, 2)
    uploader.upload_all()
    for name, content in checkpoints(store, url).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    copy = tmp_path / "copy" / "checkpoints" / "step-00000002"
    assert read_checkpoint_manifest(copy) == read_checkpoint_manifest(run.folder / "checkpoints" / "step-00000002")
