"""Describe a checkpoint, as text or as JSON values, and compare two."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mythos_dist.checkpoint.canonical import tensor_blocks
from mythos_dist.checkpoint.manifest import read_checkpoint_manifest
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import open_checkpoint
from mythos_dist.checkpoint.signature import VARIABLE, Key, SignatureError, signing_key
from mythos_dist.config.compare import training_changes
from mythos_dist.progress import Bar
from mythos_dist.units import count
from mythos_dist.urls import AnyPath

SIGNATURES = {
    "none": "none",
    "unchecked": f"present; set {VARIABLE} to check it",
    "valid": "valid",
    "missing": "MISSING: a key is set, so this checkpoint is refused",
    "wrong": "WRONG: signed with another key, or changed after it was signed; this checkpoint is refused",
}
REFUSED = ("missing", "wrong")


def inspect(path: AnyPath, verify: bool = True, quiet: bool = True) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint at `path` and its description (see `summarize`).

    `verify`: read every byte, with a bar unless `quiet`.
    A wrong signature is reported like damage. Raises UserError if there is no checkpoint.
    """
    checkpoint, key = open_checkpoint(path, check_signature=False), signing_key()
    signature = _signature(checkpoint, key)
    checkpoint.key = key if verify and signature == "valid" else None
    try:
        with Bar("verifying", checkpoint.manifest.bytes, quiet=quiet or not verify) as shown:
            damaged = checkpoint.find_damage(hashes=verify, progress=shown.update)
    except SignatureError as error:
        damaged, signature = [str(error)], "wrong"
    return checkpoint, summarize(checkpoint, damaged, signature, verify)


def _signature(checkpoint: Checkpoint, key: Key | None) -> str:
    """A key of SIGNATURES, after a check of the manifest's signature; the files are not read."""
    is_signed = any(file.sha256 for file in checkpoint.manifest.files.values())
    if key is None:
        return "unchecked" if is_signed else "none"
    try:
        read_checkpoint_manifest(checkpoint.folder, key)
    except SignatureError:
        return "wrong" if is_signed else "missing"
    return "valid"


def summarize(checkpoint: Checkpoint, damaged: list[str], signature: str, verified: bool) -> dict[str, Any]:
    """JSON values; `damaged`: the result of `find_damage`; `verified`: whether it read every byte."""
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
        "lineage": asdict(manifest.lineage),
        "config": manifest.config,
        "versions": manifest.versions,
        "moments": any("exp_avg" in tensor.kinds for tensor in manifest.tensors.values()),
        "signature": signature,
        "verified": verified,
        "damaged": damaged,
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The result of `summarize` as text."""
    optimizer = summary["optimizer"]
    content = "weights and the optimizer's moments" if summary["moments"] else "weights only"
    if snapshots := optimizer.get("average_samples"):
        content += f"; average of {count(snapshots, 'snapshot')} of the weights"
    scale = optimizer["loss_scale"].get("cur_scale", 1)
    writer = f"start {summary['start']} of the run" if summary["start"] else "a tool"
    lines = [
        str(summary["path"]),
        f"  step        {summary['step']:,}, {count(summary['tokens'], 'token')}",
        f"  parameters  {summary['parameters']:,}; {content}",
        f"  size        {summary['bytes'] / 1e9:.3f} GB in {count(summary['files'], 'file')}",
        f"  layout      {format_value(summary['layout'])}",
        f"  optimizer   {count(optimizer['steps'], 'step')}, {optimizer['skipped_steps']:,} skipped, "
        f"loss scale {scale:g}",
        f"  written by  {writer}, {format_value(summary['versions'])}",
        f"  data        {format_value(summary['data'][:60] or 'any')}",
        f"  signature   {SIGNATURES[summary['signature']]}",
    ]
    lines += lineage_lines(summary)
    if summary["damaged"]:
        lines += ["  integrity   DAMAGED", *(f"    {line}" for line in summary["damaged"])]
    elif summary["verified"]:
        lines.append("  integrity   every byte is as it was written")
    else:
        lines.append("  integrity   sizes are right; bytes were not read")
    return lines


def lineage_lines(summary: dict[str, Any]) -> list[str]:
    """The checkpoints that training went through, oldest first, with what each run took from its parent and changed."""
    lineage = summary["lineage"]
    if not lineage["parents"]:
        return []
    this = {
        "path": "this checkpoint",
        "step": summary["step"],
        "tokens": lineage["tokens"],
        "config": summary["config"],
    }
    checkpoints = [*reversed(lineage["parents"]), this]
    lines = ["  lineage (tokens of all stages so far)"]
    for i, checkpoint in enumerate(checkpoints):
        parent = checkpoints[i - 1] if i else None
        branch = f"{'   ' * (i - 1)}`- {format_value(parent['state'])}: " if parent else ""
        about = f"step {checkpoint['step']:,}, {count(checkpoint['tokens'], 'token')}"
        lines.append(f"    {branch}{format_value(checkpoint['path'])}, {about}")
        changes = training_changes(parent["config"], checkpoint["config"]) if parent else ()
        for name, before, now in changes:
            lines.append(f"    {'   ' * (i + 1)}{format_value(name)} {format_value(before)} -> {format_value(now)}")
    return lines


def format_value(value: Any) -> str:
    """A setting as text: no brackets or quotes, long lists as their range, no control characters."""
    if value is None or (isinstance(value, list | dict | str) and not value):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{format_value(key)} {format_value(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        if len(value) > 8 and all(isinstance(element, int | float) for element in value):
            return f"{len(value)} values from {min(value):.4g} to {max(value):.4g}"
        return ", ".join(map(format_value, value))
    return "".join(char if char.isprintable() else "?" for char in str(value))


def difference_line(name: str, first: Any, second: Any) -> str:
    """A line for a setting that differs between two checkpoints."""
    first_text, second_text = format_value(first), format_value(second)
    if first_text == second_text:
        if isinstance(first, list) and isinstance(second, list):
            differing = sum(a != b for a, b in zip(first, second, strict=False))
            return f"{name}: {first_text} in both, {differing} of them different"
        first_text += f" ({type(first).__name__})"  # 1 and 1.0, "none" and None
        second_text += f" ({type(second).__name__})"
    return f"{name}: {first_text} in the first; {second_text} in the second"


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs between two checkpoints."""

    name: str
    largest: float  # absolute difference of an element, among the finite ones
    relative: float | None  # norm of the difference / norm of the first tensor; None: the latter is zero
    not_finite: int = 0  # elements whose difference is NaN or infinite

    def __str__(self) -> str:
        relative = "" if self.relative is None else f", relative norm {self.relative:.3g}"
        others = f", and {count(self.not_finite, 'element')} NaN or infinite" if self.not_finite else ""
        return f"{self.name}: differs by up to {self.largest:.3g}{relative}{others}"


def differing_settings(first: Checkpoint, second: Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    """(name, value in the first, value in the second) for all that differs in the manifests, settings included."""
    for name in ("step", "tokens", "start", "data"):
        value, other = getattr(first.manifest, name), getattr(second.manifest, name)
        if value != other:
            yield name, value, other
    for section in ("layout", "versions", "optimizer"):
        yield from _differing_members(section, getattr(first.manifest, section), getattr(second.manifest, section))
    config, other_config = first.manifest.config, second.manifest.config
    for section in config | other_config:
        yield from _differing_members(section, config.get(section, {}), other_config.get(section, {}))


def _differing_members(section: str, first: dict, second: dict) -> Iterator[tuple[str, Any, Any]]:
    for key in first | second:
        value, other = first.get(key), second.get(key)
        if value != other:
            yield f"{section}.{key}", value, other


def differing_tensors(first: Checkpoint, second: Checkpoint) -> Iterator[TensorDifference | str]:
    """Parameters and buffers that are not equal bit for bit; a message for those that cannot be compared."""
    tensors, others = first.manifest.tensors, second.manifest.tensors
    for name in sorted(tensors | others):
        if name not in tensors or name not in others:
            yield f"{name} is in the {'first' if name in tensors else 'second'} only"
        elif tensors[name].shape != others[name].shape:
            shape, other_shape = _format_shape(tensors[name].shape), _format_shape(others[name].shape)
            yield f"{name} has shape {shape} in the first, {other_shape} in the second"
        else:
            kind = tensors[name].weights
            if kind not in others[name].kinds:
                yield f"{name} is a {kind} in one of them only"
            elif difference := _difference(first, second, kind, name):
                yield difference


def _difference(first: Checkpoint, second: Checkpoint, kind: str, name: str) -> TensorDifference | None:
    """None if all elements are bitwise equal."""
    largest, difference_squares, first_squares, not_finite, equal = 0.0, 0.0, 0.0, 0, True
    for block, other_block in zip(tensor_blocks(first, kind, name), tensor_blocks(second, kind, name), strict=True):
        a, b = np.frombuffer(block, np.float32), np.frombuffer(other_block, np.float32)
        first_squares += float(np.square(a, dtype=np.float64).sum(where=np.isfinite(a)))
        bits_differ = a.view(np.uint32) != b.view(np.uint32)
        if bits_differ.any():
            equal = False
            with np.errstate(invalid="ignore"):
                difference = b.astype(np.float64) - a
            finite = np.isfinite(difference)
            not_finite += int(np.sum(bits_differ & ~finite))
            largest = max(largest, float(np.abs(difference).max(where=finite, initial=0)))
            difference_squares += float(np.square(difference).sum(where=finite))
    if equal:
        return None
    relative = (difference_squares / first_squares) ** 0.5 if first_squares else None
    return TensorDifference(name, largest, relative, not_finite)


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "()"
