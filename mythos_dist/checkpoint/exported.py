"""Read the weights of an export (`export.py`) piece by piece, like a checkpoint of step 0 that has no moments."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mythos_dist.checkpoint.manifest import (
    BUFFER,
    PARAMETER,
    CheckpointManifest,
    Lineage,
    TensorEntry,
    library_versions,
)
from mythos_dist.checkpoint.open_mythos import SafeTensors, mismatches
from mythos_dist.checkpoint.pieces import Piece, overlaps
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.signature import VARIABLE, signing_key
from mythos_dist.config.schema import BY_MODE, ActConfig, LoopsConfig, MythosConfig
from mythos_dist.errors import UserError, first_line
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.open_mythos import from_open_mythos, open_mythos_shapes

_THEIRS = "recurrent.block.ffn.router_bias"  # a name that only exports for OpenMythos' class have


def is_export(path: Path) -> bool:
    """Whether a folder has the files of an export."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def open_export(folder: Path, key_file: str | None = None) -> "ExportedWeights":
    """The export in `folder`. Raises UserError if it cannot be read, or if a signature is required.

    key_file: `checkpoint.key_file`.
    """
    if signing_key(key_file):
        raise UserError(
            f"an export has no signature, but a key is set (checkpoint.key_file or {VARIABLE}); give the checkpoint "
            "that it was exported from",
            str(folder),
        )
    return ExportedWeights(folder)


class ExportedWeights(Checkpoint):
    """An export in either format and any dtype; elements are converted to fp32."""

    def __init__(self, folder: Path):
        """Raises UserError if it cannot be read, or if tensors do not fit its config.json."""
        self._model = _read_model(folder)
        self._state = SafeTensors(sorted(folder.glob("*.safetensors")))
        with torch.device("meta"):
            model = Mythos(self._model)
        tensors = {name: TensorEntry(tuple(value.shape), (PARAMETER,)) for name, value in model.named_parameters()}
        tensors |= {name: TensorEntry(tuple(value.shape), (BUFFER,)) for name, value in model.named_buffers()}
        expected = {}
        self._sources: dict[str, list[str]] = {}  # our name -> the names in the files
        for name, tensor in tensors.items():
            shapes = {name: tensor.shape}
            if _THEIRS in self._state:
                shapes = open_mythos_shapes(name, tensor.shape, self._model)
            self._sources[name] = list(shapes)
            expected |= shapes
        if problems := list(mismatches(self._state, expected)):
            raise UserError([*problems, "config.json is of another model; export again"], str(folder))
        step, tokens = (_number(self._state.metadata.get(key, "")) for key in ("step", "tokens"))
        manifest = CheckpointManifest(
            step=step,
            tokens=tokens,
            start=0,
            layout={},
            config={"model": asdict(self._model), **_read_settings(self._state.metadata.get("settings"), folder)},
            data="",
            versions=library_versions(),
            optimizer={"steps": 0, "skipped_steps": 0, "loss_scale": {}},
            tensors=tensors,
            files={},
            lineage=Lineage(tokens=tokens),
        )
        super().__init__(folder, manifest)

    def read(self, kind: str, name: str, piece: Piece, out: np.ndarray) -> None:
        """As `Checkpoint.read`."""
        tensor = self.manifest.tensors.get(name)
        if tensor is None or kind not in tensor.kinds:
            raise UserError(f"holds no {kind} {name}; is it of another model?", str(self.folder))
        full = self._full_tensor(name)
        for source, target in overlaps(Piece.full(tensor.shape), piece, tensor.shape):
            box = out[target.offset : target.offset + int(np.prod(target.shape))].reshape(target.shape)
            box[target.slices] = full[source.slices].float().numpy()

    def _full_tensor(self, name: str) -> Tensor:
        """Unsharded, in the dtype of the file, and mapped from it unless it has to be converted to our names."""
        parts = {source: self._state[source] for source in self._sources[name]}
        return parts[name] if list(parts) == [name] else from_open_mythos(parts, self._model)[name]


def _read_model(folder: Path) -> MythosConfig:
    """The model of config.json; OpenMythos' class has no fields for what `model.mode` decides."""
    try:
        fields = json.loads((folder / "config.json").read_bytes())
        return MythosConfig(**{"mode": "reference", **BY_MODE["reference"], **fields})
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"cannot be read as an export's settings ({first_line(error)})", str(folder / "config.json")
        ) from None


def _read_settings(text: str | None, folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of `act` and `loops`; none in exports of earlier versions."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
        classes = {"act": ActConfig, "loops": LoopsConfig}
        return {section: asdict(classes[section](**settings)) for section, settings in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"has settings that this version does not read ({first_line(error)})", str(folder)) from None


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) <= 15 else 0
