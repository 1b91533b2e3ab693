"""Shards of a store are downloaded once per node, verified, and removed in the order in which they are not needed."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.shard_folder import (
    SEQ_LEN,
    VOCAB_SIZE,
    copy,
    rewrite_index,
    shard_files,
    window,
    write_folder,
    write_manifest,
)
from helpers.waiting import wait_until

from mythos_dist.data import prefetch, shard_cache
from mythos_dist.data.corpora import open_corpora
from mythos_dist.data.lookahead import Lookahead
from mythos_dist.data.prefetch import Prefetcher
from mythos_dist.data.shard_cache import NoRoom, ShardCache
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.data.windows import WindowReader
from mythos_dist.errors import UserError
from mythos_dist.store import connection, fetch, s3

SIZES = [5, 8, 3, 6, 7, 4, 9, 2]
FORK = multiprocessing.get_context("fork")
pytestmark = [pytest.mark.launch, pytest.mark.usefixtures("no_faults")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("raw") / "shards", SIZES, [4, 3])


@pytest.fixture(scope="module")
def url(store, folder):
    return store.upload(folder, "raw-shards")


def open_remote(url, cache, **settings):
    """Shards of the training split."""
    (corpus,) = open_corpora({url: 1}, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, cache=cache, **settings)
    return corpus.shards["train"]


def read(shards, cache, samples) -> list[list[int]]:
    return WindowReader(shards, SEQ_LEN + 1, cache=cache).read(samples).tolist()


def expected(samples) -> list[list[int]]:
    return [window(0, sample).tolist() for sample in samples]


@pytest.mark.parametrize("compression", [None, "zstd:3"])
@pytest.mark.parametrize("limit", [None, "two shards"])
def test_windows_are_those_that_were_written_and_fit_the_limit(store, tmp_path, compression, limit):
    """In any order. Nothing is left but shards, which take no more than the limit."""
    folder = write_folder(tmp_path / "shards", SIZES, compression=compression)
    url = store.upload(folder, f"bucket-{bool(compression)}-{bool(limit)}".lower())
    shards = open_remote(url, tmp_path)
    entries = [shard.entry for shard in shards]
    largest = max(entry["raw_data"]["bytes"] + (entry["zip_data"] or {"bytes": 0})["bytes"] for entry in entries)
    cache = ShardCache(tmp_path, 2 * largest if limit else None)
    for samples in ([43, 0, 4, 5, 12, 13, 4], list(range(44))[::-1], list(range(44))):
        assert read(shards, cache, samples) == expected(samples)
    files = [
        path for path in (tmp_path / "stores" / shards[0].fingerprint[:16] / "train").rglob("*.*") if path.is_file()
    ]
    sizes = {path.name: path.stat().st_size for path in files if path.name != "index.json"}
    assert all(name.endswith(".mds") for name in sizes)
    if limit:
        assert sum(sizes.values()) <= 2 * largest
    else:
        assert store.downloads == {**dict.fromkeys(store.downloads, 1)}, "one download of each object"


def read_all(shards, root, limit, barrier, seed) -> None:
    """A rank: reads every sample, in its own order."""
    samples = np.random.RandomState(seed).permutation(44).tolist()
    barrier.wait()
    assert read(shards, ShardCache(root, limit), samples) == expected(samples)


@pytest.mark.parametrize("limited", [False, True])
def test_processes_of_a_node_share_downloads(store, url, tmp_path, limited):
    """Six processes read all shards at once: each is downloaded once. With room for three shards all read right."""
    shards = open_remote(url, tmp_path)
    limit = 3 * max(shard.stored["bytes"] for shard in shards) if limited else None
    barrier = FORK.Barrier(6)
    ranks = [FORK.Process(target=read_all, args=(shards, tmp_path, limit, barrier, i)) for i in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(480)
    assert [rank.exitcode for rank in ranks] == [0] * 6
    if not limited:
        assert {name: n for name, n in store.downloads.items() if name.endswith(".mds")} == {
            f"train/{shard.stored['basename']}": 1 for shard in shards
        }


def test_a_killed_download_is_taken_over(store, url, tmp_path):
    """Twenty processes are killed at random times while they download; the next one reads right."""
    shards = open_remote(url, tmp_path)
    store.proxy.bytes_per_second = 20_000
    draw = np.random.RandomState(0)
    for i in range(20):
        rank = FORK.Process(target=read_all, args=(shards, tmp_path, None, FORK.Barrier(1), i))
        rank.start()
        time.sleep(draw.uniform(0.01, 0.15))
        os.kill(rank.pid, signal.SIGKILL)
        rank.join()
    store.proxy.bytes_per_second = 0
    cache = ShardCache(tmp_path)
    assert read(shards, cache, list(range(44))) == expected(range(44))
    assert not list(tmp_path.rglob("*.partial"))


FAULTS = {
    "a reset": "reset",
    "503": 503,
    "500": 500,
    "a truncated body": ("truncate", 0.7),
    "a changed byte": ("corrupt", 0.5),
    "404, once": 404,
    "403, once": 403,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_passes_is_retried(store, url, tmp_path, kind):
    """Of each object, the first request fails, also of manifest, index and tokenizer, which have no hash to check if
    a byte changes: JSON and the hashes that the manifest has show it."""
    is_corrupt = kind == "a changed byte"
    store.proxy.fault = lambda path, number: (
        FAULTS[kind] if number == 1 and (path.endswith(".mds") or not is_corrupt) else None
    )
    shards = open_remote(url, tmp_path)
    assert read(shards, ShardCache(tmp_path), list(range(44))) == expected(range(44))
    assert all(number == 2 for path, number in store.proxy.requests.items() if path.endswith(".mds"))


LASTING = {
    404: "there is no such file",
    403: "access is denied; check the credentials",
    (403, "RequestTimeTooSkewed"): "the clock of this node differs from the store's; synchronize it",
    503: "check the network, the store and AWS_ENDPOINT_URL",
    "reset": "check the network, the store and AWS_ENDPOINT_URL",
    ("corrupt", 0.5): "(its xxh64 is|Expected checksum) .*; the copy in the store is damaged",
    ("truncate", 0.0): "check the network, the store and AWS_ENDPOINT_URL",
}


@pytest.mark.parametrize("fault", LASTING, ids=str)
def test_a_fault_that_lasts_is_one_message_that_names_the_object(store, url, tmp_path, monkeypatch, fault):
    """And no part of the shard, and no secret, is left."""
    monkeypatch.setattr(shard_cache, "SHARD_PATIENCE", 1.0)
    monkeypatch.setattr(fetch.fetch, "__defaults__", (1.0,))
    shards = open_remote(url, tmp_path)
    name = shards[1].stored["basename"]
    store.proxy.fault = lambda path, number: fault if path.endswith(name) else None
    with pytest.raises(UserError, match=LASTING[fault]) as error:
        read(shards, ShardCache(tmp_path), [0, 6])
    assert str(error.value).startswith(f"{url}/train/{name}: cannot be read after ")
    assert store.env["AWS_SECRET_ACCESS_KEY"] not in str(error.value)
    assert not list(tmp_path.rglob("*.partial"))
    assert read(shards, ShardCache(tmp_path), [0]) == expected([0]), "other shards can be read"


def test_a_stalled_connection_is_closed_and_retried(store, url, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "READ_SECONDS", 0.3)
    s3.forget_clients()
    shards = open_remote(url, tmp_path)
    store.proxy.fault = lambda path, number: "stall" if number == 1 else None
    assert read(shards, ShardCache(tmp_path), [0, 6, 43]) == expected([0, 6, 43])
    s3.forget_clients()


MANIFESTS = {
    "another seq_len": ({"seq_len": 12}, "train.seq_len=16 neither divides the shards' seq_len=12 nor is a multiple"),
    "a changed fingerprint": ({"fingerprint": "0" * 64}, "index.json differs"),
    "a fingerprint that is a path": ({"fingerprint": "../../../../x"}, "is not a sha256"),
    "another tokenizer": ({"tokenizer_sha256": "0" * 64}, "another tokenizer than s3://.*/tokenizer.model"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_folder_that_does_not_fit_is_refused_before_any_shard(store, folder, tmp_path, kind):
    changes, message = MANIFESTS[kind]
    changed = copy(folder, tmp_path / "changed")
    write_manifest(changed, **changes)
    url = store.upload(changed, kind.replace(" ", "-"))
    with pytest.raises(UserError, match=message) as error:
        open_remote(url, tmp_path / "cache")
    assert str(error.value).startswith(url)
    assert not [name for name in store.downloads if name.endswith(".mds")]
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.parent.glob("x*"))


def test_a_shard_that_claims_more_than_its_samples_is_refused(store, folder, tmp_path):
    """Its size is reserved on disk before it is downloaded."""
    changed = copy(folder, tmp_path / "changed")
    rewrite_index(changed, "train", lambda entries: entries[2]["raw_data"].update(bytes=1 << 40))
    url = store.upload(changed, "too-large")
    with pytest.raises(UserError, match="more bytes than its samples can fill"):
        open_remote(url, tmp_path / "cache")


def test_a_wrong_address_and_a_missing_folder_are_refused_in_seconds(store, url, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no manifest\.json there") as error:
        open_remote(url + "/nothing", tmp_path)
    assert "NoSuchKey" in str(error.value) and len(error.value.problems) == 1
    with pytest.raises(UserError, match="the scheme ftps:// is not read; use one of s3, http"):
        open_remote("ftps://host/folder", tmp_path)
    monkeypatch.setattr(fetch.read_object, "__defaults__", (1.0,))
    with pytest.raises(UserError, match=r"manifest.json: cannot be read after \d+ attempts .*check the network"):
        open_remote("http://127.0.0.1:9/folder", tmp_path)


def test_a_full_disk_is_named(url, tmp_path, monkeypatch):
    shards = open_remote(url, tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"cannot be written \(data.cache\) \(No space left on device\); free disk space"
    ):
        read(shards, ShardCache(tmp_path), [0])
    assert not list(tmp_path.rglob("*.partial"))


def test_a_shard_that_is_damaged_on_this_disk_is_downloaded_again(store, url, tmp_path):
    """Once: a store whose shard is damaged as well is an error."""
    shards = open_remote(url, tmp_path)
    cache = ShardCache(tmp_path)
    read(shards, cache, [0])
    file = cache.path(shards[0])
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert read(shards, cache, [0]) == expected([0])
    assert store.downloads[f"train/{shards[0].stored['basename']}"] == 2


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_other_schemes_are_read(folder, tmp_path, scheme):
    from helpers.http_server import serving

    with serving(folder) as (address, _):
        url = f"file://{folder}" if scheme == "file" else address
        shards = open_remote(url, tmp_path)
        assert read(shards, ShardCache(tmp_path), list(range(44))) == expected(range(44))


def farthest_first(steps: list[list[str]], capacity: int) -> int:
    """Belady's optimum: the number of loads if the cache holds `capacity` shards, all of one size, and what a step
    needs is there for the step."""
    held: set[str] = set()
    loads = 0
    for i, step in enumerate(steps):
        for name in step:
            if name in held:
                continue
            loads += 1
            if len(held) >= capacity:
                future = [one for later in steps[i + 1 :] for one in later]
                spare = held - set(step)
                held.remove(max(spare, key=lambda one: future.index(one) if one in future else len(future)))
            held.add(name)
    return loads


def test_a_shard_whose_step_is_over_is_not_downloaded_in_advance(store, url, tmp_path, monkeypatch):
    """The step ends while a thread decides what to download next."""

    class EndingStep(Lookahead):
        def upcoming(self, ahead):
            needs = super().upcoming(ahead)
            self.advance(1)
            return needs

    monkeypatch.setattr(prefetch, "THREADS", 1)
    shards = open_remote(url, tmp_path)
    cache = ShardCache(tmp_path)
    lookahead = EndingStep(iter([(0, shards[:1]), (1, shards[1:2])]), cache.key, len(shards))
    prefetcher = Prefetcher(cache, lookahead, 1)
    wait_until(lambda: cache.has(shards[1]))
    prefetcher.close()
    assert not cache.has(shards[0]) and f"train/{shards[0].stored['basename']}" not in store.downloads


def all_prefetched(prefetcher, lookahead, ahead):
    """Whether the threads have nothing to do until the next step."""
    needs = lookahead.upcoming(ahead)
    with prefetcher._changed:
        waiting = (prefetcher._cache.has(need.shard) or need.key in prefetcher._not_before for need in needs)
        return not prefetcher._in_progress and all(waiting)


def test_downloads_with_a_small_cache_are_near_the_optimum(store, tmp_path, monkeypatch):
    """A tenth of the data, three epochs: within 5 % of Belady's loads, computed from the samples that were read."""
    from mythos_dist.data import order

    monkeypatch.setattr(order, "SHUFFLE_BLOCK", 24)  # three shards; at its real size tests would need many GB
    sizes = [8] * 120
    url = store.upload(write_folder(tmp_path / "shards", sizes), "many-shards")
    (corpus,) = open_corpora({url: 1}, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, cache=tmp_path / "cache")
    shards = corpus.shards["train"]
    cache = ShardCache(tmp_path / "cache", 12 * shards[0].stored["bytes"])
    make = partial(ReplicaStream, [corpus], "train", seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, global_batch=4)
    stream = make(micro_batch=4, replica=0, num_replicas=1, seed=1, cache=cache)
    plan = make(micro_batch=4, replica=0, num_replicas=1, seed=1, cache=cache)
    num_steps = 3 * sum(sizes) // 4
    needs = [(i, plan.shards_of(np.arange(4 * i, 4 * i + 4), [0])) for i in range(num_steps)]
    lookahead = Lookahead(iter(needs), cache.key, len(shards), far=True)
    cache.set_plan(lookahead.next_use, [corpus.manifest.fingerprint])
    prefetcher = Prefetcher(cache, lookahead, 2)
    read_shards = []
    for step in range(num_steps):
        prefetcher.advance(step)
        wait_until(partial(all_prefetched, prefetcher, lookahead, 2), seconds=300)  # a real step takes seconds
        (batch,) = stream.step(step)
        of_step = stream._sequences.shards_of(batch.sample_ids.numpy()).tolist()
        read_shards.append(list(dict.fromkeys(map(str, of_step))))
    prefetcher.close()
    loads = sum(number for name, number in store.downloads.items() if name.endswith(".mds"))
    best = farthest_first(read_shards, 12)
    assert best > 2 * len(shards), "the cache is too small for the data"
    print(f"downloads {loads}, optimum {best}")
    assert best <= loads <= 1.05 * best


def test_a_shard_needed_earlier_is_not_removed_for_one_needed_later(url, tmp_path):
    shards = open_remote(url, tmp_path)
    times = {i: 10.0 * i for i in range(len(shards))}
    cache = ShardCache(tmp_path, shards[0].stored["bytes"] + shards[1].stored["bytes"])
    keys = {cache.key(shard): times[i] for i, shard in enumerate(shards)}
    cache.set_plan(keys.__getitem__, [shards[0].fingerprint])
    cache.download(shards[0])
    cache.download(shards[1])
    with pytest.raises(NoRoom):
        cache.download(shards[2], needed=20.0)
    assert cache.has(shards[0]) and cache.has(shards[1]) and not cache.has(shards[2])
    cache.download(shards[2], needed=5.0)
    assert cache.has(shards[0]) and not cache.has(shards[1]) and cache.has(shards[2])


def test_a_shard_is_not_removed_while_it_is_read(url, tmp_path):
    """A reader waits for room until the other one has closed its shard."""
    shards = open_remote(url, tmp_path)
    largest = max(shard.stored["bytes"] for shard in shards)
    cache = ShardCache(tmp_path, largest + 1)
    file = cache.open(shards[1])
    done = threading.Event()

    def other():
        os.close(ShardCache(tmp_path, cache.limit).open(shards[0]))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert not done.wait(0.3) and cache.has(shards[1])
    os.close(file)
    assert done.wait(30) and not cache.has(shards[1])
    thread.join()


def test_a_process_forked_during_a_download_does_not_keep_its_lock(store, url, tmp_path):
    """Loader processes are forked while shards are downloaded, and live as long as the run."""
    shards = open_remote(url, tmp_path)
    cache = ShardCache(tmp_path, sum(shard.stored["bytes"] for shard in shards))
    store.proxy.latency = 0.5
    thread = threading.Thread(target=cache.download, args=(shards[0],))
    thread.start()
    while not list(tmp_path.rglob("*.partial")):
        time.sleep(0.01)
    loader = FORK.Process(target=time.sleep, args=(600,))
    loader.start()
    thread.join()
    store.proxy.latency = 0.0
    done = threading.Event()
    reader = threading.Thread(target=lambda: (read(shards, cache, list(range(44))), done.set()), daemon=True)
    reader.start()
    try:
        assert done.wait(300), "a lock is still held"
    finally:
        loader.kill()
        loader.join()


def test_the_manifest_is_read_again_at_each_start_and_the_rest_once(store, url, tmp_path):
    for _ in range(3):
        open_remote(url, tmp_path)
    assert store.downloads == {
        "manifest.json": 3,
        "train/index.json": 1,
        "heldout/index.json": 1,
        "tokenizer.model": 1,
    }
    index = json.loads(Path(next(tmp_path.glob("stores/*/train/index.json"))).read_text())
    assert len(index["shards"]) == len(SIZES)


def test_a_tokenizer_may_be_a_url(store, url, folder, tmp_path):
    """data.tokenizer: with the bytes of the shards' own, or it is refused."""
    open_remote(url, tmp_path, tokenizer_path=f"{url}/tokenizer.model")
    with pytest.raises(UserError, match=r"converted with another tokenizer than s3://raw-shards/data/manifest\.json"):
        open_remote(url, tmp_path, tokenizer_path=f"{url}/manifest.json")


def test_shard_files_of_the_store_are_those_of_the_folder(folder, url, tmp_path):
    """The files in the cache are the uploaded ones, byte for byte."""
    shards = open_remote(url, tmp_path)
    cache = ShardCache(tmp_path)
    for shard, file in zip(shards, shard_files(folder), strict=True):
        cache.download(shard)
        assert cache.path(shard).read_bytes() == file.read_bytes()
