"""What a checkpoint is, in words for a person and in numbers for a program; and how two differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mythos_dist.checkpoint.canonical import blocks_of
from mythos_dist.checkpoint.manifest import BUFFER, PARAMETER, Checkpoint, read_checkpoint_manifest
from mythos_dist.checkpoint.restore import open_checkpoint
from mythos_dist.checkpoint.signature import VARIABLE, Key, SignatureError, signing_key

SIGNATURES = {
    "none": "none",
    "unchecked": f"there is one; set {VARIABLE} to check it",
    "valid": "valid",
    "missing": "MISSING: a key is set, so this checkpoint is refused",
    "wrong": "WRONG: signed with another key, or changed since; this checkpoint is refused",
}
REFUSED = ("missing", "wrong")


def inspect(path: Path, verify: bool = True) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint at `path` and what it is, as JSON values; with `verify` every byte of it is read.

    A wrong signature is reported like damage. Raises UserError if there is no checkpoint.
    """
    checkpoint, key = open_checkpoint(path, check_signature=False), signing_key()
    signature = _signature(checkpoint, key)
    checkpoint.key = key if verify and signature == "valid" else None
    try:
        damaged = checkpoint.damage(hashes=verify)
    except SignatureError as error:
        damaged, signature = [str(error)], "wrong"
    return checkpoint, facts(checkpoint, damaged, signature, verify)


def _signature(checkpoint: Checkpoint, key: Key | None) -> str:
    """A key of SIGNATURES; the signature is that of the manifest, whose files are not looked at."""
    is_signed = any(file.sha256 for file in checkpoint.manifest.files.values())
    if key is None:
        return "unchecked" if is_signed else "none"
    try:
        read_checkpoint_manifest(checkpoint.folder, key)
    except SignatureError:
        return "wrong" if is_signed else "missing"
    return "valid"


def facts(checkpoint: Checkpoint, damaged: list[str], signature: str, verified: bool) -> dict[str, Any]:
    """JSON values; `damaged` is what `manifest.damage` found, and `verified` whether it read every byte."""
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
        "signature": signature,
        "verified": verified,
        "damaged": damaged,
    }


def lines(about: dict[str, Any]) -> list[str]:
    """The same for a person."""
    optimizer, layout = about["optimizer"], about["layout"]
    held = "weights and both of Adam's moments" if about["moments"] else "weights alone"
    scale = optimizer["loss_scale"].get("cur_scale", 1)
    writer = f"start {about['start']} of the run" if about["start"] else "a tool"
    found = [
        str(about["path"]),
        f"  step        {about['step']:,}, {counted(about['tokens'], 'token')}",
        f"  parameters  {about['parameters']:,}; {held}",
        f"  size        {about['bytes'] / 1e9:.3f} GB in {counted(about['files'], 'file')}",
        f"  layout      {spelled(layout)}",
        f"  optimizer   {counted(optimizer['steps'], 'step')}, {optimizer['skipped_steps']:,} skipped, "
        f"loss scale {scale:g}",
        f"  written by  {writer}, {spelled(about['versions'])}",
        f"  data        {spelled(about['data'][:60] or 'any')}",
        f"  signature   {SIGNATURES[about['signature']]}",
    ]
    if about["damaged"]:
        return [*found, "  integrity   DAMAGED", *(f"    {line}" for line in about["damaged"])]
    whole = "every byte is as it was written" if about["verified"] else "sizes are right; bytes were not read"
    return [*found, f"  integrity   {whole}"]


def counted(number: int, noun: str) -> str:
    """1 file, 1,234 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def spelled(value: Any) -> str:
    """A setting as a person writes it: no brackets or quotes, long lists summed up, nothing that a terminal obeys."""
    if value is None or (isinstance(value, list | dict | str) and not value):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{spelled(key)} {spelled(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        if len(value) > 8 and all(isinstance(one, int | float) for one in value):
            return f"{len(value)} values from {min(value):.4g} to {max(value):.4g}"
        return ", ".join(map(spelled, value))
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def difference_line(name: str, first: Any, second: Any) -> str:
    """Of a setting that two checkpoints do not share."""
    here, there = spelled(first), spelled(second)
    if here == there and isinstance(first, list) and isinstance(second, list):
        unequal = sum(a != b for a, b in zip(first, second, strict=False))
        return f"{name}: {here} in both, {unequal} of them not equal"
    if here == there:  # 1 and 1.0, "none" and None
        here, there = (f"{text} ({type(value).__name__})" for text, value in ((here, first), (there, second)))
    return f"{name}: {here} in the first; {there} in the second"


@dataclass(frozen=True)
class Difference:
    """Of one tensor in two checkpoints."""

    name: str
    largest: float  # of the differences that are finite
    relative: float | None  # norm of the difference / norm of the first; None: that is zero
    not_finite: int = 0  # elements whose difference is NaN or infinite

    def __str__(self) -> str:
        relative = "" if self.relative is None else f", {self.relative:.3g} of its norm"
        others = f", and {counted(self.not_finite, 'element')} NaN or infinite" if self.not_finite else ""
        return f"{self.name}: up to {self.largest:.3g} apart{relative}{others}"


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
            yield f"{name} has shape {_shape(ours[name].shape)} in the first, {_shape(theirs[name].shape)} in the other"
        else:
            kind = PARAMETER if PARAMETER in ours[name].kinds else BUFFER
            if kind not in theirs[name].kinds:
                yield f"{name} is a {kind} in one of them only"
            elif difference := _difference(first, second, kind, name):
                yield difference


def _difference(first: Checkpoint, second: Checkpoint, kind: str, name: str) -> Difference | None:
    """None if all elements are the same bits."""
    largest, squares, norm, not_finite, same = 0.0, 0.0, 0.0, 0, True
    for here, there in zip(blocks_of(first, kind, name), blocks_of(second, kind, name), strict=True):
        a, b = (np.frombuffer(block, np.float32) for block in (here, there))
        norm += float(np.square(a, dtype=np.float64).sum(where=np.isfinite(a)))
        if not np.array_equal(a.view(np.uint32), b.view(np.uint32)):
            same = False
            with np.errstate(invalid="ignore"):
                difference = b.astype(np.float64) - a
            finite = np.isfinite(difference)
            not_finite += int(np.sum(~finite & (a.view(np.uint32) != b.view(np.uint32))))
            largest = max(largest, float(np.abs(difference).max(where=finite, initial=0)))
            squares += float(np.square(difference).sum(where=finite))
    return None if same else Difference(name, largest, (squares / norm) ** 0.5 if norm else None, not_finite)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "of a scalar"


def _unequal(name: str, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    if first != second:
        yield name, first, second


def _unequal_members(part: str, first: dict, second: dict) -> Iterator[tuple[str, Any, Any]]:
    for key in first | second:
        yield from _unequal(f"{part}.{key}", first.get(key), second.get(key))
