"""Where a conversion writes: a folder of this machine, or of a store (store_output.py)."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_dist.data.manifest import SPLITS, ShardManifest
from mythos_dist.prepare.part import UNFINISHED, ConversionPart, PartRecord, write_atomically
from mythos_dist.prepare.resume import finished_manifest

Entries = dict[str, list[dict[str, Any]]]  # of index.json, by split


class Output:
    """The folder `out`. Methods are called in the order in which they are defined here."""

    uploaded = 0  # bytes

    def __init__(self, out: Path):
        self.out = out

    @property
    def name(self) -> str:
        """The folder or URL as the user gave it."""
        return str(self.out)

    def finished_manifest(self, settings: dict[str, Any]) -> ShardManifest | None:
        """The manifest if this conversion is finished; None if it is new or unfinished. UserError for anything else."""
        return finished_manifest(self.out, settings)

    def begin(self, settings: dict[str, Any]) -> None:
        """Record the settings of the conversion; `out` is locked."""
        write_atomically(self.out / UNFINISHED / "settings.json", json.dumps(settings, default=asdict))

    def size_of(self, name: str) -> int:
        """Bytes of a shard, such as train/part-00000/shard.00000.mds. Raises OSError if it is missing."""
        return (self.out / name).stat().st_size

    def add(self, part: ConversionPart, record: PartRecord, on_wait: Callable[[], None]) -> None:
        """A part is finished: its shards will not change. `on_wait` is called while this waits."""

    def begin_one_stream(self) -> None:
        """All parts are converted again; see heldout.py."""

    def restore(self, name: str, file: dict[str, Any]) -> Path:
        """The path of a shard, which `file` describes, on this machine."""
        return self.out / name

    def publish(self, manifest: ShardManifest, shards: Entries) -> None:
        """The conversion is finished: write the manifest, and remove what is not part of the result."""
        write_atomically(self.out / "manifest.json", manifest_text(manifest))
        shutil.rmtree(self.out / UNFINISHED)

    def discard(self) -> None:
        """Remove all that was written."""
        for name in (*SPLITS, UNFINISHED):
            shutil.rmtree(self.out / name, ignore_errors=True)
        if self.out.exists() and not any(self.out.iterdir()):  # else it holds other files
            self.out.rmdir()

    def close(self) -> None:
        """End what runs in the background."""


def manifest_text(manifest: ShardManifest) -> str:
    """The content of manifest.json."""
    return json.dumps(manifest.to_json(), indent=2) + "\n"
