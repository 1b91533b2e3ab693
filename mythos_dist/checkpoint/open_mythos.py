"""OpenMythos' weights as the checkpoint that a run begins with: step 0, any layout, no moments.

They come as a state dict in a .pt file or as safetensors, and are read a tensor at a time. A .pt file is a pickle: it
is opened with `weights_only`, which builds tensors and runs nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_dist.checkpoint.canonical import FILE_BYTES, write_full_tensors
from mythos_dist.checkpoint.manifest import BUFFER, PARAMETER, CheckpointManifest, TensorEntry, versions
from mythos_dist.checkpoint.progress import Progress
from mythos_dist.checkpoint.signature import signing_key
from mythos_dist.checkpoint.strict_json import shorten
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError, first_line
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.open_mythos import NOT_PARAMETERS, from_open_mythos, must_be_its_loops, open_mythos_shapes
from mythos_dist.units import count

MAX_LINES = 8  # of problems of one kind
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def import_open_mythos(
    weights: Path,
    config: Config,
    progress: Progress = lambda size: None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the checkpoint of step 0 below `config.run.dir`; returns its folder.

    `weights`: a .pt file, a .safetensors file, or a folder of the latter. Raises UserError if they are not of
    `config.model`, with all that differs, if its loops are not OpenMythos', or if the run has checkpoints already.
    """
    model, run_dir = config.model, Path(config.run.dir)
    signing_key()  # a mistake in it is found before gigabytes are read
    must_be_its_loops(model)
    with torch.device("meta"):
        ours = Mythos(model, act=config.act, experts=config.experts)
    wanted = {name: (PARAMETER, value) for name, value in ours.named_parameters()}
    wanted |= {name: (BUFFER, value) for name, value in ours.named_buffers()}
    parts = {name: open_mythos_shapes(name, tuple(value.shape), model) for name, (_, value) in wanted.items()}
    theirs = open_weights(weights)
    if problems := list(_differences(theirs, {k: shape for part in parts.values() for k, shape in part.items()})):
        raise UserError([*problems, "is `model.*` the config that these weights were made with?"], str(weights))
    if "head.weight" in theirs and not _equal(theirs["head.weight"], theirs["embed.weight"]):
        raise UserError("head.weight is not embed.weight, but this model has one table for both", str(weights))

    tensors = {name: TensorEntry(tuple(value.shape), (kind,)) for name, (kind, value) in wanted.items()}
    manifest = CheckpointManifest(
        *(0, 0, 0, {}, {"model": asdict(model)}, "", versions()),
        *({"steps": 0, "skipped_steps": 0, "loss_scale": {}}, tensors, {}),
    )

    def blocks(_: str, name: str) -> Iterator[memoryview]:
        joined = from_open_mythos({their: theirs[their].float() for their in parts[name]}, model)[name]
        yield joined.contiguous().flatten().numpy().data
        progress(4 * joined.numel())

    return write_full_tensors(run_dir, manifest, blocks, workers=1, file_bytes=file_bytes)


def _differences(theirs: Mapping[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> Iterator[str]:
    def told(what: str, names: Iterable[str]) -> Iterator[str]:
        if found := sorted(names):
            more = f" and {len(found) - MAX_LINES} more" if len(found) > MAX_LINES else ""
            if len(found) == 1:
                what = what.replace("are ", "is ").replace("have ", "has ")
            yield f"{count(len(found), 'tensor')} {what}: {', '.join(found[:MAX_LINES])}{more}"

    here = set(theirs) - set(NOT_PARAMETERS)
    yield from told("are missing", wanted.keys() - here)
    yield from told("are not known", (shorten(name)[1:-1] for name in here - wanted.keys()))
    shapes, kinds = {}, {}
    for name in sorted(here & wanted.keys()):
        tensor = theirs[name]
        shapes[name] = list(tensor.shape)
        if tensor.dtype not in _DTYPES or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            kinds[name] = f"{str(tensor.dtype).removeprefix('torch.')}, {tensor.device.type}, {tensor.layout}"
    others = [name for name, shape in shapes.items() if shape != list(wanted[name])]
    yield from told("have another shape", (f"{name} {shapes[name]} instead of {list(wanted[name])}" for name in others))
    yield from told("are not of plain floating-point values", (f"{name} ({kind})" for name, kind in kinds.items()))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def open_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict whose tensors are read when they are asked for. Raises UserError if it cannot be read."""
    try:
        path = path.expanduser()
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise UserError("holds no .safetensors files; give a folder that does, or a .pt file", str(path))
            return _SafeTensors(files)
        if path.suffix == ".safetensors":
            return _SafeTensors([path])
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError("no such file; give OpenMythos' weights", str(path)) from None
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise whatever they meet
        raise UserError(f"cannot be read as weights ({' '.join(str(error).split())[:300]})", str(path)) from None
    for key in ("model", "model_state_dict", "state_dict"):  # as training scripts wrap it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError("holds no state dict (names and tensors)", str(path))
    return state


class _SafeTensors(Mapping[str, Tensor]):
    def __init__(self, files: list[Path]):
        from safetensors import safe_open

        self._place: dict[str, tuple[Path, Any]] = {}
        for file in files:
            opened: Any = safe_open(file, "pt")
            for name in opened.keys():  # noqa: SIM118 — no mapping
                if name in self._place:
                    raise UserError(f"{shorten(name)} is also in {self._place[name][0].name}; keep one set", str(file))
                self._place[name] = file, opened

    def __getitem__(self, name: str) -> Tensor:
        file, opened = self._place[name]
        try:
            return opened.get_tensor(name)
        except Exception as error:  # of any kind: safetensors has its own
            raise UserError(f"{shorten(name)} cannot be read ({first_line(error)[:300]})", str(file)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)
