"""A run over an object store trains on the same samples, with the same losses, as one from a local folder."""

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import remote_run
from helpers.launch import launch
from helpers.run_folder import lines
from helpers.shard_folder import shard_files, write_folder

from mythos_dist.checkpoint.remote import read_state

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]
EXACT = ("step", "loss", "grad_norm", "batch_id", "lr", "tokens")
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 training shards of 8 windows."""
    return write_folder(tmp_path_factory.mktemp("store") / "shards", [8] * 40, [4, 4], seq_len=32)


@pytest.fixture(scope="module")
def url(store, folder) -> str:
    return store.upload(folder, "training-data")


@pytest.fixture(scope="module")
def common(settings) -> list[str]:
    kept = [one for one in settings if not one.startswith(("data.path", "train.steps", "model.vocab_size"))]
    more = f"train.steps={STEPS} model.vocab_size=1000 checkpoint.every=4 train.eval_samples=8"
    return [*kept, *more.split()]


@pytest.fixture(scope="module")
def local(common, folder, tmp_path_factory) -> Callable[[int], Path]:
    """Runs that read the folder, by their number of ranks."""

    @functools.cache
    def train_on(world: int) -> Path:
        work = tmp_path_factory.mktemp("local")
        arguments = [*common, f"data.path={folder}", f"run.dir={work / 'run'}"]
        result = launch(world, train_on_nodes, str(work), arguments)
        assert result.codes == [0] * world, result.tails
        return work / "run"

    return train_on


@pytest.fixture
def run(common, store, tmp_path):
    """Train on `world` ranks, two to a node; the folder of the run, and the result."""
    store.reset()

    def run(name: str, world: int, data: str, *overrides: str, env: dict[str, str] | None = None):
        arguments = [*common, f"data.path={data}", f"run.dir={tmp_path / name}", *overrides]
        (tmp_path / "nodes").mkdir(exist_ok=True)
        return tmp_path / name, launch(
            world, train_on_nodes, str(tmp_path / "nodes"), arguments, env={**store.env, **(env or {})}
        )

    return run


def train_on_nodes(nodes: str, arguments: list[str]) -> None:
    """Two ranks to a node; each node has its own temporary folder. A shuffle block has three shards, as many as fit."""
    from helpers.launch import train_here

    from mythos_dist.data import order

    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": str(min(2, int(os.environ["WORLD_SIZE"])))}
    tempfile.tempdir = os.path.join(nodes, f"node-{rank // 2}")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    socket.gethostname = lambda: f"node-{rank // 2}"
    order.SHUFFLE_BLOCK = 24
    train_here(arguments)


def exact(run_dir: Path) -> list[list]:
    return [[line[key] for key in EXACT] for line in lines(run_dir)]


def cached(tmp_path: Path) -> list[str]:
    """The shards in the caches of all nodes, by their names in the store."""
    files = (tmp_path / "nodes").rglob("*.mds")
    return sorted("/".join(file.parts[-3:]) for file in files)


@pytest.mark.parametrize("workers", [0, 1])
def test_two_nodes_download_each_shard_once_and_train_as_from_a_folder(run, store, local, url, tmp_path, workers):
    remote, result = run("remote", 4, url, f"data.workers={workers}")
    assert result.codes == [0] * 4, result.tails
    assert re.search(
        r"preflight: 4 ranks on 2 nodes.*store at least [\d.]+[kM]?B/s \(node-[01] is the slowest\)", result.out
    )
    assert exact(remote) == exact(local(4)) and len(exact(local(4))) == STEPS
    assert lines(remote, "eval.jsonl") == lines(local(4), "eval.jsonl")
    downloads = sorted(name for name, number in store.downloads.items() for _ in range(number) if name.endswith(".mds"))
    assert downloads == cached(tmp_path), "a shard was downloaded more than once per node"
    assert len({name.partition("/")[2] for name in downloads}) < 40, "only what the steps need"
    assert all(line["data_wait_seconds"] >= 0 for line in lines(remote))
    text = "".join(file.read_text(errors="replace") for file in remote.rglob("*") if file.suffix in (".log", ".yaml"))
    text += "".join(json.dumps(line) for line in lines(remote)) + result.out + "".join(result.tails)
    assert store.env["AWS_SECRET_ACCESS_KEY"] not in text and url in text


def test_one_rank_killed_during_downloads_with_a_small_cache_trains_as_from_a_folder(
    run, store, local, folder, url, tmp_path
):
    """Killed three times while it downloads shards, with room for a tenth of the data."""
    size = max(file.stat().st_size for file in shard_files(folder))
    limit = f"data.cache_limit={4 * size}"
    store.proxy.latency = 0.3  # a run takes seconds, and most of the time a shard is being downloaded
    partial = tmp_path / "nodes" / "node-0" / "*" / "stores" / "*" / "train" / "*" / "*.partial"
    left = 0
    for seconds in ("0", "0.4", "1"):
        _, result = run("remote", 1, url, limit, env={"KILL_AFTER": str(partial), "KILL_IN": seconds})
        assert result.codes == [-signal.SIGKILL], result.tails
        for file in (tmp_path / "nodes").rglob("*.partial"):
            file.unlink()  # or the next start would be killed at once
            left += 1
    assert left, "no download was interrupted"
    store.proxy.latency = 0.0
    remote, result = run("remote", 1, url, limit)
    assert result.codes == [0], result.tails
    assert exact(remote) == exact(local(1))
    files = [file for file in (tmp_path / "nodes").rglob("*.mds*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 4 * size


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 4])
def test_killed_ten_times_during_downloads_and_uploads_it_writes_the_lines_of_a_local_run(
    world, run, store, local, folder, url, tmp_path, seed
):
    """SIGKILL of all ranks, alternately while a shard is downloaded and at a random time, with room for a tenth of the
    data on each node. A transfer is on its way most of the time, and after some kills the run folder is lost."""
    draw, bucket = random.Random(seed), store.create_bucket(f"kills-of-{world}")
    size = max(file.stat().st_size for file in shard_files(folder))
    partial = tmp_path / "nodes" / "node-0" / "*" / "stores" / "*" / "train" / "*" / "*.partial"
    kills = during_downloads = during_uploads = runs = 0

    def start(**env: str):
        settings = (f"data.cache_limit={4 * size}", f"checkpoint.remote={bucket}/{runs}", "checkpoint.every=2")
        return run(f"run-{runs}", world, url, *settings, env=env)

    def check(run_dir: Path) -> None:
        assert exact(run_dir) == exact(local(world)), f"{kills} kills"
        files = [file for file in (tmp_path / "nodes").rglob("*.mds*") if file.is_file()]
        for node in range(-(-world // 2)):
            assert sum(file.stat().st_size for file in files if f"node-{node}" in file.parts) <= 4 * size
        here, there = remote_run.local(run_dir), store.content(f"{bucket}/{runs}")
        assert here.items() <= there.items()

    while kills < 10:
        store.proxy.latency = 0.1
        at_download = {"KILL_AFTER": str(partial), "KILL_IN": str(draw.uniform(0.0, 1.0))}
        run_dir, result = start(**at_download if kills % 2 else {"KILL_IN": str(draw.uniform(4.0, 15.0))})
        if result.codes == [0] * world:
            check(run_dir)
            runs += 1
            continue
        assert -signal.SIGKILL in result.codes, (result.codes, result.tails)
        kills += 1
        left = list((tmp_path / "nodes").rglob("*.partial"))
        for file in left:
            file.unlink()  # or the next start would be killed at once
        state = read_state(run_dir)
        during_downloads += bool(left)
        during_uploads += bool(state and state.waiting)
        if state and state.uploaded and draw.random() < 0.3:
            shutil.rmtree(run_dir)
    assert during_downloads and during_uploads
    store.reset()
    run_dir, result = start()
    assert result.codes == [0] * world, result.tails
    check(run_dir)


def test_a_store_that_fails_ends_the_run_with_one_message(run, store, url, folder, monkeypatch):
    """On all ranks with exit code 2; the message names the object."""
    lost = shard_files(folder)[0].parent.name
    store.proxy.fault = lambda path, number: 403 if "/train/part-" in path else None
    _, result = run("denied", 2, url)
    assert set(result.codes) == {2} and result.err.count("error: ") == 1, result.tails
    assert f"{url}/train/part-" in result.err and "access is denied; check the credentials" in result.err
    assert not any("Traceback" in tail for tail in result.tails) and lost


def test_settings_that_cannot_work_are_refused(run, url):
    """A cache smaller than two shards, and a password in a URL, which config.yaml would hold."""
    _, result = run("small", 1, url, "data.cache_limit=100")
    assert result.codes == [2] and "data.cache_limit=100 is less than two of the largest shards" in result.err
    _, result = run("text", 1, url, "data.cache_limit=lots")
    assert result.codes == [2] and "expected a size in bytes, such as 400kB or 200GB" in result.err
    _, result = run("secret", 1, "https://user:hunter2@host/shards")
    assert result.codes == [2] and "contains a password or key" in result.err and "hunter2" not in result.err
