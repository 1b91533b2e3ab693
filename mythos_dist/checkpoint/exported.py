"""Read the weights of an export (`export.py`) piece by piece, like a checkpoint of step 0 that has no moments."""

from dataclasses import asdict
from pathlib import Path

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
from mythos_dist.errors import UserError
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.pretrained import check_head, exported_shapes, format_of, is_export, our_state, read_settings


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


def open_model_folder(folder: Path) -> "ExportedWeights":
    """The export in `folder`, or what transformers has saved there. Raises UserError, with what to do, for others."""
    folder = folder.expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        problem = "holds an adapter only; merge it first: model.merge_and_unload().save_pretrained(OTHER_FOLDER)"
    elif not folder.is_dir():
        problem = "no such folder; give one that model.save_pretrained wrote"
    elif not (folder / "config.json").is_file():
        problem = "has no config.json; give a folder that model.save_pretrained wrote"
    elif not is_export(folder):
        problem = "has no .safetensors files; save the model with safe_serialization=True"
        read_settings(folder, {})  # another model's is the problem to name
    else:
        return open_export(folder)
    raise UserError(problem, str(folder))


class ExportedWeights(Checkpoint):
    """An export in any format and dtype; elements are converted to fp32."""

    def __init__(self, folder: Path):
        """Raises UserError if it cannot be read, or if tensors do not fit its config.json."""
        self._state = SafeTensors(sorted(folder.glob("*.safetensors")))
        settings = read_settings(folder, self._state.metadata)
        self._model = settings.model
        with torch.device("meta"):
            model = Mythos(self._model)
        tensors = {name: TensorEntry(tuple(value.shape), (PARAMETER,)) for name, value in model.named_parameters()}
        tensors |= {name: TensorEntry(tuple(value.shape), (BUFFER,)) for name, value in model.named_buffers()}
        expected, format = {}, format_of(self._state)
        self._sources: dict[str, list[str]] = {}  # our name -> the names in the files
        for name, tensor in tensors.items():
            shapes = exported_shapes(format, name, tensor.shape, self._model)
            self._sources[name] = list(shapes)
            expected |= shapes
        if problems := list(mismatches(self._state, expected)):
            raise UserError([*problems, "config.json is of another model; export again"], str(folder))
        check_head(self._state, folder)
        manifest = CheckpointManifest(
            step=settings.step,
            tokens=settings.tokens,
            start=0,
            layout={},
            config={"model": asdict(self._model), **settings.sections},
            data="",
            versions=library_versions(),
            optimizer={"steps": 0, "skipped_steps": 0, "loss_scale": {}},
            tensors=tensors,
            files={},
            lineage=Lineage(tokens=settings.tokens),
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
        return parts[name] if list(parts) == [name] else our_state(parts, self._model)[name]
