"""Signed checkpoints: which are accepted with which key, and that the key is never logged or stored."""

import hashlib
import hmac
import json
import logging
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.small_checkpoint import VALUES

from mythos_dist.checkpoint.canonical import write_canonical
from mythos_dist.checkpoint.export import export
from mythos_dist.checkpoint.manifest import read_checkpoint_manifest
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import find_checkpoint, open_checkpoint
from mythos_dist.checkpoint.signature import VARIABLE, SignatureError, signing_key
from mythos_dist.checkpoint.tensor_file import TensorFile, write_tensors
from mythos_dist.config.schema import CheckpointConfig
from mythos_dist.errors import UserError

SECRET = "f00dfacef00dfacef00dfacef00dface"


@pytest.fixture
def key_file(tmp_path) -> str:
    return key(tmp_path / "key")


def key(file: Path, secret: str = SECRET) -> str:
    file.write_text(secret + "\n")
    file.chmod(0o600)
    return str(file)


def folder_of(run, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def tamper(folder: Path) -> None:
    """Write other values with matching hashes, as anyone who can write the folder can."""
    manifest = read_checkpoint_manifest(folder)
    (name, file), *_ = manifest.files.items()
    kinds = manifest.tensors["w"].kinds
    size, digest = write_tensors(
        folder / name, {f"{kind}/w": (60,) for kind in kinds}, [(VALUES + 1).data] * len(kinds)
    )
    files = {name: replace(file, bytes=size, hash=digest)}
    reseal(folder, replace(manifest, files=files).to_text())


def reseal(folder: Path, content: str) -> None:
    """Write a manifest with a matching hash and the old signature."""
    file = folder / "checkpoint.json"
    before, (first, *rest) = json.loads(file.read_text().split("\n")[0]), content.split("\n")
    seal = json.loads(first) | ({"signature": before["signature"]} if "signature" in before else {})
    file.write_text("\n".join([json.dumps(seal), *rest]))


def test_a_run_signs_what_it_saves_and_resumes_from_it(run, key_file):
    assert run.save(2, key_file=key_file) and run.save(4, key_file=key_file)
    for verify in (True, False):
        checkpoint, damaged = find_checkpoint(run.checkpoints, CheckpointConfig(verify=verify, key_file=key_file))
        assert checkpoint and checkpoint.manifest.step == 4 and damaged == []
    checkpoint, damaged = find_checkpoint(run.checkpoints)  # without a key the signature is ignored
    assert checkpoint and np.array_equal(checkpoint.full_tensor("parameter", "w").reshape(-1), VALUES)


def test_the_signature_is_hmac_sha256_of_the_manifest_and_the_sha256_of_every_file(run, key_file):
    """Recomputed from the bytes on disk with the standard library."""
    run.save(2, key_file=key_file)
    folder = folder_of(run, 2)
    seal, text, _ = (folder / "checkpoint.json").read_text().split("\n")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    signature = json.loads(seal)["signature"]
    assert signature["files_sha256"] == files and files
    message = "mythos_dist checkpoint, signature 1\n" + json.dumps(files, sort_keys=True) + "\n" + text
    assert signature["mac"] == hmac.new(SECRET.encode(), message.encode(), "sha256").hexdigest()


@pytest.mark.parametrize("what", ["tampered", "unsigned", "another key", "old signature", "mac", "files", "step"])
def test_with_a_key_a_checkpoint_without_its_signature_is_refused_and_not_skipped(run, key_file, tmp_path, what):
    run.save(2, key_file=key_file)
    run.save(4, key_file=None if what == "unsigned" else key_file)
    folder = folder_of(run, 4)
    file = folder / "checkpoint.json"
    if what == "tampered":
        tamper(folder)
    elif what == "another key":
        run.save(4, start=2, key_file=key(tmp_path / "other", "another secret of some length"))
    elif what == "old signature":  # that of the previous checkpoint
        seal = json.loads(file.read_text().split("\n")[0])
        seal["signature"] = json.loads((folder_of(run, 2) / "checkpoint.json").read_text().split("\n")[0])["signature"]
        file.write_text("\n".join([json.dumps(seal), *file.read_text().split("\n")[1:]]))
    elif what in ("mac", "files"):
        seal, *rest = file.read_text().split("\n")
        seal = json.loads(seal)
        if what == "mac":
            seal["signature"]["mac"] = "0" * 64
        else:
            seal["signature"]["files_sha256"] = {"rank-00000.safetensors": "0" * 64}
        file.write_text("\n".join([json.dumps(seal), *rest]))
    elif what == "step":
        reseal(folder, replace(read_checkpoint_manifest(folder), tokens=1).to_text())
    message = "is not signed" if what == "unsigned" else "signature is wrong"
    with pytest.raises(SignatureError, match=message) as problem:
        find_checkpoint(run.checkpoints, CheckpointConfig(key_file=key_file))
    assert str(folder) in str(problem.value) and problem.value.exit_code == 2
    assert SECRET not in str(problem.value)
    checkpoint, _ = find_checkpoint(run.checkpoints)
    assert checkpoint and checkpoint.manifest.step == 4, "without a key only hashes are checked"


def test_damage_is_not_a_signature_error(run, key_file):
    """A flipped bit in a file or in the manifest is an accident: the previous checkpoint is loaded."""
    for step in (2, 4, 6):
        run.save(step, key_file=key_file, keep=3)
    file = folder_of(run, 6) / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    file = folder_of(run, 4) / "checkpoint.json"
    file.write_text(file.read_text().replace('"tokens": 32', '"tokens": 33'))
    for verify in (True, False):  # with a key every byte is read in any case
        checkpoint, damaged = find_checkpoint(run.checkpoints, CheckpointConfig(verify=verify, key_file=key_file))
        assert checkpoint and checkpoint.manifest.step == 2 and len(damaged) == 2


def test_a_file_with_a_forged_xxh3_hash_is_refused(run, key_file, monkeypatch):
    """xxh3 is not a cryptographic hash: other bytes with the same hash can be found. Here the hash is patched."""
    run.save(2, key_file=key_file)
    folder = folder_of(run, 2)
    manifest = read_checkpoint_manifest(folder)
    (expected,) = {file.hash for file in manifest.files.values()}
    file = folder / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)

    def collide(path, sha256=None):
        if sha256:
            sha256.update(path.read_bytes())
        return expected

    monkeypatch.setattr("mythos_dist.checkpoint.sources.file_hash", collide)
    assert find_checkpoint(run.checkpoints)[0]
    with pytest.raises(SignatureError, match="changed after the checkpoint was signed"):
        find_checkpoint(run.checkpoints, CheckpointConfig(key_file=key_file))
    assert TensorFile(file)


def test_tools_check_signatures_and_sign_their_copies(run, key_file, tmp_path, monkeypatch):
    """Reshape and export check with the key in the environment, and copies are signed with it. With --ignore-signature
    an unsigned checkpoint, or one of an old key, is accepted and its copy signed."""
    run.save(2, key_file=key_file)
    run.save(4)  # unsigned
    signed, unsigned = folder_of(run, 2), folder_of(run, 4)
    monkeypatch.setenv(VARIABLE, key_file)
    copied = write_canonical(open_checkpoint(signed), tmp_path / "a")
    assert Checkpoint(copied, key=signing_key()).find_damage() == []
    assert np.array_equal(open_checkpoint(tmp_path / "a").full_tensor("exp_avg", "w").reshape(-1), VALUES)
    with pytest.raises(SignatureError, match="--ignore-signature"):
        open_checkpoint(unsigned)
    first = write_canonical(open_checkpoint(unsigned, check_signature=False), tmp_path / "b")
    assert Checkpoint(first, key=signing_key()).find_damage() == []
    monkeypatch.setenv(VARIABLE, key(tmp_path / "new", "a new key that replaces the old"))
    with pytest.raises(SignatureError, match="another key"):
        open_checkpoint(tmp_path / "b")
    second = write_canonical(open_checkpoint(first, check_signature=False), tmp_path / "c")
    assert Checkpoint(second, key=signing_key()).find_damage() == []
    tamper(second)
    with pytest.raises(SignatureError, match="signature is wrong"):
        export(open_checkpoint(second), tmp_path / "out", "safetensors")
    monkeypatch.delenv(VARIABLE)
    plain = write_canonical(open_checkpoint(signed), tmp_path / "d")
    assert "signature" not in (plain / "checkpoint.json").read_text()


@pytest.mark.parametrize(
    ("mode", "content", "message"),
    [
        (0o640, SECRET, r"its mode 0640 .* chmod 600"),
        (0o604, SECRET, r"its mode 0604"),
        (0o620, SECRET, r"its mode 0620"),
        (0o600, "", r"holds 0 bytes; a key needs at least 16"),
        (0o600, "short\n\n\n\n\n\n\n\n\n\n\n\n\n\n", r"holds 5 bytes"),
        (0o600, "x" * 5000, r"holds more than 4096 bytes"),
    ],
)
def test_a_key_file_must_hold_a_key_and_be_accessible_to_its_owner_only(tmp_path, monkeypatch, mode, content, message):
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(UserError, match=f"checkpoint.key_file={file}: {message}"):
        signing_key(str(file))
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(UserError, match=f"{VARIABLE}={file}: {message}") as problem:
        signing_key()
    assert SECRET not in str(problem.value)


def test_an_unusable_key_file_is_reported_with_its_path(tmp_path, monkeypatch):
    """Opening a named pipe does not block."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, message in (
        (tmp_path / "absent", "no such file; create one with"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "absent" / "x", "no such file"),
        ("", "checkpoint.key_file is empty"),
        ("x" * 5000, "cannot be read"),
        ("~nobody-of-this-name/key", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            signing_key(str(path))
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(UserError, match=f"{VARIABLE} is empty"):
        signing_key()
    monkeypatch.delenv(VARIABLE)
    assert signing_key() is None
    monkeypatch.setenv("HOME", str(tmp_path))
    key(tmp_path / "key")
    assert signing_key("~/key")


def test_the_command_in_the_messages_creates_a_key(tmp_path):
    with pytest.raises(UserError) as problem:
        signing_key(str(tmp_path / "key"))
    command = re.search(r"create one with (.*)", str(problem.value))
    assert command and shutil.which("openssl")
    subprocess.run(["sh", "-c", command[1].replace("FILE", "key")], cwd=tmp_path, check=True)
    assert signing_key(str(tmp_path / "key"))


def test_the_key_is_never_logged_or_stored(run, key_file, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    run.save(2, key_file=key_file)
    find_checkpoint(run.checkpoints, CheckpointConfig(key_file=key_file))
    assert SECRET not in repr(signing_key(key_file)) + str(vars(open_checkpoint(run.checkpoints)))
    written = "".join(path.read_text() for path in run.checkpoints.rglob("*.json"))
    assert SECRET not in written + caplog.text + "".join(capfd.readouterr())
    for path in run.checkpoints.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
