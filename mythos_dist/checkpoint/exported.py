"""Read the weights of an export (`export.py`) piece by piece, like a checkpoint of step 0 that has no moments."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

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
from mythos_dist.checkpoint.names import MANIFEST_FILE, step_of
from mythos_dist.checkpoint.open_mythos import SafeTensors, mismatches
from mythos_dist.checkpoint.pieces import Piece, overlaps
from mythos_dist.checkpoint.reader import Checkpoint, Wanted
from mythos_dist.checkpoint.remote_tensors import RemoteTensors
from mythos_dist.checkpoint.signature import VARIABLE, signing_key
from mythos_dist.checkpoint.tensor_file import file_hash
from mythos_dist.errors import UserError
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.pretrained import (
    check_head,
    exported_shapes,
    format_of,
    is_export,
    our_state,
    parse_settings,
    read_settings,
)
from mythos_dist.progress import Progress
from mythos_dist.store.fetch import read_object
from mythos_dist.store.folder import list_folder
from mythos_dist.urls import AnyPath, RemotePath

MAX_SETTINGS = 1 << 20  # bytes of config.json


def holds_export(path: AnyPath) -> bool:
    """Whether a folder, local or in a store, has the files of an export. Raises UserError if the store fails."""
    if isinstance(path, Path):
        return is_export(path)
    if step_of(path.name) is not None:
        return False
    files = list_folder(path).files
    return MANIFEST_FILE not in files and "config.json" in files and any(n.endswith(".safetensors") for n in files)


def open_export(folder: AnyPath, key_file: str | None = None) -> "ExportedWeights":
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


def open_model_folder(folder: AnyPath) -> "ExportedWeights":
    """The export in `folder`, or what transformers has saved there. Raises UserError, with what to do, for others."""
    if isinstance(folder, RemotePath):
        if not holds_export(folder):
            raise UserError(
                "has no config.json or no .safetensors files; give what model.save_pretrained wrote", str(folder)
            )
        return open_export(folder)
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

    def __init__(self, folder: AnyPath):
        """Raises UserError if it cannot be read, or if tensors do not fit its config.json."""
        self._state: SafeTensors | RemoteTensors
        if isinstance(folder, RemotePath):
            self._state = RemoteTensors(folder)
            file = folder / "config.json"
            settings = parse_settings(lambda: read_object(file.url, MAX_SETTINGS), file, self._state.metadata)
        else:
            self._state = SafeTensors(sorted(folder.glob("*.safetensors")))
            settings = read_settings(folder, self._state.metadata)
        self._model = settings.model
        with torch.device("meta"):
            model = Mythos(self._model)
        tensors = {name: TensorEntry(tuple(value.shape), (PARAMETER,)) for name, value in model.named_parameters()}
        tensors |= {name: TensorEntry(tuple(value.shape), (BUFFER,)) for name, value in model.named_buffers()}
        expected, self._format = {}, format_of(self._state)
        self._sources: dict[str, list[str]] = {}  # our name -> the names in the files
        for name, tensor in tensors.items():
            shapes = exported_shapes(self._format, name, tensor.shape, self._model)
            self._sources[name] = list(shapes)
            expected |= shapes
        described = self._state.described() if isinstance(self._state, RemoteTensors) else self._state
        if problems := list(mismatches(described, expected)):
            raise UserError([*problems, "config.json is of another model; export again"], str(folder))
        check_head(self._state, self._model, folder)
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

    def versions(self) -> dict[str, str]:
        """For each file a text that changes if the file does. Raises UserError if a store fails."""
        if isinstance(self._state, RemoteTensors):
            return self._state.versions()
        return {file.name: file_hash(file) for file in self._state.files}

    def _copy(self, wanted: Iterable[Wanted], progress: Progress) -> None:
        in_ranges = []
        for one in wanted:
            tensor = self.manifest.tensors.get(one.name)
            if tensor is None or one.kind not in tensor.kinds:
                raise UserError(f"holds no {one.kind} {one.name}; is it of another model?", str(self.folder))
            if isinstance(self._state, RemoteTensors) and (source := self._same_tensor(one.name)):
                in_ranges.append((source, tensor.shape, one))
            else:
                self._copy_of_full(one)
                progress(one.out.nbytes)
        if isinstance(self._state, RemoteTensors):
            self._state.read_pieces(in_ranges, progress)

    def _same_tensor(self, name: str) -> str:
        """The name in the files of a tensor that has the same elements in the same order; empty: it has to be converted
        from OpenMythos' ones."""
        (source, *others) = self._sources[name]
        return source if not others and (self._format != "open_mythos" or source == name) else ""

    def _copy_of_full(self, wanted: Wanted) -> None:
        """From an unsharded tensor, whose elements may have another order in the files."""
        shape, out = self.manifest.tensors[wanted.name].shape, wanted.out
        full = self._full_tensor(wanted.name)
        for source, target in overlaps(Piece.full(shape), wanted.piece, shape):
            box = out[target.offset : target.offset + math.prod(target.shape)].reshape(target.shape)
            box[target.slices] = full[source.slices].float().numpy()

    def _full_tensor(self, name: str) -> Tensor:
        """Unsharded, in the dtype of the file, and mapped from it unless it has to be converted to our names."""
        parts = {source: self._state[source] for source in self._sources[name]}
        return parts[name] if list(parts) == [name] else our_state(parts, self._model)[name]
