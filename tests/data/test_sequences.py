"""Shards made once serve other lengths: each token is read once, documents are complete and never mix."""

from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from helpers.shard_folder import EOS, SEQ_LEN, VOCAB_SIZE, window, write_folder

from experiments.depth_task import make_depth_task
from mythos_dist.data.corpora import open_corpora, with_windows
from mythos_dist.data.loss_mask import IGNORED
from mythos_dist.data.order import SampleOrder
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.errors import UserError

WINDOWS = [40, 13, 1, 57, 2, 21]  # of the shards of train/; each is a part, so the text breaks off after it
HELDOUT = [30, 7]
LENGTHS = [1, 2, 4, 8, SEQ_LEN, 2 * SEQ_LEN, 3 * SEQ_LEN, 7 * SEQ_LEN, 32 * SEQ_LEN, 100 * SEQ_LEN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("lengths") / "shards", WINDOWS, HELDOUT)


@pytest.fixture(scope="module")
def one_part(tmp_path_factory):
    """A single stream of text, in one shard."""
    return write_folder(tmp_path_factory.mktemp("one") / "shards", [50], [9], corpus=4)


@pytest.fixture(scope="module")
def make_stream(folder):
    """ReplicaStream with small defaults; a test passes only the settings that it is about."""
    return partial(
        ReplicaStream,
        path=folder,
        split="train",
        vocab_size=VOCAB_SIZE,
        global_batch=1,
        micro_batch=1,
        replica=0,
        num_replicas=1,
        seed=7,
    )


def stream_of(windows: list[int], corpus: int = 0) -> tuple[list[int], set[int]]:
    """The tokens of a split from its windows, and the positions at which another part begins."""
    tokens = [int(token) for sample in range(sum(windows)) for token in window(corpus, sample)]
    return tokens, {int(end) * (SEQ_LEN + 1) for end in np.cumsum(windows)[:-1]}


def documents_of(tokens: list[int], breaks: set[int], begin: int) -> list[int]:
    """The document of each of `tokens`, which are at `begin` of the stream, counted one by one."""
    ids = [0]
    for at, (before, _) in enumerate(pairwise(tokens), begin + 1):
        ids.append(ids[-1] + (before == EOS or at in breaks))
    return ids


@pytest.mark.parametrize(
    ("split", "seq_len"), [*(("train", n) for n in LENGTHS), *(("heldout", n) for n in LENGTHS[:-1])]
)
def test_sequences_are_the_text_cut_anew(make_stream, seq_len, split):
    """In the order on disk: every token once, up to less than a sequence at the end. Documents begin after EOS and
    where another part begins; no label crosses the latter, unless EOS ends the part."""
    windows, corpus = (WINDOWS, 0) if split == "train" else (HELDOUT, 1000)
    tokens, breaks = stream_of(windows, corpus)
    stream = make_stream(split=split, shuffle=False, seq_len=seq_len)
    assert stream.num_samples == len(tokens) // (seq_len + 1)
    crossed = 0
    for sample in range(stream.num_samples):
        (batch,) = stream.step(sample)
        begin = sample * (seq_len + 1)
        expected = tokens[begin : begin + seq_len + 1]
        assert batch.input_ids[0].tolist() == expected[:-1] and batch.sample_ids.tolist() == [sample]
        labels = [
            IGNORED if at in breaks and before != EOS else token
            for at, (before, token) in enumerate(pairwise(expected), begin + 1)
        ]
        assert batch.final_labels[0].tolist() == labels
        crossed += IGNORED in labels
        assert batch.document_ids[0].tolist() == documents_of(expected[:-1], breaks, begin)
    if split == "train" and seq_len > 1 and seq_len != SEQ_LEN:
        assert crossed, "no part ends inside of a sequence, so the breaks were not tested"


@pytest.mark.parametrize("seq_len", LENGTHS[:-1])
def test_windows_of_one_part_are_one_text(make_stream, one_part, seq_len):
    """Documents are complete across all its windows, and all labels count."""
    tokens, _ = stream_of([50], 4)
    stream = make_stream(path=one_part, shuffle=False, seq_len=seq_len)
    (batch,) = stream.step(stream.num_samples - 1)
    begin = (stream.num_samples - 1) * (seq_len + 1)
    assert batch.labels[0].tolist() == tokens[begin + 1 : begin + seq_len + 1]
    assert batch.document_ids[0].tolist() == documents_of(tokens[begin : begin + seq_len], set(), begin)


@pytest.mark.parametrize("seq_len", LENGTHS)
def test_every_epoch_has_every_sequence_once_in_another_order(make_stream, seq_len):
    """Also where sequences are longer than most shards."""
    stream = make_stream(seq_len=seq_len)
    n = stream.num_samples
    ids = stream.sample_ids(np.arange(3 * n)).reshape(3, n)
    assert all(Counter(epoch.tolist()) == Counter(range(n)) for epoch in ids)
    assert n < 9 or not (ids[0] == ids[1]).all()


def test_the_windows_own_length_has_the_order_of_earlier_versions(make_stream):
    """So that their runs resume: the order of shards of as many samples as they have windows."""
    stream, order = make_stream(seq_len=SEQ_LEN), SampleOrder(WINDOWS, 7)
    positions = np.arange(300)
    assert stream.sample_ids(positions).tolist() == order.samples(positions).tolist()


@pytest.mark.parametrize("seq_len", [8, 2 * SEQ_LEN])
def test_replicas_workers_and_seeking_do_not_change_a_step(make_stream, seq_len):
    whole = make_stream(seq_len=seq_len, global_batch=8, micro_batch=8)
    expected = [whole.step(step)[0] for step in range(5)]
    for workers in (0, 2):
        for replica in range(2):
            part = make_stream(
                seq_len=seq_len, global_batch=8, micro_batch=2, replica=replica, num_replicas=2, workers=workers
            )
            for step, batches in zip(range(3, 5), part.steps(3), strict=False):
                rows = slice(4 * replica, 4 * replica + 4)
                for field, parts in zip(expected[step], zip(*batches, strict=True), strict=True):
                    assert field[rows].tolist() == [row for part in parts for row in part.tolist()]


@pytest.mark.parametrize("seq_len", [4, SEQ_LEN, 5 * SEQ_LEN])
def test_corpora_of_a_mix_are_cut_each_by_itself(make_stream, folder, one_part, seq_len):
    mix = {str(folder): 1.0, str(one_part): 1.0}
    mixed = make_stream(path=mix, shuffle=False, seq_len=seq_len)
    alone = [make_stream(path=path, shuffle=False, seq_len=seq_len) for path in mix]
    seen = [0, 0]
    for step in range(2 * min(one.num_samples for one in alone)):
        (batch,) = mixed.step(step)
        corpus = int(batch.sample_ids[0] >= alone[0].num_samples)
        (expected,) = alone[corpus].step(seen[corpus])
        seen[corpus] += 1
        assert batch.input_ids.tolist() == expected.input_ids.tolist()
        assert batch.final_labels.tolist() == expected.final_labels.tolist()
    assert min(seen) > 1


def test_all_shards_of_a_sequence_are_known_in_advance(make_stream):
    """By the positions of its tokens: what a node downloads before a step needs it."""
    seq_len = 5 * SEQ_LEN
    stream = make_stream(seq_len=seq_len)
    ends = np.cumsum(WINDOWS) * (SEQ_LEN + 1)
    several = 0
    for step in range(stream.num_samples):
        positions = np.arange(step, step + 1)
        (sample,) = stream.sample_ids(positions).tolist()
        tokens = np.arange(sample * (seq_len + 1), (sample + 1) * (seq_len + 1))
        expected = sorted(set(np.searchsorted(ends, tokens, side="right").tolist()))
        shards = [shard.name for shard in stream.shards_of(positions, [0])]
        assert shards == [f"train/part-{part:05}/shard.00000.mds" for part in expected]
        several += len(expected) > 1
    assert several > 2


@pytest.mark.parametrize(
    ("seq_len", "message"),
    [
        (24, "train.seq_len=24 neither divides the shards' seq_len=16 nor is a multiple of it; set train.seq_len"),
        (17, "set train.seq_len to 16 or 32, or convert with --seq-len 17"),
        (5, "set train.seq_len to 4 or 8, or convert"),
        (9, "set train.seq_len to 8 or 16, or convert"),
        (47, "set train.seq_len to 32 or 48, or convert"),
        (144, "train.seq_len=144, but train/ has 134 windows of 16 tokens"),
    ],
)  # fmt: skip
def test_lengths_that_do_not_work_are_refused_with_the_nearest_that_do(folder, seq_len, message):
    windows = seq_len * 16 if "134 windows" in message else seq_len
    with pytest.raises(UserError) as error:
        open_corpora({str(folder): 1}, seq_len=windows, vocab_size=VOCAB_SIZE)
    (problem,) = error.value.problems
    assert message.replace("=144,", f"={windows},") in problem
    suggestions = [
        int(word.rstrip(",;"))
        for word in problem.partition("set train.seq_len to ")[2].split()
        if word.rstrip(",;").isdigit()
    ]
    open_corpora({str(folder): 1}, seq_len=suggestions[0], vocab_size=VOCAB_SIZE)


def test_the_longest_length_that_is_suggested_is_the_longest(folder):
    """One more window does not fit."""
    tokens = sum(WINDOWS) * (SEQ_LEN + 1)
    with pytest.raises(UserError) as error:
        open_corpora({str(folder): 1}, seq_len=1 << 20, vocab_size=VOCAB_SIZE)
    longest = int(str(error.value).partition("at most ")[2].partition(",")[0])
    assert longest % SEQ_LEN == 0 and longest + 1 <= tokens < longest + SEQ_LEN + 1
    (corpus,) = open_corpora({str(folder): 1}, seq_len=longest, vocab_size=VOCAB_SIZE)
    assert not with_windows([corpus], "heldout"), "the held-out text is shorter than one sequence"
    with pytest.raises(UserError, match=r"set train\.seq_len to at most"):
        open_corpora({str(folder): 1}, seq_len=longest + SEQ_LEN, vocab_size=VOCAB_SIZE)


def joined(parts: list, name: str) -> list:
    """A field of consecutive samples, one after the other along the sequence."""
    return np.concatenate([getattr(part, name).numpy() for part in parts], axis=-1).tolist()


@pytest.mark.parametrize("times", [2, 3])
def test_windows_of_conversations_are_joined_as_they_are(make_stream, conversations, times):
    """Inputs and labels are those of the windows side by side, and no conversation gets a document id of another."""
    make = partial(make_stream, path=conversations, shuffle=False, vocab_size=512)
    windows, stream = make(seq_len=32), make(seq_len=32 * times)
    assert stream.num_samples == windows.num_samples // times
    for sample in range(min(20, stream.num_samples)):
        (batch,) = stream.step(sample)
        parts = [windows.step(sample * times + i)[0] for i in range(times)]
        assert batch.input_ids.tolist() == joined(parts, "input_ids")
        assert batch.labels.tolist() == joined(parts, "labels")
        expected, offset = [], 0
        for part in parts:
            expected += (part.document_ids[0] + offset).tolist()
            offset = expected[-1] + 1
        assert batch.document_ids[0].tolist() == expected
    with pytest.raises(
        UserError, match=r"conversations in windows of 32 .* joined but not divided; set train\.seq_len to 32,"
    ):
        make(seq_len=16)
    with pytest.raises(UserError, match=r"set train\.seq_len to 32 or 64, or"):
        make(seq_len=48)


def test_windows_with_stored_labels_are_joined_as_they_are(make_stream, tmp_path):
    """Rows of labels, one for each loop, side by side."""
    manifest = make_depth_task(tmp_path / "task", hops=4, sequences=20, heldout=4, targets="per_loop")
    make = partial(make_stream, path=tmp_path / "task", shuffle=False, vocab_size=manifest.vocab_size)
    windows, stream = make(seq_len=5), make(seq_len=10)
    for sample in range(stream.num_samples):
        (batch,) = stream.step(sample)
        parts = [windows.step(2 * sample + i)[0] for i in range(2)]
        assert batch.labels.shape == (1, 4, 10) and batch.labels.tolist() == joined(parts, "labels")
        assert batch.input_ids.tolist() == joined(parts, "input_ids")
        assert batch.document_ids[0].tolist() == [0] * 5 + [1] * 5
    with pytest.raises(UserError, match="stored labels in windows of 5 tokens, which are joined but not divided"):
        make(seq_len=1)
