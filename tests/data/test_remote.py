"""What describes the shards of a store is requested at once, checked by its hashes, and kept on the node."""

import contextlib
import shutil
import threading

import pytest
from helpers.shard_folder import SEQ_LEN, VOCAB_SIZE, write_folder

from mythos_dist.data.corpora import open_corpora
from mythos_dist.errors import UserError

pytestmark = pytest.mark.usefixtures("no_faults")

DESCRIPTIONS = {"manifest.json", "train/index.json", "heldout/index.json", "tokenizer.model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("remote") / "shards", [4, 4], [2])


@pytest.fixture(scope="module")
def url(store, folder):
    return store.upload(folder, "described")


def open_all(url, cache):
    (corpus,) = open_corpora({url: 1}, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, cache=cache)
    return corpus


def requested(store) -> list[str]:
    with store.proxy.lock:
        return sorted(path.partition("/data/")[2] for _, path in store.proxy.log)


def test_all_is_requested_before_the_first_answer(store, url, tmp_path):
    """No answer is sent until five requests have arrived; one after the other, the barrier would break."""
    together = threading.Barrier(5)

    def meet(path, number):
        together.wait(60)

    unlocked, store.proxy.lock = store.proxy.lock, contextlib.nullcontext()  # the proxy calls `fault` under its lock
    store.proxy.fault = meet
    try:
        open_all(url, tmp_path)
    finally:
        store.proxy.lock = unlocked
    assert requested(store) == sorted([*DESCRIPTIONS, "tokenizer.json"]) and not together.broken


def test_a_second_start_reads_the_manifest_only(store, url, tmp_path):
    first = open_all(url, tmp_path)
    store.reset()
    second = open_all(url, tmp_path)
    assert requested(store) == ["manifest.json"] and second.manifest == first.manifest
    shutil.rmtree(first.folder)
    open_all(url, tmp_path)
    assert {*requested(store)} >= DESCRIPTIONS, "the cache was deleted"


def test_ranks_of_a_node_download_the_index_once(store, url, tmp_path):
    ranks = [threading.Thread(target=open_all, args=(url, tmp_path)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    names = requested(store)
    assert names.count("train/index.json") == 1 and names.count("manifest.json") == 4


@pytest.mark.parametrize("name", sorted(DESCRIPTIONS))
def test_a_request_that_fails_is_repeated(store, url, tmp_path, name):
    store.proxy.fault = lambda path, number: "reset" if path.endswith(name) and number == 1 else None
    open_all(url, tmp_path)
    assert requested(store).count(name) == 2


@pytest.mark.launch
def test_other_shards_at_the_same_url_are_noticed(store, url, tmp_path, folder):
    before = open_all(url, tmp_path)
    other = write_folder(tmp_path / "other", [5], [2])
    for file in (path for path in other.rglob("*") if path.is_file()):
        store.client().upload_file(str(file), "described", f"data/{file.relative_to(other).as_posix()}")
    after = open_all(url, tmp_path)
    assert after.manifest.fingerprint != before.manifest.fingerprint and len(after.shards["train"]) == 1
    for file in (path for path in folder.rglob("*") if path.is_file()):
        store.client().upload_file(str(file), "described", f"data/{file.relative_to(folder).as_posix()}")
    store.client().put_object(Bucket="described", Key="data/train/index.json", Body=b"{}")
    shutil.rmtree(tmp_path / "stores")
    with pytest.raises(UserError, match=r"the shards changed after the conversion \(index.json differs\)"):
        open_all(url, tmp_path)
