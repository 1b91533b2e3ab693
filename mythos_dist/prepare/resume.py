"""Decide whether a folder holds this conversion, an unfinished one that can be resumed, or something else."""

import fcntl
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from mythos_dist.data.manifest import SPLITS, ShardManifest, index_fingerprint, read_json, read_shard_manifest
from mythos_dist.errors import UserError
from mythos_dist.prepare.part import UNFINISHED


def lock_output(out: Path) -> TextIO:
    """Lock `out` for this process until the returned file is closed. Raises UserError if another one has it."""
    folder = out / UNFINISHED
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError("another conversion is writing here; wait for it, or stop it", str(out)) from None
    return lock


def finished_manifest(out: Path, settings: dict[str, Any]) -> ShardManifest | None:
    """The manifest of `out` if it is this conversion; None if it is new or unfinished. UserError for anything else."""
    if out.exists() and not out.is_dir():
        raise UserError("is a file; name a folder", str(out))
    if (out / "manifest.json").is_file():
        manifest = read_shard_manifest(out)
        check_same(out, settings, manifest.to_json())
        try:
            changed = index_fingerprint(out) != manifest.fingerprint
        except OSError:
            changed = True
        if changed:
            raise UserError("index.json changed after the conversion; delete the folder and convert again", str(out))
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # left by a kill just after the manifest was written
        return manifest
    unfinished = out / UNFINISHED / "settings.json"
    if unfinished.is_file():
        try:
            check_same(out, settings, read_json(unfinished.read_bytes()))
        except (ValueError, AttributeError, TypeError) as error:
            if not _has_finished_parts(out):
                _start_over(out)
            elif isinstance(error, UserError):
                raise
            else:
                problem = f"{UNFINISHED}/settings.json is damaged ({error}); delete the folder"
                raise UserError(problem, str(out)) from None
    elif out.exists() and (other := sorted(file.name for file in out.iterdir() if file.name != UNFINISHED)):
        raise UserError(
            f"contains {', '.join(other[:3])}{' …' if len(other) > 3 else ''}, which is not the output of a "
            "conversion; name a new folder",
            str(out),
        )
    return None


def _has_finished_parts(out: Path) -> bool:
    if any(out.glob(f"{UNFINISHED}/part-*.json")):
        return True
    folders = [folder for split in SPLITS for folder in out.glob(f"{split}/part-*")]
    return any(re.fullmatch(r"part-\d+", folder.name) for folder in folders)


def _start_over(out: Path) -> None:
    """Remove an unfinished conversion without finished parts, such as one that failed because of a wrong setting."""
    with lock_output(out):
        shutil.rmtree(out / UNFINISHED)
    for split in SPLITS:
        for folder in out.glob(f"{split}/part-*.tmp"):
            if re.fullmatch(r"part-\d+\.tmp", folder.name):
                shutil.rmtree(folder)


def check_same(out: Path | str, settings: dict[str, Any], previous: dict[str, Any]) -> None:
    """Raises UserError that lists each setting that differs from those of the conversion in `out`."""
    current = json.loads(json.dumps(settings, default=asdict))
    differences = [
        f"{name}={_shown(value)}, but these shards were made with {_shown(previous.get(name))}"
        for name, value in current.items()
        if previous.get(name) != value
    ]
    if differences:
        differences[-1] += "; name another folder, or delete this one to convert again"
        raise UserError(differences, str(out))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        files = [f"{file['name']} ({file['size']} bytes, {file['hash'][:15]})" for file in value]
        return f"{len(files)} files: {', '.join(files[:3])}{' …' if len(files) > 3 else ''}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return str(value)
