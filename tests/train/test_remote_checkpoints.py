"""A run with `checkpoint.remote`: its checkpoints are in the store, training does not depend on it, and a run whose
folder is lost resumes from there, with the metrics of an uninterrupted one."""

import json
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers.launch import launch, train, train_here
from helpers.remote_run import local
from helpers.run_folder import at, lines

from mythos_dist.checkpoint.fence import newest_start
from mythos_dist.checkpoint.remote import read_state
from mythos_dist.config.load import load_config
from mythos_dist.errors import UserError

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
EXACT = ("step", "loss", "grad_norm", "batch_id", "lr", "tokens")
STEPS = 12


@pytest.fixture(scope="module")
def bucket(store) -> str:
    return store.create_bucket("runs")


@pytest.fixture
def url(store, bucket) -> str:
    store.reset()
    return f"{bucket}/{os.urandom(4).hex()}"


@pytest.fixture(scope="module")
def settings_here(settings) -> list[str]:
    # A constant rate: runs of fewer steps do the same.
    mine = f"train.steps={STEPS} train.global_batch=4 checkpoint.every=2 checkpoint.keep=2 optim.schedule=constant"
    return [*settings, *mine.split()]


@pytest.fixture(scope="module")
def uninterrupted(settings_here, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("remote") / "uninterrupted"
    assert train(2, *settings_here, f"run.dir={run_dir}").codes == [0, 0]
    return run_dir


@pytest.fixture
def run(settings_here, store, tmp_path, url):
    """Train on `world` ranks in the folder `name`."""

    def run(name: str, world: int, *overrides: str, env: dict[str, str] | None = None, program=train_here):
        arguments = [*settings_here, f"run.dir={tmp_path / name}", f"checkpoint.remote={url}", *overrides]
        return tmp_path / name, launch(world, program, arguments, env={**store.env, **(env or {})})

    return run


def exact(run_dir: Path) -> list[list]:
    return [[line[key] for key in EXACT] for line in lines(run_dir)]


def in_store(store, url: str) -> dict[str, bytes]:
    """The checkpoints' files in the store, by their names in the run folder."""
    return {name: content for name, content in store.content(url).items() if name.startswith("checkpoints/")}


def steps_in_store(store, url: str) -> list[int]:
    return sorted(int(name.split("/")[1][5:]) for name in in_store(store, url) if name.endswith("checkpoint.json"))


def test_all_checkpoints_are_in_the_store_and_a_lost_folder_is_resumed_from_there(run, store, url, uninterrupted):
    first, result = run("first", 2, "train.steps=8")
    assert result.codes == [0, 0], result.tails
    assert steps_in_store(store, url) == [2, 4, 6, 8], "the store keeps all, the folder two"
    there = in_store(store, url)
    assert {name: there[name] for name in local(first, 6, 8)} == local(first)
    uploads = [upload for line in lines(first) for upload in line.get("uploads", ())]
    assert {upload["step"] for upload in uploads} <= {2, 4, 6} and all(upload["bytes"] > 0 for upload in uploads)
    state = read_state(first)
    assert state and (state.uploaded, state.waiting, state.problem) == (8, [], "")
    evaluations = lines(first, "eval.jsonl")
    shutil.rmtree(first)
    # At the same layout bit for bit, with the lines of the steps before.
    second, result = run("second", 2)
    assert result.codes == [0, 0], result.tails
    assert f"resuming from {url}/checkpoints/step-00000008" in result.out
    assert re.search(r"restart 2: resuming after step 8 \(", result.out)
    assert exact(second) == exact(uninterrupted)
    assert lines(second, "eval.jsonl")[: len(evaluations) - 1] == evaluations[:-1]
    assert newest_start(second)["start"] == 2 and steps_in_store(store, url) == [2, 4, 6, 8, 10, 12]


def test_a_lost_folder_is_resumed_at_another_layout(run, store, url, uninterrupted):
    """Ranks and axes change, and the second start begins without a folder."""
    for world, layout, steps in ((2, "parallel.pipe=2", 2), (4, "parallel.expert=4 train.micro_batch=1", 4)):
        run_dir, result = run("run", world, f"train.steps={steps}", *layout.split())
        assert result.codes == [0] * world, result.tails
        metrics = lines(run_dir)
        shutil.rmtree(run_dir)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    for got, expected in zip(metrics, lines(uninterrupted), strict=False):
        assert got["batch_id"] == expected["batch_id"]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_killed_during_uploads_it_writes_the_same_lines(run, store, url, uninterrupted, seed, kills):
    """SIGKILL of ranks and uploads at random times, 30 ms per request; after every other kill the folder is lost."""
    draw = random.Random(seed)
    killed = 0

    def is_complete_there(result) -> bool:
        """The last kill was after the last upload, and lost the folder: no uploads are left to do, or to abort."""
        return f"{url}/checkpoints is complete" in result.out

    def check_lines(run_dir: Path, result) -> None:
        if is_complete_there(result):
            (run_dir / "metrics.jsonl").write_bytes(store.content(url)["metrics.jsonl"])
        assert exact(run_dir) == exact(uninterrupted), f"{killed} kills"

    while killed < kills:
        store.proxy.latency = 0.03
        run_dir, result = run("run", 2, env={"KILL_IN": str(draw.uniform(2.0, 12.0))})
        if result.codes == [0, 0]:
            check_lines(run_dir, result)
            shutil.rmtree(run_dir)
            for name in store.content(url):
                key = url.removeprefix("s3://runs/") + "/" + name
                store.client().delete_object(Bucket="runs", Key=key)
            continue
        assert -signal.SIGKILL in result.codes, (result.codes, result.tails)
        killed += 1
        if killed % 2 and run_dir.exists():
            shutil.rmtree(run_dir)
    store.reset()
    run_dir, result = run("run", 2)
    assert result.codes == [0, 0], result.tails
    check_lines(run_dir, result)
    there, here = in_store(store, url), local(run_dir)
    assert {name: there[name] for name in here} == here and f"checkpoints/step-{STEPS:08d}/checkpoint.json" in there
    assert is_complete_there(result) or not store.client().list_multipart_uploads(Bucket="runs").get("Uploads")


def test_training_continues_without_the_store_and_a_later_start_uploads_the_rest(run, store, url, uninterrupted):
    """Access is denied from the third checkpoint on. The folder keeps what waits, but not more than the backlog."""

    def deny(path: str, number: int):
        steps = [int(step) for step in re.findall(r"step-(\d+)", path)]
        return (403, "AccessDenied") if steps and steps[0] > 4 else None

    store.proxy.fault = deny
    limits = ("checkpoint.remote_wait=2", "checkpoint.remote_backlog=1")
    run_dir, result = run("run", 2, *limits, program=train_until_uploads_fail)
    assert result.codes == [0, 0], result.tails
    assert exact(run_dir) == exact(uninterrupted)
    warnings = [line for line in result.err.splitlines() if "access is denied; check the credentials" in line]
    assert warnings and "training continues, the upload is tried again" in warnings[0]
    assert sum("training continues" in line for line in warnings) == 1, result.err
    assert re.search(
        r"the checkpoints of steps .*10, 12 were not uploaded to .*the same command uploads them", result.err
    )
    kept = sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))
    assert kept == [8, 10, 12] and "step-00000006 is deleted before its upload" in result.err
    state = read_state(run_dir)
    assert state and state.waiting == kept and "access is denied" in state.problem
    assert max(steps_in_store(store, url), default=0) <= 4
    store.reset()
    _, result = run("run", 2)
    assert result.codes == [0, 0] and "is complete" in result.out, result.tails
    there = in_store(store, url)
    assert {name: there[name] for name in local(run_dir)} == local(run_dir)


def test_a_store_that_hangs_does_not_delay_the_run_beyond_the_stated_limit(run, store, url, uninterrupted):
    store.proxy.fault = lambda path, number: ("stall", 0.5) if "step-" in path else None
    run_dir, result = run("run", 2, "checkpoint.remote_wait=1", "faults.preflight=false")
    assert result.codes == [0, 0], result.tails
    assert exact(run_dir) == exact(uninterrupted)
    assert re.search(r"uploading the checkpoints? of steps? .* to s3://runs/.*, for at most 1 s", result.out)
    assert "it takes more than 1 s" in result.err


def test_a_stopped_run_waits_for_its_upload(run, store, url, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    run_dir, result = run("run", 1, "checkpoint.remote_wait_stopped=600")
    assert result.codes == [85], result.tails
    assert local(run_dir) == in_store(store, url)


def test_a_second_run_is_refused_before_it_writes(run, store, url, tmp_path):
    """Of other settings; with checkpoints of its own; and of a folder that was continued elsewhere."""
    _, result = run("first", 1, "train.steps=2")
    assert result.codes == [0], result.tails
    before = store.content(url)
    second, result = run("second", 1, "train.steps=2", "optim.lr=0.5")
    assert result.codes == [2] and "optim.lr" in result.err and not (second / "config.yaml").exists()
    _, result = run("own", 1, "train.steps=2", f"checkpoint.remote={url}-own")
    assert result.codes == [0], result.tails
    _, result = run("own", 1, "train.steps=4")
    assert result.codes == [2] and "which is not the one in run.dir=" in result.err, result.err
    assert store.content(url) == before
    moved, result = run("moved", 1, "train.steps=4")
    assert result.codes == [0] and at(moved, 4).is_dir(), result.tails
    _, result = run("first", 1, "train.steps=6")
    assert result.codes == [2] and "start 2 of this run has continued it in" in result.err, result.err


@pytest.mark.parametrize(
    "ranks, fault, message",
    [
        (2, (403, "AccessDenied"), "access is denied; check the credentials"),
        (1, (404, "NoSuchBucket"), "there is no such"),
        (1, (403, "RequestTimeTooSkewed"), "the clock of this node differs"),
    ],
)
def test_a_new_run_is_refused_if_the_store_cannot_be_used(run, store, url, ranks, fault, message):
    store.proxy.fault = lambda path, number: fault
    run_dir, result = run("run", ranks)
    assert set(result.codes) == {2} and message in result.err and url in result.err, result.tails
    assert not (run_dir / "checkpoints").exists()


def test_preflight_writes_to_the_store_and_says_how_fast(run, store, url):
    _, result = run("run", 1, "train.steps=2", "--preflight")
    assert result.codes == [0] and re.search(r"uploads at least [\d.]+[kMB]*B/s", result.out), result.tails
    assert not store.content(url), "its file is removed"


@pytest.mark.parametrize(
    "value, message",
    [
        ("https://host/run", "is not the URL of a folder that is written"),
        ("runs/copies", "is not the URL of a folder that is written"),
        ("s3://", "is not the URL of a folder that is written"),
        ("s3://user:hunter2@bucket/run", "contains a password or key"),
    ],
)
def test_urls_that_cannot_be_written_are_refused(settings_here, value, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        load_config(settings_here[0], [*settings_here[1:], f"checkpoint.remote={value}"])
    assert "hunter2" not in str(refused.value)


def test_two_nodes_share_the_upload(run, store, url, settings_here, tmp_path):
    arguments = [
        *settings_here,
        f"run.dir={tmp_path / 'run'}",
        f"checkpoint.remote={url}",
        "train.steps=4",
        "train.micro_batch=1",
    ]
    result = launch(4, train_on_nodes, arguments, env=store.env)
    assert result.codes == [0] * 4, result.tails
    assert in_store(store, url) == local(tmp_path / "run")
    assert len(list((tmp_path / "run" / "logs").glob("upload-*.log"))) == 2
    assert store.env["AWS_SECRET_ACCESS_KEY"] not in json.dumps([file.read_text() for file in tmp_path.rglob("*.log")])


def train_until_uploads_fail(arguments: list[str]) -> None:
    """The end of the run waits until an upload has failed: these steps take less time than the upload's imports."""
    from mythos_dist.train.loop import Run

    finish = Run.finish

    def wait_and_finish(self: Run, reason: str) -> None:
        while not ((state := read_state(self.run_dir)) and state.problem):
            self.session.heartbeat()
            time.sleep(0.02)
            self.checkpoints.uploads.poll()
        finish(self, reason)

    Run.finish = wait_and_finish
    train_here(arguments)


def train_on_nodes(arguments: list[str]) -> None:
    """Two ranks to a node."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    socket.gethostname = lambda: f"node-{rank // 2}"
    train_here(arguments)
