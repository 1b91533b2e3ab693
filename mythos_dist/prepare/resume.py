"""Does a folder hold this conversion, its beginning, or something else?"""

import fcntl
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_dist.data.manifest import SPLITS, ShardManifest, index_fingerprint, read_json, read_shard_manifest
from mythos_dist.errors import UserError
from mythos_dist.prepare.part import UNFINISHED


def earlier_conversion(out: Path, settings: dict[str, Any]) -> ShardManifest | None:
    """The manifest of `out` if it is this conversion, None if it is to be begun or finished; UserError otherwise."""
    if out.exists() and not out.is_dir():
        raise UserError("is a file; name a folder", str(out))
    unfinished = out / UNFINISHED / "settings.json"
    if (out / "manifest.json").is_file():
        manifest = read_shard_manifest(out)
        _compare(out, settings, manifest.to_json())
        try:
            changed = index_fingerprint(out) != manifest.fingerprint
        except OSError:
            changed = True
        if changed:
            raise UserError("index.json changed after the conversion; delete the folder and convert again", str(out))
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # a kill between the manifest and this left it
        return manifest
    if unfinished.is_file():
        try:
            _compare(out, settings, read_json(unfinished.read_bytes()))
        except (ValueError, AttributeError, TypeError) as error:
            if _has_shards(out):
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{UNFINISHED}/settings.json is damaged ({error}); delete the folder", str(out)
                ) from None
            _start_over(out)
    elif out.exists() and (other := sorted(file.name for file in out.iterdir() if file.name != UNFINISHED)):
        raise UserError(
            f"holds {', '.join(other[:3])}{' …' if len(other) > 3 else ''} and is no conversion of ours; "
            "name another folder, or a new one",
            str(out),
        )
    return None


def _has_shards(out: Path) -> bool:
    """Whether a conversion has finished a part of its work."""
    return any(out.glob(f"{UNFINISHED}/part-*.json")) or any(
        re.fullmatch(r"part-\d+", folder.name) for split in SPLITS for folder in out.glob(f"{split}/part-*")
    )


def _start_over(out: Path) -> None:
    """Remove what an attempt has left that wrote nothing: it ended at an input or a setting that is right by now."""
    with (out / UNFINISHED / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another conversion is writing here; wait for it, or stop it", str(out)) from None
        shutil.rmtree(out / UNFINISHED)
    for split in SPLITS:
        for folder in out.glob(f"{split}/part-*.tmp"):
            if re.fullmatch(r"part-\d+\.tmp", folder.name):
                shutil.rmtree(folder)


def _compare(out: Path, settings: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises UserError that lists each setting in which a folder was begun differently."""
    now = json.loads(json.dumps(settings, default=asdict))
    differing = [
        f"{name}={_shown(value)}, but these shards were made with {_shown(before.get(name))}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differing:
        differing[-1] += "; name another folder, or delete this one to convert again"
        raise UserError(differing, str(out))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        files = [f"{file['name']} ({file['size']} bytes, {file['hash'][:15]})" for file in value]
        return f"{len(files)} files: {', '.join(files[:3])}{' …' if len(files) > 3 else ''}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return str(value)
