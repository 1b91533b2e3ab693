"""A step holds the same samples at every layout, each sample comes once an epoch, and seeking is exact."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from streaming import StreamingDataset

from mythos_dist.errors import UserError


def ids_of(micro_batches):
    return [i for batch in micro_batches for i in batch.sample_ids.tolist()]


def step_ids(streams, step):
    """The samples of a step over all replicas, in the order of the global batch."""
    return [i for stream in streams for i in ids_of(stream.step(step))]


def replicas(make_stream, num_replicas, **settings):
    return [make_stream(num_replicas=num_replicas, replica=r, **settings) for r in range(num_replicas)]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_micro_batch_is_the_windows_on_disk(make_stream, shards, tokenizer):
    """Against streaming alone: inputs w[:-1], labels w[1:], and document ids counted by hand."""
    stream = make_stream()
    data = StreamingDataset(local=str(shards / "train"), batch_size=1)
    assert stream.num_samples == data.num_samples
    documents = set()
    for batch in [one for step in range(5) for one in stream.step(step)]:
        windows = np.stack([data[i]["tokens"] for i in batch.sample_ids.tolist()]).astype(np.int64)
        assert batch.input_ids.tolist() == windows[:, :-1].tolist()
        assert batch.labels.tolist() == windows[:, 1:].tolist()
        ids = [[row[:i].count(tokenizer.eos_id) for i in range(64)] for row in batch.input_ids.tolist()]
        assert batch.document_ids.tolist() == ids
        documents.update(id for row in ids for id in row)
        assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.int32, torch.int64]
        assert (batch.input_ids.shape, batch.sample_ids.shape) == ((2, 64), (2,))
    assert len(documents) > 1, "no window held two documents: the ids were not tried"


@pytest.mark.parametrize(
    ("num_replicas", "micro_batch", "global_batch"), [(1, 7, 7), (2, 2, 12), (4, 5, 20), (1, 9, 900)]
)
def test_every_epoch_holds_every_sample_once(make_stream, num_replicas, micro_batch, global_batch):
    """Also where an epoch ends inside a step, and where one step holds several epochs."""
    streams = replicas(make_stream, num_replicas, split="heldout", micro_batch=micro_batch, global_batch=global_batch)
    n = streams[0].num_samples
    assert n % global_batch, "the layout must not divide the split"
    sequence = [i for step in range(-(-3 * n // global_batch)) for i in step_ids(streams, step)]
    epochs = [sequence[e * n : (e + 1) * n] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_holds_the_same_samples_at_every_layout(make_stream):
    """In the same order even: a replica takes the next part of the global batch."""
    expected = [step_ids([make_stream(global_batch=16, micro_batch=16)], step) for step in range(4)]
    for num_replicas, micro_batch in [(1, 2), (2, 8), (2, 1), (4, 2)]:
        streams = replicas(make_stream, num_replicas, global_batch=16, micro_batch=micro_batch)
        assert [step_ids(streams, step) for step in range(4)] == expected
    assert len({i for ids in expected for i in ids}) == 4 * 16


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_equals_reading_each_step(make_stream, workers):
    stream = make_stream(num_replicas=2, replica=1, split="heldout", workers=workers)
    around_the_end = stream.num_samples // 8 - 2  # steps from here cross into the next epoch
    for step, micro_batches in enumerate(islice(stream.steps(around_the_end), 5), around_the_end):
        assert len(micro_batches) == 2
        assert_same(micro_batches, stream.step(step))


def test_starting_at_a_step_equals_reading_on_to_it(make_stream):
    read_on = list(islice(make_stream().steps(0), 8))
    for micro_batches, expected in zip(make_stream().steps(5), read_on[5:], strict=False):
        assert_same(micro_batches, expected)


def test_the_order_depends_on_the_seed_and_not_on_the_global_generator(make_stream):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [ids_of(batches) for batches in islice(make_stream(seed=1).steps(0), 3)]
    assert torch.equal(torch.get_rng_state(), before), "reading must leave the global generator alone"
    torch.manual_seed(1)
    assert [ids_of(make_stream(seed=1).step(step)) for step in range(3)] == first
    assert [ids_of(make_stream(seed=2).step(step)) for step in range(3)] != first


def test_without_shuffle_the_order_is_the_one_on_disk(make_stream):
    stream = make_stream(shuffle=False, split="heldout", global_batch=4, micro_batch=2)
    assert [ids_of(stream.step(step)) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_settings_that_do_not_fit_the_shards_are_reported_together(make_stream, shards, tmp_path):
    (tmp_path / "mine.model").write_bytes(b"another")
    with pytest.raises(UserError) as error:
        make_stream(seq_len=32, vocab_size=500, tokenizer_path=tmp_path / "mine.model")
    expected = [
        f"these shards were made with another tokenizer than {tmp_path / 'mine.model'}",
        "train.seq_len=32, but these shards hold windows of seq_len=64; set train.seq_len to 64",
        f"model.vocab_size=500 is smaller than the tokenizer of data.path={shards}, which has 1000 pieces; "
        "set model.vocab_size to 1000 or more",
    ]
    assert len(error.value.problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(error.value.problems, expected, strict=True))
    with pytest.raises(UserError, match=r"global_batch=9 is not divisible by 1 replicas x train\.micro_batch=2"):
        make_stream(global_batch=9, micro_batch=2)


def test_many_streams_of_a_folder_open_few_files(make_stream):
    """Streaming alone opens some 12 more files for each dataset that the process has had."""
    make_stream()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        make_stream().step(0)
    assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_a_larger_vocabulary_and_the_users_own_tokenizer_are_fine(make_stream, tokenizer):
    stream = make_stream(vocab_size=1024, tokenizer_path=tokenizer.path)
    assert len(stream.step(0)) == 4


def rewrite_manifest(folder, **changes):
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, **changes}))


def lose_windows(folder):
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["windows"] = 0
    rewrite_manifest(folder, splits=splits)


def miscount_windows(folder):
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["windows"] += 1
    rewrite_manifest(folder, splits=splits)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda at: (at / "manifest.json").unlink(), "not a finished conversion"),
        (lambda at: (at / "train/index.json").open("a").write(" "), "the shards changed after the conversion"),
        (lambda at: (at / "heldout/index.json").unlink(), "heldout/index.json cannot be read"),
        (lambda at: (at / "train/shard.00000.mds").unlink(), "1 shard files are missing in train/, .* shard.00000.mds"),
        (
            lambda at: (at / "tokenizer.model").open("ab").write(b" "),
            "made with another tokenizer than .*tokenizer.mod",
        ),
        (lambda at: (at / "tokenizer.model").unlink(), "no tokenizer at"),
        (lose_windows, "split train has 0 windows"),
        (miscount_windows, "windows, but the manifest says"),
    ],
)
def test_a_damaged_folder_is_refused_before_training(make_stream, shards, tmp_path, damage, message):
    folder = shutil.copytree(shards, tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError, match=message):
        make_stream(path=folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_outside_the_vocabulary_is_named_before_the_model_sees_it(make_stream, shards, tmp_path, workers):
    """The last label of the last window, two bytes at the end of the shard: index.json stays as it was."""
    folder = shutil.copytree(shards, tmp_path / "copy")
    with open(folder / "heldout/shard.00000.mds", "r+b") as shard:
        shard.seek(-2, os.SEEK_END)
        shard.write(b"\xff\xff")
    stream = make_stream(path=folder, split="heldout", shuffle=False, global_batch=1, micro_batch=1, workers=workers)
    last = stream.num_samples - 1
    assert ids_of(stream.step(last - 1)) == [last - 1]
    message = f"split heldout, sample {last}: token 65535 is outside model.vocab_size=1000"
    with pytest.raises(UserError, match=message):
        stream.step(last)
    with pytest.raises(UserError, match=message):
        next(stream.steps(last))


def test_ranks_that_do_not_know_their_number_are_told(make_stream, shards, tmp_path, monkeypatch):
    """What streaming raises in the second of two ranks that both take themselves for the first."""

    def collide(**_):
        raise FileExistsError("/000000_locals")

    shutil.copytree(shards, tmp_path / "shards")  # a folder that this process has not opened yet
    monkeypatch.setattr("streaming.StreamingDataset", collide)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE=1 must be the number of ranks on this machine"):
        make_stream(path=tmp_path / "shards")


TWO_RANKS = """
import os, sys
import torch.distributed as dist
from mythos_dist.data.stream import ReplicaStream
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
settings = dict(seq_len=64, vocab_size=1000, global_batch=8, micro_batch=2, replica=rank, num_replicas=2, seed=7)
train = ReplicaStream(sys.argv[1], "train", **settings)
heldout = ReplicaStream(sys.argv[1], "heldout", shuffle=False, **settings)
for stream in (train, heldout):
    print(f"{stream._windows._data._shm_prefix_int:06}", *[i for b in stream.step(0) for i in b.sample_ids.tolist()])
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.timeout(100)
def test_two_ranks_construct_at_once_and_leave_nothing_behind(make_stream, shards, tmp_path):
    """As DeepSpeed's launcher starts them: LOCAL_SIZE and no LOCAL_WORLD_SIZE. Silent, and no shared memory is left."""
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_WORLD_SIZE"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(shards), str(tmp_path / "store")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [errors for _, errors in outputs] == ["", ""]
    (train_0, heldout_0), (train_1, heldout_1) = (output.splitlines() for output, _ in outputs)
    prefixes = {line.split()[0] for line in (train_0, heldout_0)}
    assert prefixes == {line.split()[0] for line in (train_1, heldout_1)}
    assert not [name for name in os.listdir("/dev/shm") if name.split("_")[0] in prefixes]
    ids = [int(i) for line in (train_0, train_1) for i in line.split()[1:]]
    assert ids == ids_of(make_stream().step(0)), "together the ranks hold what one process reads"
    assert [int(i) for line in (heldout_0, heldout_1) for i in line.split()[1:]] == list(range(8))
