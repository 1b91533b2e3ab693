"""Runs that are killed, run out of disk space, find damaged checkpoints or are started twice: in every case the lines
of metrics.jsonl finally equal those of an uninterrupted run."""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers.disk import enlarge, small_disk
from helpers.launch import launch, train, train_here

from mythos_dist.checkpoint.fence import Fence, newest_start
from mythos_dist.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from mythos_dist.checkpoint.restore import load_model

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
EXACT = ("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "expert_load_max")
STEPS = 15
NEWEST, SECOND, OLDEST = (f"step-{step:08d}" for step in (STEPS, STEPS - 3, STEPS - 6))  # checkpoints that are kept


@pytest.fixture(scope="module")
def run(settings) -> list[str]:
    return [
        *settings,
        f"train.steps={STEPS}",
        "train.global_batch=4",
        "checkpoint.every=3",
        "checkpoint.keep=3",
        "loops.distribution=poisson",
    ]


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("resume") / "uninterrupted"
    begin = time.monotonic()
    assert train(2, *run, f"run.dir={run_dir}").codes == [0, 0]
    (run_dir.parent / "seconds").write_text(str(time.monotonic() - begin))
    return run_dir


def lines(run_dir: Path) -> list[tuple]:
    records = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in EXACT) for line in records]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-????????"))


def test_checkpoints_are_kept_and_pinned(uninterrupted, run, tmp_path):
    assert checkpoints(uninterrupted) == [STEPS - 6, STEPS - 3, STEPS]
    pinned = train(2, *run, f"run.dir={tmp_path}", "checkpoint.pin=[4,9]", "checkpoint.pin_every=15", "train.steps=18")
    assert pinned.codes == [0, 0] and checkpoints(tmp_path) == [4, 6, 9, 12, 15, 18]


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.long)])
def test_killed_many_times_it_writes_the_same_lines(uninterrupted, run, tmp_path, seed, times):
    """kill -9 of all ranks at random times, every fourth time while a checkpoint is written in the background."""
    draw, run_dir = random.Random(seed), tmp_path / "run"
    longest = float((uninterrupted.parent / "seconds").read_text())  # measured, so that kills are spread on any machine
    kills, resumed = 0, set()

    def unfinished() -> list[Path]:
        return list((run_dir / "checkpoints").glob("step-*.tmp-*"))

    while kills < times or not resumed:  # all kills may be before the first checkpoint
        during_save, left_over = kills % 4 == 3, unfinished()
        env = {"KILL_IN": str(draw.random() * (0.3 if during_save else longest))}
        if during_save:  # a folder of this start
            start = newest_start(run_dir).get("start", 0) + 1
            env |= {"KILL_AFTER": str(run_dir / f"checkpoints/step-*.tmp-{start}/rank-*"), "SLOW_SAVE": "0.01"}
        result = train(2, *run, f"run.dir={run_dir}", env=env)
        if result.codes == [0, 0]:  # it completed before the kill
            assert lines(run_dir) == lines(uninterrupted), f"{kills} kills"
            shutil.rmtree(run_dir)
            continue
        assert -signal.SIGKILL in result.codes, (result.codes, result.tails)
        if during_save and not unfinished():
            assert left_over, "it was not killed while saving"
            continue  # killed while it removed the folder of an earlier start, which it renames first
        resumed |= {line for line in result.out.splitlines() if line.startswith("resuming from")}
        kills += 1
    assert train(2, *run, f"run.dir={run_dir}").codes == [0, 0]
    assert lines(run_dir) == lines(uninterrupted)
    assert not list((run_dir / "checkpoints").glob("*tmp*"))


def test_a_run_resumes_at_other_layouts(uninterrupted, run, tmp_path):
    """Killed three times, resumed with other axes, ranks and micro-batches: the same batches, losses to 1e-5."""
    segments = [  # ranks, layout, step after which the run is killed
        (2, "parallel.tensor=2", 3),
        (4, "parallel.pipe=2 parallel.expert=2", 6),
        (2, "parallel.expert=2 parallel.zero=3", 9),
        (1, "train.micro_batch=4", STEPS),
    ]
    for ranks, layout, stop in segments:
        env = kill_after(tmp_path, stop)
        result = train(ranks, *run, *layout.split(), f"run.dir={tmp_path}", env=env, seconds=800)
        assert result.codes == ([0] if stop == STEPS else [-signal.SIGKILL] * ranks), result.tails
    for got, expected in zip(lines(tmp_path), lines(uninterrupted), strict=True):
        assert got[:1] + got[3:7] == expected[:1] + expected[3:7]
        assert got[1] == pytest.approx(expected[1], rel=1e-5)
        assert got[2] == pytest.approx(expected[2], rel=1e-4)
    assert read_checkpoint_manifest(tmp_path / "checkpoints" / f"step-{STEPS:08d}").layout["ranks"] == 1


def kill_after(run_dir: Path, step: int) -> dict[str, str]:
    """Variables with which a run is killed after the checkpoint of `step`; none for the last step."""
    return (
        {} if step == STEPS else {"KILL_AFTER": str(run_dir / "checkpoints" / f"step-{step:08d}" / "checkpoint.json")}
    )


@pytest.mark.parametrize("every_pair", [False, pytest.param(True, marks=pytest.mark.long)])
def test_damaged_files_are_named_and_the_previous_checkpoint_is_loaded(uninterrupted, run, tmp_path, every_pair):
    """A tensor file or manifest that is truncated, has a flipped bit, is missing or is empty. If no checkpoint is
    intact, the run is refused."""

    def truncate(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-100])

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)

    names = ("rank-00001.safetensors", "checkpoint.json")
    for i, damage in enumerate((truncate, flip, Path.unlink, lambda file: file.write_bytes(b""))):
        for name in names if every_pair else names[i % 2 :][:1]:
            run_dir = tmp_path / "run"
            shutil.copytree(uninterrupted, run_dir)
            damage(run_dir / "checkpoints" / NEWEST / name)
            result = train(2, *run, f"run.dir={run_dir}")
            assert result.codes == [0, 0], result.tails
            assert f"{NEWEST}/{name}" in result.err and "WARNING" in result.err, result.err
            assert "resuming from" in result.out and SECOND in result.out
            assert lines(run_dir) == lines(uninterrupted)
            read_checkpoint_manifest(run_dir / "checkpoints" / NEWEST)
            shutil.rmtree(run_dir)
    shutil.copytree(uninterrupted, run_dir)
    for step in checkpoints(run_dir):
        truncate(run_dir / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
    result = train(2, *run, f"run.dir={run_dir}")
    assert result.codes == [2, 2] and "Traceback" not in result.err
    for words in (f"{OLDEST}/rank-00000", f"{NEWEST}/rank-00000", "no checkpoint is intact"):
        assert words in result.err


@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.long)])
def test_a_run_continues_when_its_disk_is_full(uninterrupted, run, tmp_path, background):
    """Checkpoints that fit are kept, the others are skipped with a warning; once there is space, the run completes."""
    size = sum(file.stat().st_size for file in (uninterrupted / "checkpoints" / NEWEST).iterdir()) // 1024
    with small_disk(tmp_path / "disk", 2 * size + size // 2 + 100):
        run_dir = tmp_path / "disk" / "run"
        arguments = [*run, f"run.dir={run_dir}", f"checkpoint.background={background}"]
        result = train(2, *arguments)
        assert result.codes == [2, 2], result.tails
        assert "the checkpoint of step 9 could not be written" in result.err and "No space left" in result.err
        assert "would resume from step-00000006" in result.err and "Traceback" not in result.err
        assert "the last checkpoint could not be written" in result.err
        assert lines(run_dir) == lines(uninterrupted) and not (run_dir / "COMPLETED").exists()
        assert checkpoints(run_dir) == [3, 6]
        enlarge(tmp_path / "disk")
        again = train(2, *arguments)
        assert again.codes == [0, 0] and "step-00000006" in again.out
        assert lines(run_dir) == lines(uninterrupted) and (run_dir / "COMPLETED").exists()


def test_one_checkpoint_is_written_at_a_time(uninterrupted, run, tmp_path):
    """Even if checkpoints are due faster than they are written."""
    run_dir, most, done = tmp_path / "run", 0, threading.Event()  # most: temporary folders that existed at once

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, len(list((run_dir / "checkpoints").glob("step-*.tmp-*"))))

    thread = threading.Thread(target=watch)
    thread.start()
    slow = {"SLOW_SAVE": "0.005"}
    result = train(2, *run, f"run.dir={run_dir}", "checkpoint.every=1", f"checkpoint.keep={STEPS}", env=slow)
    done.set()
    thread.join()
    assert result.codes == [0, 0] and most == 1
    assert checkpoints(run_dir) == list(range(1, STEPS + 1)) and lines(run_dir) == lines(uninterrupted)


def train_until_superseded(run_dir: str, arguments: list[str]) -> None:
    """Train; while the checkpoint of step 9 is written, another start of the run begins."""
    from mythos_dist.checkpoint.save import Saver

    save = Saver.save

    def save_and_supersede(self: Saver, manifest: CheckpointManifest) -> None:
        save(self, manifest)
        if manifest.step == 9 and os.environ["RANK"] == "0":
            Fence.take(Path(run_dir))

    Saver.save = save_and_supersede
    train_here(arguments)


def test_a_newer_start_ends_the_previous_one(uninterrupted, run, tmp_path):
    """As when a node that lost its network still runs after the job was restarted elsewhere: the old start publishes
    no further checkpoint."""
    run_dir = tmp_path / "run"
    stale = launch(2, train_until_superseded, str(run_dir), [*run, f"run.dir={run_dir}"])
    assert stale.codes == [2, 2] and "Traceback" not in stale.err, stale.err
    assert "taken over by start 2" in stale.err and "this is start 1" in stale.err
    assert max(checkpoints(run_dir)) == 6
    assert train(2, *run, f"run.dir={run_dir}").codes == [0, 0]
    assert lines(run_dir) == lines(uninterrupted)


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(uninterrupted, run, tmp_path):
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    result = train(2, *run, f"run.dir={tmp_path}", "model.n_experts=4", "model.lora_rank=2", "parallel.tensor=2")
    assert result.codes == [2, 2] and "Traceback" not in result.err
    for words in ("model.n_experts=4", "was saved with 8", "model.lora_rank=2", "was saved with 4"):
        assert words in result.err, result.err
    assert "parallel.tensor" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_checkpoints_are_refused_only_for_settings_that_change_results(uninterrupted, run, tmp_path):
    """Another learning rate or seed is refused; another number of steps or of kept checkpoints is not."""
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    result = train(
        1, *run, f"run.dir={tmp_path}", "optim.lr=1e-3", "run.seed=5", "checkpoint.keep=1", f"train.steps={STEPS + 1}"
    )
    assert result.codes == [2] and "optim.lr=0.001" in result.err and "run.seed=5" in result.err
    assert "checkpoint.keep" not in result.err and "train.steps" not in result.err


def test_a_model_loads_from_a_run_or_from_one_checkpoint(uninterrupted):
    folder = uninterrupted / "checkpoints"
    for path, step in ((uninterrupted, STEPS), (folder, STEPS), (folder / OLDEST, STEPS - 6)):
        model, config, loaded_step = load_model(path)
        assert loaded_step == step and model.config == config.model
