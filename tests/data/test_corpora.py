"""What is wrong with folders, with their fit to the config and to each other is said before training, all at once."""

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

from mythos_dist.data.corpora import changes, fingerprint, open_corpora, with_windows
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


def open_(*folders, **settings):
    mix = folders[0] if isinstance(folders[0], dict) else {str(folder): 1 for folder in folders}
    return open_corpora(mix, **{"seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, **settings})


def refused(*folders, **settings) -> list[str]:
    with pytest.raises(UserError) as error:
        open_(*folders, **settings)
    return error.value.problems


def test_whole_folders_are_opened_with_their_shards_and_weights(folders):
    """Weights as the smallest whole numbers; the tokenizer of the user's own may be any file with the same bytes."""
    a, b, c = open_({str(folders[0]): 0.5, str(folders[1]): 0.3, str(folders[2]): 0.2})
    assert [a.weight, b.weight, c.weight] == [5, 3, 2] and b.folder == folders[1]
    assert [shard.entry["samples"] for shard in a.shards["train"]] == [5, 8, 3]
    assert [shard.stored["basename"] for shard in b.shards["heldout"]] == [
        "part-00000/shard.00000.mds.zstd",
        "part-00001/shard.00000.mds.zstd",
    ]
    open_(folders[0], vocab_size=VOCAB_SIZE + 24, tokenizer_path=folders[1] / "tokenizer.model")


def test_settings_that_do_not_fit_the_shards_are_reported_together(folders, tmp_path):
    (tmp_path / "mine.model").write_bytes(b"another")
    problems = refused(folders[0], seq_len=32, vocab_size=500, tokenizer_path=tmp_path / "mine.model")
    expected = [
        f"these shards were made with another tokenizer than {tmp_path / 'mine.model'}",
        f"train.seq_len=32, but these shards hold windows of seq_len={SEQ_LEN}; set train.seq_len to {SEQ_LEN}",
        f"model.vocab_size=500 is smaller than the tokenizer of these shards, which has {VOCAB_SIZE} pieces; "
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
            r"1 shard file is missing in train/, the first is train/part-00001/shard.00000.mds; copy them",
        ),
        (lambda at: shutil.rmtree(at / "train/part-00002"), r"1 shard file is missing in train/, .*part-00002"),
        (
            lambda at: os.truncate(shard_files(at)[2], 10),
            r"1 shard file in train/ has another size than index.json says, the first is "
            r"train/part-00002/shard.00000.mds with 10 bytes instead of \d+; copy",
        ),
        (
            lambda at: (at / "tokenizer.model").open("ab").write(b" "),
            "another tokenizer than .*tokenizer.mod",
        ),
        (lambda at: (at / "tokenizer.model").unlink(), "no tokenizer at"),
        (miscount_windows, "train/index.json lists 16 windows, but the manifest says 17; convert again"),
        (change_index(raw_data={"basename": "../../x.mds", "bytes": 9, "hashes": {}}), "lists no shards .*x.mds"),
    ],
)
def test_a_damaged_folder_is_refused(folders, tmp_path, damage, message):
    folder = copy(folders[0], tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_(folder)
    assert str(folder) in str(error.value)


def test_shards_may_be_links(folders, tmp_path):
    """As in a cache of downloads; a link to nothing is a missing file."""
    folder = copy(folders[0], tmp_path / "copy")
    first, second, _ = shard_files(folder)
    for file in (first, second):
        file.rename(tmp_path / f"{file.parent.name}.blob")
        file.symlink_to(tmp_path / f"{file.parent.name}.blob")
    open_(folder)
    (tmp_path / "part-00001.blob").unlink()
    (problem,) = refused(folder)
    assert problem.startswith("1 shard file is missing in train/, the first is train/part-00001/")


def test_a_held_out_split_may_be_empty_or_not_there_but_not_lost(tmp_path):
    """A mix takes held-out windows from the folders that have some. A folder whose manifest promises held-out windows
    and has no heldout/ is refused where these are to be read; training text has to be there always."""
    empty = write_folder(tmp_path / "empty", [5], [])
    (empty / "heldout" / "index.json").write_text(json.dumps({"shards": [], "version": 2}))  # as the converter's
    write_manifest(empty, fingerprint=index_fingerprint(empty))
    (corpus,) = open_(empty)
    shutil.rmtree(empty / "heldout")
    assert open_(empty) == [corpus] and not with_windows([corpus], "heldout")
    full = write_folder(tmp_path / "full", [5], [3], corpus=1)
    both = open_(empty, full)
    assert [one.folder for one in with_windows(both, "heldout")] == [full]
    with pytest.raises(UserError, match="there is no held-out split"):
        ReplicaStream([corpus], "heldout", **STREAM)
    stream = ReplicaStream(both, "heldout", shuffle=False, **STREAM)
    assert stream.num_samples == 3
    np.testing.assert_array_equal(stream.step(2)[0].input_ids[0].numpy(), window(1001, 2)[:-1])
    with_training_only = fingerprint(open_(full, splits=["train"]))
    shutil.rmtree(full / "heldout")
    assert [problem.split(",")[0] for problem in refused(full)] == ["heldout/ is missing"]
    assert fingerprint(open_(full, splits=["train"])) == with_training_only
    assert refused(write_folder(tmp_path / "none", [], [3])) == [
        "train/ has 0 windows; convert more text, or with a smaller share of held-out text"
    ]


def test_all_problems_of_all_folders_are_reported_with_their_names(folders, tmp_path):
    """The first is missing, the second damaged twice, the third right."""
    damaged = copy(folders[1], tmp_path / "damaged")
    os.truncate(shard_files(damaged)[0], 3)
    shard_files(damaged, "heldout")[0].unlink()
    problems = refused(tmp_path / "nowhere", damaged, folders[2])
    assert [problem.split(": ")[0] for problem in problems] == [str(tmp_path / "nowhere"), str(damaged), str(damaged)]
    for problem, words in zip(problems, ["no such folder", "another size", "missing in heldout/"], strict=True):
        assert words in problem


def test_corpora_that_do_not_go_together_are_named_with_both_values(folders, tmp_path):
    other = write_folder(tmp_path / "other", [4], corpus=3, seq_len=8, eos=2, tokenizer=b"another")
    problems = refused(folders[0], folders[1], other)
    pairs = [("seq_len", 8, SEQ_LEN), ("eos_id", 2, 1)]
    pairs.append(
        ("tokenizer_sha256", *(read_shard_manifest(folder).tokenizer_sha256 for folder in (other, folders[0])))
    )
    for key, here, there in pairs:
        (problem,) = [problem for problem in problems if f" {key}=" in problem and "but these shards" not in problem]
        assert problem.startswith(f"{other}: {key}={here}, but {folders[0]} has {there}; ")
    assert len(problems) == 4  # and train.seq_len does not fit the third


def test_the_same_shards_twice_are_refused(folders, tmp_path):
    again = copy(folders[0], tmp_path / "again")
    assert refused(folders[0], folders[1], again) == [
        f"{again}: holds the same shards as {folders[0]}; give one of them, with the sum of their weights"
    ]


def test_the_fingerprint_covers_shards_weights_and_order(folders):
    """One corpus has its manifest's own, whatever its weight; equal ratios are equal."""
    a, b = (str(folder) for folder in folders[:2])
    alone = read_shard_manifest(a).fingerprint
    assert fingerprint(open_({a: 1})) == fingerprint(open_({a: 0.3})) == alone
    assert fingerprint(open_({a: 0.7, b: 0.3})) == fingerprint(open_({a: 7, b: 3}))
    mixes = [{a: 1}, {b: 1}, {a: 1, b: 1}, {a: 2, b: 1}, {b: 1, a: 2}]
    assert len({fingerprint(open_(mix)) for mix in mixes}) == len(mixes)


def test_what_changed_since_the_run_began_is_named(folders, tmp_path):
    """Folders may move; shards, weights and their order may not change."""
    a, b, c = (str(folder) for folder in folders)
    before = fingerprint(open_({a: 0.7, b: 0.3}))
    moved = str(copy(folders[0], tmp_path / "moved"))
    assert changes(open_({moved: 7, b: 3}), before) == []
    assert changes(open_({a: 0.6, b: 0.4}), before) == [
        f"{a} has weight 3 of 5, but the run was trained with 7 of 10",
        f"{b} has weight 2 of 5, but the run was trained with 3 of 10",
    ]
    old = read_shard_manifest(b).fingerprint[:12]
    assert changes(open_({a: 0.7, c: 0.3}), before) == [
        f"{c} holds other shards than those that the run was trained on",
        f"the shards of fingerprint {old}…, with weight 3 of 10, are not given any more",
    ]
    assert changes(open_({a: 1}), before) == [
        f"the shards of fingerprint {old}…, with weight 3 of 10, are not given any more"
    ]
    assert changes(open_({b: 3, a: 7}), before) == [
        f"the folders of data.mix stand in another order than the run was trained with: {a}, {b}"
    ]
    alone = fingerprint(open_({a: 1}))
    assert changes(open_({a: 1}), alone) == []
    (added,) = changes(open_({a: 1, b: 1}), alone)
    assert added == f"{b} holds other shards than those that the run was trained on"


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
    with pytest.raises(UserError, match=r"train/index.json lists no shards \("):
        open_(folder)
    assert any("train/index.json" in problem for problem in verify(folder).problems)


HOSTILE_MANIFESTS = [
    ({"seq_len": "16"}, "seq_len: expected a whole number, not '16'"),
    ({"seq_len": True}, "seq_len: expected a whole number, not True"),
    ({"seq_len": 0}, "seq_len=0"),
    ({"vocab_size": 10**30}, "vocab_size=1000"),
    ({"eos_id": -1}, "eos_id=-1"),
    ({"targets": -1}, "targets=-1"),
    ({"tokenizer": "../../etc/passwd"}, "tokenizer='../../etc/passwd', which is no name of a file in the folder"),
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
        open_(folder)
    assert message in str(error.value) and "manifest.json" in str(error.value)
    assert not verify(folder).ok
    for content in (DEEP, b"\xff", b"7", b'{"format_version": ' + b"1" * 5001 + b"}"):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=r"manifest.json: (cannot be read|format_version)"):
            open_(folder)
