"""All problems of the folders, their fit to the config and to each other are reported at once, before training."""

import json
import os
import shutil

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

from mythos_dist.data.corpora import Corpus, data_changes, fingerprint, open_corpora, with_windows
from mythos_dist.data.manifest import index_fingerprint, read_shard_manifest
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.errors import UserError
from mythos_dist.prepare.verify import verify

STREAM = {
    "seq_len": SEQ_LEN,
    "vocab_size": VOCAB_SIZE,
    "global_batch": 1,
    "micro_batch": 1,
    "replica": 0,
    "num_replicas": 1,
    "seed": 0,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three corpora; the second is compressed."""
    root = tmp_path_factory.mktemp("corpora")
    return [
        write_folder(root / "a", [5, 8, 3], [4]),
        write_folder(root / "b", [6, 6], [2, 2], corpus=1, compression="zstd:3"),
        write_folder(root / "c", [9], [5], corpus=2),
    ]


def open_folders(*folders, **settings):
    mix = folders[0] if isinstance(folders[0], dict) else {str(folder): 1 for folder in folders}
    return open_corpora(mix, **{"seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, **settings})


def problems_of(*folders, **settings) -> list[str]:
    with pytest.raises(UserError) as error:
        open_folders(*folders, **settings)
    return error.value.problems


def test_folders_open_with_their_shards_and_weights(folders):
    """Weights are the smallest integers; data.tokenizer may be any file with the same bytes."""
    a, b, c = open_folders({str(folders[0]): 0.5, str(folders[1]): 0.3, str(folders[2]): 0.2})
    assert [a.weight, b.weight, c.weight] == [5, 3, 2] and b.folder == folders[1]
    assert [shard.entry["samples"] for shard in a.shards["train"]] == [5, 8, 3]
    assert [shard.stored["basename"] for shard in b.shards["heldout"]] == [
        "part-00000/shard.00000.mds.zstd",
        "part-00001/shard.00000.mds.zstd",
    ]
    open_folders(folders[0], vocab_size=VOCAB_SIZE + 24, tokenizer_path=folders[1] / "tokenizer.model")


def test_settings_that_do_not_fit_the_shards_are_reported_together(folders, tmp_path):
    (tmp_path / "mine.model").write_bytes(b"another")
    problems = problems_of(folders[0], seq_len=24, vocab_size=500, tokenizer_path=tmp_path / "mine.model")
    expected = [
        f"the shards were converted with another tokenizer than {tmp_path / 'mine.model'}",
        f"train.seq_len=24 neither divides the shards' seq_len={SEQ_LEN} nor is a multiple of it; set train.seq_len to",
        f"model.vocab_size=500 is smaller than the vocabulary of the shards' tokenizer, {VOCAB_SIZE}; "
        f"set model.vocab_size to {VOCAB_SIZE} or more",
    ]
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))


def miscount_windows(folder):
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["windows"] += 1
    write_manifest(folder, splits=splits)


def change_index(**fields):
    return lambda at: rewrite_index(at, "train", lambda entries: entries[1].update(fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda at: (at / "manifest.json").unlink(), "not a finished conversion"),
        (lambda at: write_manifest(at, format_version=1), "format_version=1 is not 2: another version"),
        (lambda at: (at / "train/index.json").open("a").write(" "), "the shards changed after the conversion"),
        (lambda at: (at / "heldout/index.json").unlink(), "heldout/index.json cannot be read"),
        (
            lambda at: shard_files(at)[1].unlink(),
            r"1 shard file is missing in train/ \(first: train/part-00001/shard.00000.mds\); copy them",
        ),
        (lambda at: shutil.rmtree(at / "train/part-00002"), r"1 shard file is missing in train/ .*part-00002"),
        (
            lambda at: os.truncate(shard_files(at)[2], 10),
            r"1 shard file in train/ differs in size from index.json "
            r"\(first: train/part-00002/shard.00000.mds has 10 bytes instead of \d+\); copy",
        ),
        (
            lambda at: (at / "tokenizer.model").open("ab").write(b" "),
            "another tokenizer than .*tokenizer.mod",
        ),
        (lambda at: (at / "tokenizer.model").unlink(), "no tokenizer at"),
        (miscount_windows, "train/index.json lists 16 windows, but manifest.json says 17; convert again"),
        (
            change_index(raw_data={"basename": "../../x.mds", "bytes": 9, "hashes": {}}),
            "is not a list of shards .*x.mds",
        ),
    ],
)
def test_a_damaged_folder_is_refused(folders, tmp_path, damage, message):
    folder = copy(folders[0], tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_folders(folder)
    assert str(folder) in str(error.value)


def test_shards_may_be_symbolic_links(folders, tmp_path):
    """As in a download cache; a dangling link is a missing file."""
    folder = copy(folders[0], tmp_path / "copy")
    first, second, _ = shard_files(folder)
    for file in (first, second):
        file.rename(tmp_path / f"{file.parent.name}.blob")
        file.symlink_to(tmp_path / f"{file.parent.name}.blob")
    open_folders(folder)
    (tmp_path / "part-00001.blob").unlink()
    (problem,) = problems_of(folder)
    assert problem.startswith("1 shard file is missing in train/ (first: train/part-00001/")


def test_a_held_out_split_may_be_empty_or_absent_unless_the_manifest_lists_it(tmp_path):
    """A mix takes held-out windows from the folders that have some. A folder whose manifest lists held-out windows but
    that has no heldout/ is refused if they will be read; training text is always required."""
    empty = write_folder(tmp_path / "empty", [5], [])
    (empty / "heldout" / "index.json").write_text(json.dumps({"shards": [], "version": 2}))  # as the converter's
    write_manifest(empty, fingerprint=index_fingerprint(empty))
    (corpus,) = open_folders(empty)
    shutil.rmtree(empty / "heldout")
    assert open_folders(empty) == [corpus] and not with_windows([corpus], "heldout")
    full = write_folder(tmp_path / "full", [5], [3], corpus=1)
    corpora = open_folders(empty, full)
    assert [one.folder for one in with_windows(corpora, "heldout")] == [full]
    with pytest.raises(UserError, match="there is no held-out split"):
        ReplicaStream([corpus], "heldout", **STREAM)
    stream = ReplicaStream(corpora, "heldout", shuffle=False, **STREAM)
    assert stream.num_samples == 3
    np.testing.assert_array_equal(stream.step(2)[0].input_ids[0].numpy(), window(1001, 2)[:-1])
    with_training_only = fingerprint(open_folders(full, splits=["train"]))
    shutil.rmtree(full / "heldout")
    assert [problem.split(",")[0] for problem in problems_of(full)] == ["heldout/ is missing"]
    assert fingerprint(open_folders(full, splits=["train"])) == with_training_only
    assert problems_of(write_folder(tmp_path / "none", [], [3])) == [
        "train/ has 0 windows; convert more text, or with a smaller --heldout"
    ]


def test_all_problems_of_all_folders_are_reported_with_the_folders_names(folders, tmp_path):
    """The first is missing, the second is damaged twice, the third is fine."""
    damaged = copy(folders[1], tmp_path / "damaged")
    os.truncate(shard_files(damaged)[0], 3)
    shard_files(damaged, "heldout")[0].unlink()
    problems = problems_of(tmp_path / "nowhere", damaged, folders[2])
    assert [problem.split(": ")[0] for problem in problems] == [str(tmp_path / "nowhere"), str(damaged), str(damaged)]
    for problem, message in zip(problems, ["no such folder", "differs in size", "missing in heldout/"], strict=True):
        assert message in problem


def test_corpora_that_cannot_be_mixed_are_reported_with_both_values(folders, tmp_path):
    other = write_folder(tmp_path / "other", [4], corpus=3, seq_len=8, eos=2, tokenizer=b"another")
    problems = problems_of(folders[0], folders[1], other)
    pairs = [("seq_len", 8, SEQ_LEN), ("eos_id", 2, 1)]
    pairs.append(
        ("tokenizer_sha256", *(read_shard_manifest(folder).tokenizer_sha256 for folder in (other, folders[0])))
    )
    for key, here, there in pairs:
        (problem,) = [problem for problem in problems if f" {key}=" in problem and "but the shards" not in problem]
        assert problem.startswith(f"{other}: {key}={here}, but {folders[0]} has {there}; ")
    assert len(problems) == 3


def test_the_same_shards_twice_in_a_mix_are_refused(folders, tmp_path):
    again = copy(folders[0], tmp_path / "again")
    assert problems_of(folders[0], folders[1], again) == [
        f"{again}: has the same shards as {folders[0]}; keep one of them, with the sum of their weights"
    ]


def test_the_fingerprint_depends_on_shards_weights_and_order(folders):
    """One corpus has the fingerprint of its manifest, whatever its weight; only the ratio of weights matters."""
    a, b = (str(folder) for folder in folders[:2])
    alone = read_shard_manifest(a).fingerprint
    assert fingerprint(open_folders({a: 1})) == fingerprint(open_folders({a: 0.3})) == alone
    assert fingerprint(open_folders({a: 0.7, b: 0.3})) == fingerprint(open_folders({a: 7, b: 3}))
    mixes = [{a: 1}, {b: 1}, {a: 1, b: 1}, {a: 2, b: 1}, {b: 1, a: 2}]
    assert len({fingerprint(open_folders(mix)) for mix in mixes}) == len(mixes)


def test_what_changed_since_the_run_started_is_reported(folders, tmp_path):
    """Folders may move; shards, weights and their order may not change."""
    a, b, c = (str(folder) for folder in folders)
    before = fingerprint(open_folders({a: 0.7, b: 0.3}))
    moved = str(copy(folders[0], tmp_path / "moved"))
    assert data_changes(open_folders({moved: 7, b: 3}), before) == []
    assert data_changes(open_folders({a: 0.6, b: 0.4}), before) == [
        f"{a} has weight 3 of 5, but the run was trained with 7 of 10",
        f"{b} has weight 2 of 5, but the run was trained with 3 of 10",
    ]
    old = read_shard_manifest(b).fingerprint[:12]
    assert data_changes(open_folders({a: 0.7, c: 0.3}), before) == [
        f"{c} has other shards than those that the run was trained on",
        f"the shards with fingerprint {old}…, weight 3 of 10, are no longer in the mix",
    ]
    assert data_changes(open_folders({a: 1}), before) == [
        f"the shards with fingerprint {old}…, weight 3 of 10, are no longer in the mix"
    ]
    assert data_changes(open_folders({b: 3, a: 7}), before) == [
        f"the folders of data.mix are in another order; the run was trained with: {a}, {b}"
    ]

    def changing(end: dict, *change: int) -> list[Corpus]:
        return open_folders({a: 0.7, b: 0.3}, mix_end=end, change=change)

    assert data_changes(changing({a: 1, b: 1}, 5, 9), fingerprint(changing({b: 2, a: 2}, 5, 9))) == []
    for other in (changing({a: 1, b: 2}, 5, 9), changing({a: 1, b: 1}, 5, 8), open_folders({a: 0.7, b: 0.3})):
        (problem,) = data_changes(changing({a: 1, b: 1}, 5, 9), fingerprint(other))
        assert "is 5-9: 1, 1, but the run was trained with " in problem
    assert data_changes(open_folders({a: 0.7, b: 0.3}), fingerprint(changing({a: 1, b: 1}, 5, 9)))
    alone = fingerprint(open_folders({a: 1}))
    assert data_changes(open_folders({a: 1}), alone) == []
    (added,) = data_changes(open_folders({a: 1, b: 1}), alone)
    assert added == f"{b} has other shards than those that the run was trained on"


DEEP = b'{"shards": ' + b"[" * 100_000
HOSTILE_INDEXES = [
    DEEP,
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"shards": {}}',
    b'{"shards": [null]}',
    b'{"shards": "text"}',
    b'{"shards": [[]]}',
]
HOSTILE_ENTRIES = [
    {"samples": None},
    {"samples": 1.5},
    {"samples": True},
    {"samples": -1},
    {"samples": 10**30},
    {"raw_data": []},
    {"raw_data": {"basename": 7, "bytes": 9, "hashes": {}}},
    {"raw_data": {"basename": "", "bytes": 9, "hashes": {}}},
    {"raw_data": {"basename": "a\0b", "bytes": 9, "hashes": {}}},
    {"raw_data": {"basename": "a/../../x", "bytes": 9, "hashes": {}}},
    {"raw_data": {"basename": "x", "bytes": "9", "hashes": {}}},
    {"raw_data": {"basename": "x", "bytes": -9, "hashes": {}}},
    {"raw_data": {"basename": "x", "bytes": 9, "hashes": None}},
    {"raw_data": {"basename": "x", "bytes": 9, "hashes": {"sha1": 7}}},
    {"zip_data": {"basename": "/x", "bytes": 9, "hashes": {}}},
    {"zip_data": "x"},
]


@pytest.mark.parametrize("content", [*HOSTILE_INDEXES, *HOSTILE_ENTRIES], ids=range(24))
def test_an_index_of_any_content_is_refused_without_a_traceback(folders, tmp_path, content):
    folder = copy(folders[0], tmp_path / "copy")
    if isinstance(content, bytes):
        (folder / "train/index.json").write_bytes(content)
        write_manifest(folder, fingerprint=index_fingerprint(folder))
    else:
        change_index(**content)(folder)
    with pytest.raises(UserError, match=r"train/index.json is not a list of shards \("):
        open_folders(folder)
    assert any("train/index.json" in problem for problem in verify(folder).problems)


HOSTILE_MANIFESTS = [
    ({"seq_len": "16"}, "seq_len: expected a whole number, not '16'"),
    ({"seq_len": True}, "seq_len: expected a whole number, not True"),
    ({"seq_len": 0}, "seq_len=0"),
    ({"vocab_size": 10**30}, "vocab_size=1000"),
    ({"eos_id": -1}, "eos_id=-1"),
    ({"targets": -1}, "targets=-1"),
    ({"tokenizer": "../../etc/passwd"}, "tokenizer='../../etc/passwd', which is not a file name"),
    ({"tokenizer": "/etc/passwd"}, "tokenizer='/etc/passwd'"),
    ({"tokenizer": ""}, "tokenizer=''"),
    ({"inputs": [{"name": 7, "size": 1, "hash": ""}]}, "inputs.0.name: expected text, not 7"),
    ({"inputs": "many"}, "inputs: "),
    ({"filters": []}, "filters: "),
    ({"documents": {"read": 10**30}}, "read=1000"),
    ({"splits": {}}, "splits: expected train and heldout, not none"),
    ({"splits": {"train": 7}}, "splits.train: "),
    ({"fingerprint": None}, "fingerprint: expected text"),
    ({"format_version": {}}, "format_version={} is not 2"),
    ({"eos": [[[]]]}, "eos: expected text"),
]


@pytest.mark.parametrize("changes, message", HOSTILE_MANIFESTS, ids=range(len(HOSTILE_MANIFESTS)))
def test_a_manifest_of_any_content_is_refused_without_a_traceback(folders, tmp_path, changes, message):
    folder = copy(folders[0], tmp_path / "copy")
    write_manifest(folder, **changes)
    with pytest.raises(UserError) as error:
        open_folders(folder)
    assert message in str(error.value) and "manifest.json" in str(error.value)
    assert not verify(folder).ok
    for content in (DEEP, b"\xff", b"7", b'{"format_version": ' + b"1" * 5001 + b"}"):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=r"manifest.json: (cannot be read|format_version)"):
            open_folders(folder)
