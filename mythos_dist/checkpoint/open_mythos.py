"""Import OpenMythos' weights as the checkpoint of step 0 that a new run starts from, at any layout; it has no moments.

The weights are a state dict in a .pt file, or safetensors, and are read a tensor at a time. A .pt file is a pickle: it
is loaded with `weights_only`, which builds tensors and runs no code from the file.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_dist.checkpoint.canonical import FILE_BYTES, write_full_tensors
from mythos_dist.checkpoint.manifest import BUFFER, PARAMETER, CheckpointManifest, TensorEntry, library_versions
from mythos_dist.checkpoint.signature import signing_key
from mythos_dist.checkpoint.strict_json import shorten
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError, first_line
from mythos_dist.files import is_utf8
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.open_mythos import NOT_PARAMETERS, check_loop_settings, from_open_mythos, open_mythos_shapes
from mythos_dist.progress import Progress
from mythos_dist.units import count

MAX_LISTED = 8  # tensors in a message
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def import_open_mythos(
    weights: Path,
    config: Config,
    progress: Progress = lambda size: None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the checkpoint of step 0 to `config.run.dir`; returns its folder.

    `weights`: a .pt file, a .safetensors file, or a folder of .safetensors files. Raises UserError if names, shapes or
    types do not fit `config.model` (all mismatches at once), if the model's loops are not those of OpenMythos, or if
    the run has checkpoints already.
    """
    model, run_dir = config.model, Path(config.run.dir)
    signing_key()  # an error in it is raised before gigabytes are read
    check_loop_settings(model)
    with torch.device("meta"):
        meta_model = Mythos(model, act=config.act, experts=config.experts)
    tensors = {name: TensorEntry(tuple(value.shape), (PARAMETER,)) for name, value in meta_model.named_parameters()}
    tensors |= {name: TensorEntry(tuple(value.shape), (BUFFER,)) for name, value in meta_model.named_buffers()}
    their_shapes = {name: open_mythos_shapes(name, tensor.shape, model) for name, tensor in tensors.items()}
    state_dict = open_weights(weights)
    expected = {their_name: shape for shapes in their_shapes.values() for their_name, shape in shapes.items()}
    if problems := list(mismatches(state_dict, expected)):
        raise UserError([*problems, "is `model.*` the config that these weights were trained with?"], str(weights))
    if "head.weight" in state_dict and not _equal(state_dict["head.weight"], state_dict["embed.weight"]):
        raise UserError("head.weight differs from embed.weight, but in this model they are tied", str(weights))
    manifest = CheckpointManifest(
        step=0,
        tokens=0,
        start=0,
        layout={},
        config={"model": asdict(model)},
        data="",
        versions=library_versions(),
        optimizer={"steps": 0, "skipped_steps": 0, "loss_scale": {}},
        tensors=tensors,
        files={},
    )

    def blocks(_: str, name: str) -> Iterator[memoryview]:
        theirs = {their_name: state_dict[their_name].float() for their_name in their_shapes[name]}
        ours = from_open_mythos(theirs, model)[name]
        yield ours.contiguous().flatten().numpy().data
        progress(4 * ours.numel())

    return write_full_tensors(run_dir, manifest, blocks, workers=1, file_bytes=file_bytes)


def mismatches(state_dict: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """How a state dict differs from the expected names and shapes: a message for each kind of problem."""
    names = set(state_dict) - (set(NOT_PARAMETERS) - expected.keys())
    wrong_shapes, wrong_types = [], []
    for name in names & expected.keys():
        tensor = state_dict[name]
        if tuple(tensor.shape) != expected[name]:
            wrong_shapes.append(f"{name} {list(tensor.shape)} instead of {list(expected[name])}")
        if tensor.dtype not in _DTYPES or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            dtype = str(tensor.dtype).removeprefix("torch.")
            wrong_types.append(f"{name} ({dtype}, {tensor.device.type}, {tensor.layout})")
    missing = expected.keys() - names
    unknown = [shorten(name)[1:-1] for name in names - expected.keys()]
    if missing:
        yield f"missing {list_tensors(missing)}"
    if unknown:
        yield f"unknown {list_tensors(unknown)}"
    if wrong_shapes:
        yield f"wrong shape of {list_tensors(wrong_shapes)}"
    if wrong_types:
        yield f"not a dense floating-point tensor on the CPU: {list_tensors(wrong_types)}"


def list_tensors(descriptions: Collection[str]) -> str:
    """Their number, and the first of them."""
    shown = sorted(descriptions)[:MAX_LISTED]
    more = f" and {len(descriptions) - len(shown)} more" if len(descriptions) > len(shown) else ""
    return f"{count(len(descriptions), 'tensor')}: {', '.join(shown)}{more}"


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def open_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict whose tensors are read on access; `SafeTensors` for such files. Raises UserError if it cannot be
    opened."""
    try:
        path = path.expanduser()
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise UserError("holds no .safetensors files; give a folder that does, or a .pt file", str(path))
            return SafeTensors(files)
        if path.suffix == ".safetensors":
            return SafeTensors([path])
        state_dict = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError("no such file; give OpenMythos' weights", str(path)) from None
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many types
        raise UserError(f"cannot be read as weights ({' '.join(str(error).split())[:300]})", str(path)) from None
    for key in ("model", "model_state_dict", "state_dict"):  # as training scripts wrap it
        if isinstance(state_dict, dict) and isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()
    ):
        raise UserError("holds no state dict (tensors by name)", str(path))
    return state_dict


class SafeTensors(Mapping[str, Tensor]):
    """The tensors of several safetensors files, by name."""

    def __init__(self, files: list[Path]):
        from safetensors import safe_open

        self.files = files
        self._source: dict[str, tuple[Path, Any]] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            if not is_utf8(str(file)):
                raise UserError("the path is not UTF-8, and safetensors refuses it; rename it", str(file))
            opened: Any = safe_open(file, "pt")
            self.metadata |= opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118 — not a mapping
                if name in self._source:
                    raise UserError(f"{shorten(name)} is also in {self._source[name][0].name}; keep one set", str(file))
                self._source[name] = file, opened

    def __getitem__(self, name: str) -> Tensor:
        file, opened = self._source[name]
        try:
            return opened.get_tensor(name)
        except Exception as error:  # safetensors raises its own types
            raise UserError(f"{shorten(name)} cannot be read ({first_line(error)[:300]})", str(file)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)
