"""What a checkpoint is, in words for a person and in numbers for a program; and how two differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mythos_dist.checkpoint.canonical import blocks_of
from mythos_dist.checkpoint.manifest import BUFFER, PARAMETER, Checkpoint


def facts(checkpoint: Checkpoint, damaged: list[str]) -> dict[str, Any]:
    """JSON values; `damaged` is what `manifest.damage` found."""
    manifest = checkpoint.manifest
    return {
        "path": str(checkpoint.folder),
        "step": manifest.step,
        "tokens": manifest.tokens,
        "parameters": manifest.num_parameters,
        "bytes": manifest.bytes,
        "files": len(manifest.files),
        "layout": manifest.layout,
        "start": manifest.start,
        "optimizer": manifest.optimizer,
        "data": manifest.data,
        "versions": manifest.versions,
        "moments": any("exp_avg" in tensor.kinds for tensor in manifest.tensors.values()),
        "damaged": damaged,
    }


def lines(about: dict[str, Any]) -> list[str]:
    """The same for a person."""
    optimizer, layout = about["optimizer"], about["layout"]
    held = "weights and both of Adam's moments" if about["moments"] else "weights alone"
    scale = optimizer["loss_scale"].get("cur_scale", 1)
    versions = ", ".join(f"{library} {version}" for library, version in about["versions"].items())
    found = [
        str(about["path"]),
        f"  step        {about['step']:,}, {about['tokens']:,} tokens",
        f"  parameters  {about['parameters']:,}; {held}",
        f"  size        {about['bytes'] / 1e9:.3f} GB in {about['files']} files",
        f"  layout      {', '.join(f'{axis} {value}' for axis, value in layout.items()) or 'none'}",
        f"  optimizer   {optimizer['steps']:,} steps, {optimizer['skipped_steps']:,} skipped, loss scale {scale:g}",
        f"  written by  start {about['start']} of the run, {versions}",
        f"  data        {about['data'][:60] or 'any'}",
    ]
    if about["damaged"]:
        return [*found, "  integrity   DAMAGED", *(f"    {line}" for line in about["damaged"])]
    return [*found, "  integrity   every byte is as it was written"]


@dataclass(frozen=True)
class Difference:
    """Of one tensor in two checkpoints."""

    name: str
    largest: float  # of the differences
    relative: float  # norm of the difference / norm of the first


def differing_settings(first: Checkpoint, second: Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    """(name, in the first, in the second) for whatever the manifests say differently, settings included."""
    for name in ("step", "tokens", "start", "data"):
        yield from _unequal(name, getattr(first.manifest, name), getattr(second.manifest, name))
    for part in ("layout", "versions", "optimizer"):
        yield from _unequal_members(part, getattr(first.manifest, part), getattr(second.manifest, part))
    here, there = first.manifest.config, second.manifest.config
    for section in here | there:
        yield from _unequal_members(section, here.get(section, {}), there.get(section, {}))


def differing_tensors(first: Checkpoint, second: Checkpoint) -> Iterator[Difference | str]:
    """Parameters and buffers that are not equal bit for bit; as words, those that cannot be compared."""
    ours, theirs = first.manifest.tensors, second.manifest.tensors
    for name in sorted(ours | theirs):
        if name not in ours or name not in theirs:
            yield f"{name} is in the {'first' if name in ours else 'second'} only"
        elif ours[name].shape != theirs[name].shape:
            yield f"{name} has shape {list(ours[name].shape)} and {list(theirs[name].shape)}"
        else:
            kind = PARAMETER if PARAMETER in ours[name].kinds else BUFFER
            largest, squares, norm, same = 0.0, 0.0, 0.0, True
            for here, there in zip(blocks_of(first, kind, name), blocks_of(second, kind, name), strict=True):
                a, b = (np.frombuffer(block, np.float32) for block in (here, there))
                norm += float(np.square(a, dtype=np.float64).sum())
                if not np.array_equal(a, b):
                    same = False
                    difference = b.astype(np.float64) - a
                    largest = max(largest, float(np.abs(difference).max()))
                    squares += float(np.square(difference).sum())
            if not same:
                yield Difference(name, largest, (squares / norm) ** 0.5 if norm else float("inf"))


def _unequal(name: str, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    if first != second:
        yield name, first, second


def _unequal_members(part: str, first: dict, second: dict) -> Iterator[tuple[str, Any, Any]]:
    for key in first | second:
        yield from _unequal(f"{part}.{key}", first.get(key), second.get(key))
