"""Malicious manifests and tensor files: their hashes are right, their content is false."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from helpers.small_checkpoint import names

from mythos_dist.checkpoint.manifest import VersionError, read_checkpoint_manifest
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import config_of, find_checkpoint, open_checkpoint
from mythos_dist.checkpoint.tensor_file import TensorFile
from mythos_dist.errors import UserError


def folder_of(run, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def write(folder: Path, text: str) -> None:
    """Write a manifest with a matching hash."""
    seal = json.dumps({"xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())})
    (folder / "checkpoint.json").write_text(f"{seal}\n{text}\n")


def raw_of(folder: Path) -> dict:
    return json.loads((folder / "checkpoint.json").read_text().split("\n")[1])


def change(raw: dict, where: str, value: object) -> str:
    """The manifest's text with the value at a path of keys replaced."""
    *path, last = where.split("/")
    inner = raw
    for key in path:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    if isinstance(inner, list):
        inner[int(last)] = value
    else:
        inner[last] = value
    return json.dumps(raw)


FILE = "rank-00000.safetensors"
PIECE = f"files/{FILE}/pieces/w"
BAD = [
    ("step", (-1, True, 2.0, "2", None, [2], 10**30, 4)),
    ("tokens", (-1, 1.5)),
    ("start", (-1, 10**12)),
    ("data", (None, 5)),
    ("layout", (None, [], {"x": [[[[[[[[[[1]]]]]]]]]]})),
    ("config", ([], {"model": []}, {"model": {"a": [[[[[[[[[1]]]]]]]]]}})),
    ("versions", ([], {"torch": 2})),
    ("optimizer", ([], {}, {"steps": 1})),
    ("optimizer/steps", (-1, True, "1", float("nan"))),
    ("optimizer/loss_scale", ([], {"__class__": 1}, {"cur_scale": "1"}, {"cur_scale": 1e999})),
    ("optimizer/recent_grad_norms", (5, ["1"], [float("nan")], [float("inf")])),
    ("optimizer/extra", (1,)),
    ("extra", (1,)),
    ("tensors/w/shape", ([5, -12], [True, 60], [5.0, 12], [0, 12], [1] * 60, "60", [10**30])),
    ("tensors/w/shape", ([1 << 40, 1 << 40], [5, 13], [60], [])),
    ("tensors/w/kinds", ([], ["parameter"] * 2, ["code"], ["buffer", "parameter"], "parameter")),
    ("tensors/a b", ({"shape": [1], "kinds": ["parameter"]},)),
    ("tensors/v", ({"shape": [1 << 20, 1 << 20], "kinds": ["parameter"]},)),
    (f"{PIECE}/shape", ([5, 13], [60], [1 << 40, 1 << 40], [5, -12])),
    (f"{PIECE}/start", ([0, 1], [0], [-1, 0], [0, 10**30], [False, 0])),
    (f"{PIECE}/first", (-1, 1, 60, 61, 0.0)),
    (f"{PIECE}/last", (0, 59, 61, 10**18)),
    (f"files/{FILE}/pieces/v", ({"shape": [1], "start": [0], "first": 0, "last": 1},)),
    (f"files/{FILE}/bytes", (-1, 0, 719, "900", True)),
    (f"files/{FILE}/hash", ("", "0" * 31, "z" * 32, 5, "0" * 31 + "\n")),
    (f"files/{FILE}/sha256", ("0" * 64,)),
]


@pytest.mark.parametrize(("where", "values"), BAD, ids=[f"{i}-{where}" for i, (where, _) in enumerate(BAD)])
def test_a_manifest_with_an_invalid_value_is_damaged_and_the_previous_checkpoint_is_loaded(run, where, values):
    """In less than 2 s of CPU time."""
    run.save(2)
    run.save(6)
    folder = folder_of(run, 6)
    good = (folder / "checkpoint.json").read_text().split("\n")[1]
    for value in values:
        write(folder, change(json.loads(good), where, value))
        begin = time.process_time()
        checkpoint, damaged = find_checkpoint(run.checkpoints)
        assert time.process_time() - begin < 2
        assert checkpoint and checkpoint.manifest.step == 2 and len(damaged) == 1, value
        with pytest.raises(UserError, match=r"checkpoint\.json: is damaged") as problem:
            read_checkpoint_manifest(folder)
        assert len(str(problem.value)) < 2000


FILE_NAMES = """
/etc/passwd ../step-00000002/rank-00000.safetensors .. a/b x.safetensors .safetensors rank-00000.pt rank-0.safetensors
""".split()


@pytest.mark.parametrize("name", [*FILE_NAMES, "", "rank-00000.safetensors\n", "rank-0000\u0660.safetensors"])
def test_file_names_outside_the_checkpoint_are_refused(run, name):
    run.save(2)
    folder = folder_of(run, 2)
    raw = raw_of(folder)
    raw["files"][name] = raw["files"].pop(FILE)
    write(folder, json.dumps(raw))
    with pytest.raises(UserError, match="is not a valid name of a checkpoint's file"):
        read_checkpoint_manifest(folder)


def test_all_problems_are_reported_at_once(run):
    run.save(2)
    folder = folder_of(run, 2)
    raw = raw_of(folder)
    raw["step"], raw["tokens"], raw["tensors"]["w"]["shape"] = -1, "x", [5, True]
    write(folder, json.dumps(raw))
    with pytest.raises(UserError) as problem:
        read_checkpoint_manifest(folder)
    for text in ("step=-1", "tokens='x'", "tensors.w.shape.1=True"):
        assert text in str(problem.value)


def test_overlapping_pieces_do_not_hide_a_missing_one(run):
    """One column twice, one not at all: the element count is right, but a column would be uninitialized memory."""
    run.save(2)
    folder = folder_of(run, 2)
    raw = raw_of(folder)
    file = raw["files"][FILE]
    for name, pieces in (("rank-00000", [(0, 7)]), ("rank-00001", [(6, 4)]), ("rank-00002", [(11, 1)])):
        ((start, width),) = pieces
        piece = {"shape": [5, width], "start": [0, start], "first": 0, "last": 5 * width}
        raw["files"][f"{name}.safetensors"] = {**file, "pieces": {"w": piece}}
    write(folder, json.dumps(raw))
    with pytest.raises(UserError, match="its pieces overlap"):
        read_checkpoint_manifest(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 900 + "]" * 900,
        '{"step": 1, "step": 2}',
        "9" * 5000,
        "null",
        "[]",
        '"x"',
        "",
        "{",
    ],
    ids=lambda text: text[:12],
)
def test_any_other_json_is_damage_or_another_version(run, text):
    run.save(2)
    folder = folder_of(run, 2)
    write(folder, text)
    with pytest.raises(UserError) as problem:
        read_checkpoint_manifest(folder)
    assert "is damaged" in str(problem.value) or isinstance(problem.value, VersionError)
    (folder / "checkpoint.json").write_text(f"{text}\n{text}\n")
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint_manifest(folder)


def test_a_manifest_that_is_not_a_regular_file_or_too_large_is_not_read(run, tmp_path):
    run.save(2)
    file = folder_of(run, 2) / "checkpoint.json"
    with open(file, "r+b") as stream:
        stream.truncate(1 << 40)  # sparse
    for create, message in (
        (None, "at most"),
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file|director"),
    ):
        if create:
            file.unlink()
            create(file)
        begin = time.process_time()
        with pytest.raises(UserError, match=message):
            read_checkpoint_manifest(file.parent)
        assert time.process_time() - begin < 2


@pytest.mark.parametrize("version", [3, 0, 10**60, "1", 1.0, True, None, [1], "absent"])
def test_another_format_version_is_refused_and_never_overwritten(run, version):
    """As the newest, or later than the one that `latest` names: training would overwrite it when it gets there."""
    run.save(2)
    run.save(6)
    folder = folder_of(run, 6)
    raw = raw_of(folder)
    if version == "absent":
        del raw["format_version"]
    else:
        raw["format_version"] = version
    write(folder, json.dumps(raw))
    before = (folder / "checkpoint.json").read_bytes()
    for latest in ("step-00000006", "step-00000002"):
        (run.checkpoints / "latest").write_text(latest)
        with pytest.raises(UserError, match=r"reads format_version=1 and 2") as problem:
            find_checkpoint(run.checkpoints)
        assert problem.value.exit_code == 2 and str(folder) in str(problem.value)
        if version == 3:
            assert "has format_version=3, but" in str(problem.value) and "newer" in str(problem.value)
        assert len(str(problem.value)) < 600
    with pytest.raises(VersionError):
        open_checkpoint(folder)
    assert run.save(6, start=2)  # saving does not rely on the check at the start
    assert (run.checkpoints / "step-00000006.kept" / "checkpoint.json").read_bytes() == before


def test_a_newer_format_with_another_hash_is_not_damage(run):
    run.save(2)
    file = folder_of(run, 2) / "checkpoint.json"
    for content in (
        '{"blake3": "00"}\n{"format_version": 3}\n',
        '{"format_version": 3}',
        '{"x":1}\n{"format_version":7,\n"y":1}',
    ):
        file.write_text(content)
        with pytest.raises(VersionError):
            read_checkpoint_manifest(file.parent)


def header(entries: object, data: int = 240, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(shape: object = (60,), offsets: object = (0, 240), dtype: object = "F32", **more: object) -> dict:
    return {"parameter/w": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


HEADERS = {
    "giant length": header(entry(), length=1 << 60),
    "longer than the file": header(entry(), length=10_000),
    "deep": header(b"[" * 100_000),
    "duplicate name": header(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}', 0),
    "not an object": header([1, 2]),
    "not an entry": header({"parameter/w": 5}),
    "dtype": header(entry(dtype="I32")),
    "half": header(entry(dtype="F16")),
    "offsets after the end": header(entry(offsets=(1 << 40, (1 << 40) + 240))),
    "negative": header(entry(offsets=(-8, 232))),
    "backwards": header(entry(offsets=(240, 0))),
    "a bool": header(entry(shape=[True, 60])),
    "float": header(entry(shape=[60.0])),
    "shape too large": header(entry(shape=[61])),
    "shape far too large": header(entry(shape=[1 << 50, 1 << 50])),
    "overlap": header(entry() | {"exp_avg/w": entry()["parameter/w"]}),
    "gap": header(entry(offsets=(8, 248)), 248),
    "trailing bytes": header(entry(), 300),
    "too short": header(entry(), 100),
    "unknown field": header(entry(extra=1)),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_a_tensor_file_with_an_invalid_header_is_damaged_although_its_hash_matches(run, content):
    run.save(2)
    run.save(4)
    folder = folder_of(run, 4)
    raw = raw_of(folder)
    (folder / FILE).write_bytes(content)
    with pytest.raises(ValueError):
        TensorFile(folder / FILE)
    raw["tensors"]["w"]["kinds"] = ["parameter"]
    raw["files"][FILE] |= {"bytes": len(content), "hash": xxhash.xxh3_128_hexdigest(content)}
    write(folder, json.dumps(raw))
    checkpoint, damaged = find_checkpoint(run.checkpoints)
    assert checkpoint and checkpoint.manifest.step == 2 and len(damaged) == 1 and "damaged" in damaged[0]
    with pytest.raises(UserError):  # also without a check beforehand
        Checkpoint(folder).full_tensor("parameter", "w")


def test_links_to_files_are_followed_and_their_targets_are_never_removed(run, tmp_path):
    """Some stores keep files elsewhere and link to them. A link to a named pipe or a device does not block."""
    for step in (2, 4):
        run.save(step)
    folder = folder_of(run, 4)
    target_file = tmp_path / "store"
    (folder / FILE).rename(target_file)
    (folder / FILE).symlink_to(target_file)
    checkpoint, damaged = find_checkpoint(run.checkpoints)
    assert checkpoint and checkpoint.manifest.step == 4 and not damaged
    run.save(6, start=2, keep=1)
    assert names(run.checkpoints) == ["latest", "step-00000006"] and target_file.exists()
    for target in ("/dev/zero", tmp_path / "pipe"):
        if target != "/dev/zero":
            os.mkfifo(target)
        file = folder_of(run, 6) / FILE
        file.unlink(missing_ok=True)
        file.symlink_to(target)
        with pytest.raises(UserError, match="is not a regular file"):
            find_checkpoint(run.checkpoints)


def test_settings_in_a_manifest_are_checked_before_a_model_is_built(run):
    run.save(2)
    folder = folder_of(run, 2)
    bad = [
        ("dim", "many"),
        ("dim", -1),
        ("n_experts_per_tok", 1000),
        ("mode", "zzz"),
        ("attn_type", []),
        ("unknown", 1),
    ]
    for key, value in bad:
        model = {key: value}
        write(folder, change(raw_of(folder), "config/model", model))
        with pytest.raises(UserError):
            config_of(Checkpoint(folder))


def test_a_checkpoint_in_a_folder_named_after_another_step_is_refused(run):
    run.save(2)
    folder_of(run, 2).rename(folder_of(run, 8))
    with pytest.raises(UserError, match="it is of step 2, but the folder's name says 8"):
        find_checkpoint(run.checkpoints)
    folder_of(run, 8).rename(run.checkpoints / "mine")
    assert np.isfinite(open_checkpoint(run.checkpoints / "mine").full_tensor("parameter", "w")).all()
