"""A step has the same samples at every layout, each sample occurs once per epoch, seeking is exact."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shard_folder import EOS, SEQ_LEN, VOCAB_SIZE, copy, rewrite_index, shard_files, write_folder

from mythos_dist.data.mix import corpus_positions
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("stream") / "shards", [40, 13, 57, 21], [30, 7])


@pytest.fixture(scope="module")
def mix(folder, tmp_path_factory):
    """Three corpora of 131, 50 and 20 training windows; the second is compressed."""
    root = tmp_path_factory.mktemp("mix")
    second = write_folder(root / "second", [20, 30], [11], corpus=1, compression="zstd:3")
    third = write_folder(root / "third", [20], [9, 9], corpus=2)
    return {str(folder): 0.6, str(second): 0.3, str(third): 0.1}


@pytest.fixture(scope="module")
def make_stream(folder, tmp_path_factory):
    """ReplicaStream with small defaults; a test passes only the settings that it is about."""
    return partial(
        ReplicaStream,
        path=folder,
        split="train",
        seq_len=SEQ_LEN,
        vocab_size=VOCAB_SIZE,
        global_batch=8,
        micro_batch=2,
        replica=0,
        num_replicas=1,
        seed=7,
        cache=tmp_path_factory.mktemp("cache"),
    )


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


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.launch
def test_a_micro_batch_has_the_windows_on_disk(make_stream, tmp_path, dtype):
    """Against StreamingDataset: inputs w[:-1], labels w[1:], and document ids by counting."""
    folder = write_folder(tmp_path / "shards", [15, 25], dtype=dtype)
    stream = make_stream(path=folder)
    from streaming import StreamingDataset  # takes seconds

    data = StreamingDataset(local=str(folder / "train"), batch_size=1)
    assert stream.num_samples == data.num_samples
    documents = set()
    for batch in [one for step in range(5) for one in stream.step(step)]:
        windows = np.stack([data[i]["tokens"] for i in batch.sample_ids.tolist()]).astype(np.int64)
        assert batch.input_ids.tolist() == windows[:, :-1].tolist()
        assert batch.labels.tolist() == windows[:, 1:].tolist()
        ids = [[row[:i].count(EOS) for i in range(SEQ_LEN)] for row in batch.input_ids.tolist()]
        assert batch.document_ids.tolist() == ids
        documents.update(id for row in ids for id in row)
        assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.int32, torch.int64]
        assert (batch.input_ids.shape, batch.sample_ids.shape) == ((2, SEQ_LEN), (2,))
        assert all(x.is_contiguous() for x in batch)
    assert len(documents) > 1, "no window has two documents, so the ids were not tested"


@pytest.mark.parametrize(
    ("num_replicas", "micro_batch", "global_batch"), [(1, 7, 7), (2, 2, 12), (4, 5, 20), (1, 9, 90)]
)
def test_every_epoch_has_every_sample_once(make_stream, num_replicas, micro_batch, global_batch):
    """Also when an epoch ends within a step, and when one step has several epochs."""
    streams = replicas(make_stream, num_replicas, split="heldout", micro_batch=micro_batch, global_batch=global_batch)
    n = streams[0].num_samples
    assert n == 37 and n % global_batch, "the layout must not divide the split"
    sequence = [i for step in range(-(-3 * n // global_batch)) for i in step_ids(streams, step)]
    epochs = [sequence[e * n : (e + 1) * n] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_has_the_same_samples_at_every_layout(make_stream, folder, mix, mixed):
    """And in the same order: replica r takes part r of the global batch."""
    path = mix if mixed else folder
    expected = [step_ids([make_stream(path=path, global_batch=16, micro_batch=16)], step) for step in range(4)]
    for num_replicas, micro_batch in [(1, 2), (2, 8), (2, 1), (4, 2)]:
        streams = replicas(make_stream, num_replicas, path=path, global_batch=16, micro_batch=micro_batch)
        assert [step_ids(streams, step) for step in range(4)] == expected
    assert len({i for ids in expected for i in ids}) == 4 * 16


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_reading_ahead_equals_reading_step_by_step(make_stream, folder, mix, mixed, workers):
    stream = make_stream(
        path=mix if mixed else folder, num_replicas=2, replica=1, split="heldout", workers=workers, micro_batch=1
    )
    first = stream.num_samples // 8 - 1  # steps from here cross into the next epoch
    for step, micro_batches in enumerate(islice(stream.steps(first), 4), first):
        assert len(micro_batches) == 4
        assert_same(micro_batches, stream.step(step))


def test_starting_at_a_step_equals_reading_up_to_it(make_stream, mix):
    expected_steps = list(islice(make_stream(path=mix).steps(0), 8))
    for micro_batches, expected in zip(make_stream(path=mix).steps(5), expected_steps[5:], strict=False):
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
    stream = make_stream(shuffle=False, split="heldout", global_batch=4)
    assert [ids_of(stream.step(step)) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_mix_of_one_corpus_equals_the_corpus(make_stream, folder):
    alone, mixed = make_stream(), make_stream(path={str(folder): 0.25})
    assert alone.fingerprint == mixed.fingerprint and alone.num_samples == mixed.num_samples
    assert [ids_of(alone.step(step)) for step in range(5)] == [ids_of(mixed.step(step)) for step in range(5)]


def test_a_mix_reads_each_corpus_by_its_weight_and_once_per_epoch_of_that_corpus(make_stream, mix):
    """The ids of a corpus follow those of the previous corpora; its windows are the same as without a mix."""
    stream = make_stream(path=mix)
    ids = np.array([i for step in range(60) for i in ids_of(stream.step(step))])
    sizes = {0: 131, 1: 50, 2: 20}
    corpus = np.searchsorted(np.cumsum(list(sizes.values())), ids, side="right")
    for number, (weight, first) in enumerate(zip(mix.values(), [0, 131, 181], strict=True)):
        mine = corpus == number
        assert np.abs(mine.cumsum() - weight * np.arange(1, len(ids) + 1)).max() < 3
        own = ids[mine] - first
        for epoch in range(len(own) // sizes[number]):
            here = own[epoch * sizes[number] : (epoch + 1) * sizes[number]]
            assert sorted(here.tolist()) == list(range(sizes[number])), f"corpus {number}, epoch {epoch}"
    assert Counter(corpus.tolist()).keys() == {0, 1, 2} and (corpus == 2).sum() > 2 * 20, (
        "the smallest corpus must repeat"
    )

    alone = [make_stream(path=path, shuffle=False, global_batch=8, micro_batch=8) for path in mix]
    windows = {}
    for number, (first, one) in enumerate(zip([0, 131, 181], alone, strict=True)):
        for step in range(one.num_samples // 8):
            (batch,) = one.step(step)
            for i, tokens in zip(batch.sample_ids.tolist(), batch.input_ids.tolist(), strict=True):
                windows[first + i] = (number, tokens)
    for batch in stream.step(1):
        for i, tokens in zip(batch.sample_ids.tolist(), batch.input_ids.tolist(), strict=True):
            assert windows.get(i, (0, tokens))[1] == tokens


def test_the_held_out_split_of_a_mix_ends_before_a_corpus_repeats(make_stream, mix):
    """37, 11 and 18 windows at 6 : 3 : 1, in the order on disk. The second corpus ends first; at most 4 windows of the
    others follow its 11."""
    stream = make_stream(path=mix, split="heldout", shuffle=False, global_batch=1, micro_batch=1)
    ids = [ids_of(stream.step(step))[0] for step in range(stream.num_samples + 1)]
    corpus, own = corpus_positions(np.arange(len(ids)), [6, 3, 1])
    assert ids == (np.array([0, 37, 48])[corpus] + own % np.array([37, 11, 18])[corpus]).tolist()
    assert len(set(ids[:-1])) == len(ids) - 1 and ids[-1] == 37, "the next sample would be the second corpus's first"
    assert 11 * 10 // 3 <= stream.num_samples <= 11 * 10 // 3 + 4


def test_a_global_batch_that_replicas_do_not_divide_is_refused(make_stream):
    with pytest.raises(UserError, match=r"global_batch=9 is not divisible by 1 replica x train\.micro_batch=2"):
        make_stream(global_batch=9)


def test_a_folder_that_does_not_fit_the_config_is_refused(make_stream, folder):
    with pytest.raises(UserError, match=r"set train\.seq_len to 16 or 32"):
        make_stream(seq_len=24)
    with pytest.raises(UserError, match="no such folder"):
        make_stream(path={str(folder): 1, "nowhere": 1})


def test_many_streams_of_a_folder_open_few_files(make_stream):
    """Unlike StreamingDataset, which opens about 12 more files for each instance that the process has had."""
    make_stream()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        make_stream().step(0)
    assert len(os.listdir("/proc/self/fd")) <= before


def write_token(folder, token: int) -> None:
    """Make `token` the last label of the last held-out window, in the shard and its hashes."""
    shard = shard_files(folder, "heldout")[-1]
    with open(shard, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(token.to_bytes(2, "little"))
    rewrite_index(folder, "heldout", lambda entries: entries[-1]["raw_data"]["hashes"].clear())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_outside_the_vocabulary_is_an_error_before_the_model_gets_it(make_stream, folder, tmp_path, workers):
    folder = copy(folder, tmp_path / "copy")
    write_token(folder, 65535)
    stream = make_stream(
        path=folder, split="heldout", shuffle=False, global_batch=1, micro_batch=1, workers=workers, verify=False
    )
    last = stream.num_samples - 1
    assert ids_of(stream.step(last - 1)) == [last - 1]
    message = f"split heldout, sample {last}: token 65535 is outside model.vocab_size={VOCAB_SIZE}"
    with pytest.raises(UserError, match=message):
        stream.step(last)
    with pytest.raises(UserError, match=message):
        next(stream.steps(last))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_an_error_without_traceback_at_the_step_that_reads_it(
    make_stream, folder, tmp_path, workers
):
    """Earlier steps are complete, although the workers have already read the damaged shard."""
    folder = copy(folder, tmp_path / "copy")
    damaged = shard_files(folder)[1]
    with open(damaged, "r+b") as file:
        file.seek(damaged.stat().st_size // 2)
        file.write(b"\xff\xff")
    stream = make_stream(path=folder, shuffle=False, workers=workers)
    steps = stream.steps(0)
    for step in range(5):
        assert ids_of(next(steps)) == list(range(step * 8, step * 8 + 8))
    with pytest.raises(UserError, match=r"train/part-00001/shard.00000.mds: its xxh64 is") as error:
        next(steps)
    assert "Traceback" not in str(error.value) and error.value.problems


@pytest.mark.timeout(240)
def test_a_worker_that_is_killed_is_an_error(make_stream):
    """As by the kernel when memory runs out."""
    before = set(multiprocessing.active_children())
    steps = make_stream(workers=2).steps(0)
    next(steps)
    worker, other = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(RuntimeError, match=f"worker .*{worker.pid}"):
        for _ in range(1000):
            next(steps)
    other.kill()  # it ignores SIGTERM: where nothing closed the loader, pytest waited for it at its end, forever
    other.join()


@pytest.mark.launch  # torch waits for 5 s
@pytest.mark.timeout(240)
def test_a_worker_that_does_not_answer_is_killed_with_the_generator(make_stream, monkeypatch):
    """Here it is suspended; else it may wait for a lock that a killed worker holds. It ignores all other signals.
    Nothing is read ahead, or a thread might wait for what the worker does not send."""
    monkeypatch.setattr("mythos_dist.data.stream.one_ahead", lambda items: items)
    before = set(multiprocessing.active_children())
    steps = make_stream(workers=2).steps(0)
    next(steps)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    os.kill(min(worker.pid for worker in workers), signal.SIGSTOP)
    steps.close()
    alive = [worker for worker in workers if worker.is_alive()]
    for worker in alive:
        worker.kill()
    assert not alive


FAILED = """
import itertools, multiprocessing, sys, threading
from mythos_dist.data.stream import ReplicaStream
stream = ReplicaStream(
    sys.argv[1], "train", seq_len=16, vocab_size=1000, global_batch=8, micro_batch=2, replica=0, num_replicas=1, seed=7,
    workers=2,
)
steps = stream.steps(0)
next(steps)
multiprocessing.active_children()[0].kill()
try:
    for _ in itertools.count():
        next(steps)
except RuntimeError as error:
    kept = error  # as an interactive session does, in sys.last_value
for thread in threading.enumerate():
    if thread.name == "read ahead":  # it may notice later than the main thread, which receives a signal
        thread.join()
print("failed")
"""


@pytest.mark.launch
@pytest.mark.timeout(240)
def test_a_program_ends_although_it_keeps_the_error_of_a_killed_worker(folder):
    """The other worker ignores the signal by which multiprocessing ends it, and would be waited for without end."""
    result = subprocess.run([sys.executable, "-c", FAILED, folder], capture_output=True, text=True, timeout=90)
    assert result.stdout == "failed\n" and result.returncode == 0, result.stderr


RANK = """
import glob, multiprocessing, os, sys, torch
from itertools import islice
from mythos_dist.data.stream import ReplicaStream
if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[3])
    stream = ReplicaStream(
        sys.argv[1], "train", seq_len=16, vocab_size=1000,
        global_batch=16384, micro_batch=4096,  # more than a pipe holds
        replica=int(sys.argv[2]), num_replicas=2, seed=7, workers=1,
    )
    steps = stream.steps(0)  # keeps its worker alive until this rank ends
    print(*[i for step in islice(steps, 3) for b in step for i in b.sample_ids.tolist()])
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    print(*pids)
    for pid in pids:
        for line in open(f"/proc/{pid}/maps"):
            if "/dev/shm/" in line:
                print("/dev/shm/" + line.split("/dev/shm/")[1], end="")
        for link in glob.glob(f"/proc/{pid}/fd/*"):
            if os.path.lexists(link) and os.readlink(link).startswith("/dev/shm/"):
                print(os.readlink(link))
    sys.stdout.flush()
    if sys.argv[4] == "kill":
        os.kill(os.getpid(), 9)
"""


def contents_of(file: Path) -> bytes:
    """The content of a file that another test may remove at any time; empty if it is gone."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.launch
@pytest.mark.timeout(480)
@pytest.mark.parametrize(
    ("method", "num_ranks", "end"),
    [("fork", 2, "kill"), ("spawn", 1, "kill"), ("fork", 1, "exit")],  # spawned workers import it all again
)
def test_ranks_that_end_leave_no_worker_and_nothing_in_dev_shm(make_stream, folder, tmp_path, method, num_ranks, end):
    """Ranks read at the same time without waiting for each other, with no launcher's variables (streaming needed
    LOCAL_WORLD_SIZE). After kill -9, or at the end of the program, their workers exit, although what they have sent is
    not read, and /dev/shm has nothing that a process had open, nothing with
    its pid, and nothing of streaming's for this folder."""
    folder = copy(folder, tmp_path / "own")
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder), str(rank), method, end],
            env={name: value for name, value in os.environ.items() if name not in names},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [rank.communicate(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL if end == "kill" else 0] * num_ranks, outputs
    printed = [out.splitlines() for out, _ in outputs]
    got = [[int(i) for i in lines[0].split()] for lines in printed]
    pids = [pid for lines in printed for pid in lines[1].split()]
    assert len(pids) == 2 * num_ranks, "each rank has one worker"
    assert not [name for lines in printed for name in lines[2:] if os.path.exists(name)]
    left = os.listdir("/dev/shm")
    assert not [name for name in left for pid in pids if f"_{pid}_" in name]
    assert not [names for names in Path("/dev/shm").glob("*_locals") if str(folder).encode() in contents_of(names)]
    streams = replicas(make_stream, 2, global_batch=16384, micro_batch=4096)[:num_ranks]
    assert got == [[i for step in range(3) for i in ids_of(stream.step(step))] for stream in streams]
