"""Export a checkpoint's weights for other programs: safetensors files with an index, as Hugging Face's loaders read.

The names are ours, or those of OpenMythos (`model/open_mythos.py`): `OpenMythos.load_state_dict` loads these, except
for its rotary tables and its head, which is tied to the embedding. One tensor is in memory at a time.
"""

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mythos_dist.checkpoint.canonical import check_free_space, group_by_size, output_path, tensor_blocks
from mythos_dist.checkpoint.progress import Progress
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import config_of
from mythos_dist.checkpoint.tensor_file import ITEM_BYTES, write_tensors
from mythos_dist.config.schema import BY_MODE, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, new_folder, reason, write_and_fsync
from mythos_dist.model.open_mythos import NOT_PARAMETERS, open_mythos_shapes, to_open_mythos, unsupported_loop_settings

FILE_BYTES = 5 << 30
Format = Literal["safetensors", "open_mythos"]
Dtype = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}
_NOT_IN_OPEN_MYTHOS = ("mode", *BY_MODE["reference"])  # fields of our MythosConfig that theirs does not have


def export(
    source: Checkpoint,
    out: Path,
    format: Format,
    *,
    dtype: Dtype = "fp32",
    workers: int = 2,
    verify: bool = True,
    progress: Progress = lambda size: None,
    file_bytes: int = FILE_BYTES,
) -> list[Path]:
    """Write config.json and model.safetensors, or several files and an index, into the new folder `out`.

    `workers`: files written at once. `verify`: as in `write_canonical`. Returns the files of weights. Raises
    UserError if the source is damaged, or if `out` exists already or cannot be written.
    """
    manifest, out = source.manifest, output_path(source, out)
    if os.path.lexists(out):
        raise UserError("exists; name a new folder", str(out))
    source.raise_if_damaged(verify)
    model = config_of(source).model
    unsupported = unsupported_loop_settings(model) if format == "open_mythos" else []
    if unsupported:
        raise UserError(
            f"OpenMythos does not have {', '.join(unsupported)}; export with --format safetensors", str(source.folder)
        )
    shapes = {
        name: {name: tensor.shape} if format == "safetensors" else open_mythos_shapes(name, tensor.shape, model)
        for name, tensor in manifest.tensors.items()
    }  # our name -> the names and shapes to write
    label, _ = _DTYPES[dtype]
    sizes = {name: ITEM_BYTES[label] * sum(map(math.prod, exported.values())) for name, exported in shapes.items()}
    groups = group_by_size(sizes, file_bytes)
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]

    # `start_from` reads step and tokens, for the lineage of a run that begins with these weights; inference needs the
    # settings, besides those of the model.
    settings = {section: manifest.config[section] for section in ("act", "loops") if section in manifest.config}
    metadata = {"format": "pt", "step": str(manifest.step), "tokens": str(manifest.lineage.tokens)}
    metadata["settings"] = json.dumps(settings)
    with _new_folder(out, sum(sizes.values())) as folder:

        def write_file(file: str, names: list[str]) -> None:
            file_shapes = {key: shape for name in names for key, shape in shapes[name].items()}
            blocks = (block for name in names for block in _blocks(source, name, model, format, dtype, progress))
            write_tensors(folder / file, file_shapes, blocks, label, metadata=metadata)

        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(write_file, files, groups))
        if len(files) > 1:
            weight_map = {}
            for file, names in zip(files, groups, strict=True):
                for name in names:
                    weight_map |= dict.fromkeys(shapes[name], file)
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_and_fsync(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        fields = asdict(model)
        if format == "open_mythos":
            fields = {name: value for name, value in fields.items() if name not in _NOT_IN_OPEN_MYTHOS}
        write_and_fsync(folder / "config.json", json.dumps(fields, indent=2) + "\n")
    return [out / file for file in files]


@contextmanager
def _new_folder(out: Path, size: int) -> Iterator[Path]:
    """`files.new_folder` with room for `size` bytes; an OSError becomes a UserError."""
    try:
        make_folders(out.parent)
        check_free_space(out.parent, size)
        with new_folder(out) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"cannot be written ({reason(error)}); name another folder or free some space", str(out)
        ) from None


def _blocks(
    source: Checkpoint, name: str, model: MythosConfig, format: Format, dtype: Dtype, progress: Progress
) -> Iterator[memoryview]:
    """The bytes to write for our tensor `name`."""
    kind = source.manifest.tensors[name].weights
    if format == "safetensors":
        for block in tensor_blocks(source, kind, name, progress):
            yield _bytes_of(torch.frombuffer(block, dtype=torch.float32), dtype)
        return
    full_tensor = torch.from_numpy(source.full_tensor(kind, name))
    for exported_name, tensor in to_open_mythos({name: full_tensor}, model).items():
        if exported_name not in NOT_PARAMETERS:
            yield _bytes_of(tensor, dtype)
    progress(4 * full_tensor.numel())


def _bytes_of(tensor: Tensor, dtype: Dtype) -> memoryview:
    return tensor.to(_DTYPES[dtype][1]).contiguous().flatten().view(torch.uint8).numpy().data
