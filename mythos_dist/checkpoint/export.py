"""A checkpoint's weights for other programs: safetensors files with an index, as Hugging Face's loaders read them.

Under our own names, or under OpenMythos' (`model/open_mythos.py`): then `OpenMythos.load_state_dict` takes them, all
but its rotary tables and its head, which is the embedding. One tensor is in memory at a time.
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mythos_dist.checkpoint.canonical import blocks_of, grouped, must_have_room, outside
from mythos_dist.checkpoint.manifest import BUFFER, PARAMETER, Checkpoint
from mythos_dist.checkpoint.progress import Progress
from mythos_dist.checkpoint.restore import config_of
from mythos_dist.checkpoint.tensor_file import ITEM_BYTES, write_tensors
from mythos_dist.config.schema import BY_MODE, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.files import fsync_folder, make_folders, reason, write_and_fsync
from mythos_dist.model.open_mythos import NOT_PARAMETERS, open_mythos_shapes, other_loops, to_open_mythos

FILE_BYTES = 5 << 30
Format = Literal["safetensors", "open_mythos"]
Dtype = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}
_OURS_ALONE = ("mode", *BY_MODE["reference"])  # of MythosConfig, what OpenMythos' does not have


def export(
    source: Checkpoint,
    out: Path,
    form: Format,
    *,
    dtype: Dtype = "fp32",
    workers: int = 2,
    verify: bool = True,
    progress: Progress = lambda size: None,
    file_bytes: int = FILE_BYTES,
) -> list[Path]:
    """Write model.safetensors, or several with model.safetensors.index.json, and config.json into the new folder `out`.

    `workers`: files that are written at a time. `verify`: as in `write_canonical`. Returns the files of weights. Raises
    UserError if the source is damaged, or `out` is there already or cannot be written.
    """
    manifest, out = source.manifest, outside(source, out)
    if os.path.lexists(out):
        raise UserError("exists; name a new folder", str(out))
    source.raise_if_damaged(verify)
    model = config_of(source).model
    if form == "open_mythos" and (other := other_loops(model)):
        raise UserError(f"OpenMythos has no {', '.join(other)}; export with --format safetensors", str(source.folder))
    label, _ = _DTYPES[dtype]
    names = {
        name: {name: tensor.shape} if form == "safetensors" else open_mythos_shapes(name, tensor.shape, model)
        for name, tensor in manifest.tensors.items()
    }
    size_of = {name: ITEM_BYTES[label] * sum(map(math.prod, theirs.values())) for name, theirs in names.items()}
    groups = grouped(size_of, file_bytes)
    files = [
        "model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        for i in range(1, len(groups) + 1)
    ]

    def write(item: tuple[str, list[str]]) -> None:
        file, ours = item
        shapes = {theirs: shape for name in ours for theirs, shape in names[name].items()}
        blocks = (block for name in ours for block in _blocks(source, name, model, form, dtype, progress))
        write_tensors(temporary / file, shapes, blocks, label, {"format": "pt"})

    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")  # nobody else's
    made = False
    try:
        make_folders(out.parent)
        must_have_room(out.parent, sum(size_of.values()))
        temporary.mkdir()
        made = True
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(write, zip(files, groups, strict=True)))
        if len(files) > 1:
            place = {
                their: file for file, group in zip(files, groups, strict=True) for our in group for their in names[our]
            }
            index = {"metadata": {"total_size": sum(size_of.values())}, "weight_map": place}
            write_and_fsync(temporary / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        fields = {k: v for k, v in asdict(model).items() if form == "safetensors" or k not in _OURS_ALONE}
        write_and_fsync(temporary / "config.json", json.dumps(fields, indent=2) + "\n")
        fsync_folder(temporary)
        temporary.rename(out)
        fsync_folder(out.parent)
    except OSError as error:
        raise UserError(f"cannot be written ({reason(error)}); name another folder or make room", str(out)) from None
    finally:
        if made:
            shutil.rmtree(temporary, ignore_errors=True)  # renamed, it has another name
    return [out / file for file in files]


def _blocks(
    source: Checkpoint, name: str, model: MythosConfig, form: Format, dtype: Dtype, progress: Progress
) -> Iterator[memoryview]:
    kind = PARAMETER if PARAMETER in source.manifest.tensors[name].kinds else BUFFER
    if form == "safetensors":
        for block in blocks_of(source, kind, name, progress):
            yield _bytes_of(torch.frombuffer(block, dtype=torch.float32), dtype)
        return
    whole = torch.from_numpy(source.whole(kind, name))
    for their_name, tensor in to_open_mythos({name: whole}, model).items():
        if their_name not in NOT_PARAMETERS:
            yield _bytes_of(tensor, dtype)
    progress(4 * whole.numel())


def _bytes_of(tensor: Tensor, dtype: Dtype) -> memoryview:
    return tensor.to(_DTYPES[dtype][1]).contiguous().flatten().view(torch.uint8).numpy().data
