"""A damaged shard, or data that changed, ends a run on all ranks with exit code 2 and one message that names it."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.launch import launch, train
from helpers.shard_folder import rewrite_index, shard_files

from mythos_dist.data.stream import ReplicaStream
from mythos_dist.train import prepare

pytestmark = [pytest.mark.launch, pytest.mark.timeout(480)]


@pytest.fixture
def folder(shards, tmp_path) -> Path:
    """A copy of the shards, to damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture
def arguments(settings, folder, tmp_path) -> list[str]:
    return [*settings, f"data.path={folder}", f"run.dir={tmp_path / 'run'}"]


def flip(file: Path, at: float = 0.5) -> None:
    with open(file, "r+b") as stream:
        stream.seek(int(file.stat().st_size * at))
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def refused(result, *parts: str) -> None:
    """Exit code 2 on every rank, one message, on rank 0's standard error, and no traceback on any."""
    assert set(result.codes) == {2}, (result.codes, result.tails)
    assert result.err.startswith("error: ") and result.err.count("error: ") == 1, result.err
    assert not any("Traceback" in tail for tail in result.tails), result.tails
    for part in parts:
        assert part in result.err, result.err


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.long)])
def test_a_flipped_byte_ends_the_run_at_once(arguments, folder, tmp_path, workers):
    """In the first step that reads the shard, before the model uses its samples. No checkpoint is written."""
    (shard,) = shard_files(folder)
    flip(shard)
    result = train(2, *arguments, f"data.workers={workers}", seconds=240)  # a rank that hangs ends with 1
    refused(result, f"{folder}: train/{shard.relative_to(folder / 'train')}: its xxh64 is", "mythos verify")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not re.search(r"step \d+ took", (tmp_path / "run" / "logs" / "rank-00000.log").read_text())


def test_a_held_out_shard_is_checked_too(arguments, folder):
    (shard,) = shard_files(folder, "heldout")
    flip(shard)
    refused(train(2, *arguments, seconds=240), "heldout/", shard.name, "its xxh64 is")


def lose_shard_on_rank_1(shard: str, arguments: list[str]) -> None:
    """Train; rank 1 cannot open a shard after the inputs have been checked, as if the disk of its machine failed."""
    if os.environ["RANK"] == "1":
        check_inputs = prepare.check_inputs

        def check_and_lose(config):
            corpora = check_inputs(config)
            for entry in corpora[0].shards["train"]:
                entry.entry["raw_data"]["basename"] = shard
            return corpora

        prepare.check_inputs = check_and_lose
    from helpers.launch import train_here

    train_here(arguments)


@pytest.mark.parametrize("workers", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_shard_that_one_rank_cannot_read_ends_all_ranks_with_its_message(arguments, workers):
    """The other rank does not wait in a collective until that times out."""
    result = launch(2, lose_shard_on_rank_1, "lost.mds", [*arguments, f"data.workers={workers}"], seconds=240)
    refused(result, "error: rank 1: ", "train/lost.mds: cannot be opened (No such file or directory)")


def test_a_shortened_and_a_missing_shard_are_found_before_the_model_is_built(arguments, folder, tmp_path):
    """One message reports both; the run folder is not created."""
    (shard,), (heldout,) = shard_files(folder), shard_files(folder, "heldout")
    os.truncate(shard, 100)
    heldout.unlink()
    refused(
        train(2, *arguments, seconds=240),
        "2 problems",
        "1 shard file in train/ differs in size from index.json",
        "1 shard file is missing in heldout/",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_outside_the_vocabulary_is_reported_without_data_verify(arguments, folder, shards, workers):
    """With data.verify=false; the message has the sample, the token and the size of the vocabulary."""
    stream = ReplicaStream(
        shards, "train", seq_len=32, vocab_size=512, global_batch=8, micro_batch=8, replica=0, num_replicas=1, seed=0
    )
    batch = stream.step(1)[0]
    tokens = np.append(batch.input_ids[3].numpy(), batch.labels[3, -1].numpy()).astype("uint16").tobytes()
    (shard,) = shard_files(folder)
    content = shard.read_bytes()
    assert content.count(tokens) == 1
    shard.write_bytes(content.replace(tokens, b"\xff" * len(tokens)))
    result = train(1, *arguments, "data.verify=false", f"data.workers={workers}", seconds=240)
    refused(result, f"sample {batch.sample_ids[3]}", "65535", "512")


def test_a_run_on_a_mix_resumes_and_refuses_other_shards_and_weights(settings, folder, shards, tmp_path):
    """Two folders with the same windows and different indexes. Folders may be moved, and weights scaled."""
    other = Path(shutil.copytree(shards, tmp_path / "other"))
    rewrite_index(other, "train", lambda entries: entries[0].update(size_limit=1))  # the same windows, another index
    run = tmp_path / "run"
    common = [*settings[:-1], f"run.dir={run}"]

    def mixed(*weights: float, a: Path = folder) -> list[str]:
        return [*common, "data.path=null", f"data.mix={{{a}: {weights[0]}, {other}: {weights[1]}}}"]

    assert train(2, *mixed(0.75, 0.25), "train.steps=2").codes == [0, 0]
    first = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    refused(
        train(2, *mixed(0.5, 0.5, a=moved), "train.steps=4", seconds=240),
        f"{moved} has weight 1 of 2, but the run was trained with 3 of 4",
        "set data.mix back",
        "another run.dir",
    )
    refused(
        train(2, *common, f"data.path={moved}", "train.steps=4", seconds=240),
        "weight 1 of 4, are no longer in the mix",
    )
    result = train(2, *mixed(3, 1, a=moved), "train.steps=4")
    assert result.codes == [0, 0], result.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[:2] == first and [line["step"] for line in lines] == [1, 2, 3, 4]
