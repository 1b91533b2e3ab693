"""Files of a store are written, listed and removed; what fails is retried, then named; damage in transit is noticed."""

import os
from pathlib import Path

import pytest

from mythos_dist.errors import UserError
from mythos_dist.store import fetch, write
from mythos_dist.store.fetch import Unavailable
from mythos_dist.store.upload import abort_uploads

pytestmark = pytest.mark.usefixtures("no_faults")


@pytest.fixture(scope="module")
def bucket(store) -> str:
    return store.create_bucket("written")


@pytest.fixture(params=["s3", "file"])
def url(request, bucket, tmp_path) -> str:
    return f"{bucket}/{os.urandom(4).hex()}" if request.param == "s3" else f"file://{tmp_path}/a folder"


def test_what_is_written_is_listed_read_replaced_and_removed(url, tmp_path):
    file = tmp_path / "source"
    file.write_bytes(b"y" * 300_000)
    assert write.list_files(url) == {}, "no such folder"
    write.put(f"{url}/a", b"x")
    write.put(f"{url}/b/c d", file)
    write.put(f"{url}/empty", b"")
    assert write.list_files(url) == {"a": 1, "b/c d": 300_000, "empty": 0}
    assert write.list_files(f"{url}/b") == {"c d": 300_000}
    write.put(f"{url}/a", b"other")
    assert fetch.read_object(f"{url}/a", 100) == b"other"
    write.remove([f"{url}/a", f"{url}/b/c d", f"{url}/absent"])
    assert write.list_files(url) == {"empty": 0}
    write.remove([])


def test_a_folder_is_not_one_whose_name_begins_with_it(bucket):
    write.put(f"{bucket}/ab/x", b"1")
    write.put(f"{bucket}/a/y", b"2")
    assert write.list_files(f"{bucket}/a") == {"y": 1}


@pytest.mark.launch  # a thousand requests
def test_more_files_than_a_request_holds_are_listed_and_removed(store, bucket, monkeypatch):
    """S3's pages have 1,000 keys."""
    names = [f"{i:04}" for i in range(1003)]
    client = store.client()
    for name in names:
        client.put_object(Bucket="written", Key=f"data/many/{name}", Body=b"")
    assert list(write.list_files(f"{bucket}/many")) == names
    write.remove(f"{bucket}/many/{name}" for name in names)
    assert write.list_files(f"{bucket}/many") == {}


@pytest.mark.parametrize("fault", ["reset", 500, 503, ("truncate", 0.5), ("corrupt", 0.5)])
def test_what_may_pass_is_retried(store, bucket, fault, tmp_path):
    """A byte that changes on the way is refused by the server, because its MD5 is sent along."""
    store.proxy.fault = lambda path, number: fault if number <= 2 else None
    content = os.urandom(100_000)
    url = f"{bucket}/retried-{fault}".replace("'", "").replace(" ", "")
    write.put(url, content)
    assert store.content(bucket)[url.rpartition("/")[2]] == content
    assert sorted(store.proxy.requests.values()) == [3]


@pytest.mark.parametrize(
    "fault, message",
    [
        ((403, "AccessDenied"), "access is denied; check the credentials .* that they may write there"),
        ((404, "NoSuchBucket"), "there is no such bucket"),
        ((403, "RequestTimeTooSkewed"), "the clock of this node differs"),
        ((507, "XMinioStorageFull"), "the store is full"),
        ((501, "NotImplemented"), "the store does not implement that request"),
        ((405, "MethodNotAllowed"), "the store does not implement that request"),
    ],
)
def test_what_does_not_pass_is_named_after_two_attempts(store, bucket, fault, message):
    store.proxy.fault = lambda path, number: fault
    with pytest.raises(Unavailable, match=f"^s3://written/data/x: cannot be written after 2 attempts .*{message}"):
        write.put(f"{bucket}/x", b"1")
    assert sum(store.proxy.requests.values()) == 2


def test_a_store_that_cannot_list_unfinished_uploads_is_named_at_once(store, bucket):
    """Some servers do not implement ListMultipartUploads. The message said that the folder cannot be removed."""
    store.proxy.fault = lambda path, number: (501, "NotImplemented")
    message = "cannot be searched for unfinished uploads after 2 attempts .*the store does not implement that request"
    with pytest.raises(Unavailable, match=message):
        abort_uploads(f"{bucket}/x")


def test_a_store_that_is_down_ends_after_the_patience(store, bucket):
    store.proxy.fault = lambda path, number: "reset"
    with pytest.raises(
        Unavailable, match=r"cannot be listed after .*check the network, the store and AWS_ENDPOINT_URL"
    ):
        write.list_files(bucket, patience=0.2)
    with pytest.raises(Unavailable, match="cannot be removed after"):
        write.remove([f"{bucket}/x"], patience=0.2)


def test_a_missing_local_file_is_no_error_of_the_store(store, bucket, tmp_path):
    with pytest.raises(OSError, match="absent"):
        write.put(f"{bucket}/x", tmp_path / "absent")
    assert not store.proxy.requests


def test_schemes_that_are_only_read_are_refused():
    for url in ("https://host/x", "hf://datasets/a/b", "gs://bucket/x"):
        with pytest.raises(UserError, match="is read, but not written; use s3://"):
            write.check_writable(url)
    with pytest.raises(UserError, match="names no bucket"):
        write.check_writable("s3:///x")
    assert write.check_writable("s3://bucket") is None and write.check_writable(f"file://{Path('/tmp')}") is None
